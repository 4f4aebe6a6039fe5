"""The demo model's parts, before training. One place for every size, so that training and export agree."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from unicp.demo import scenes

RUNS = Path(__file__).parent / "runs"

FRAMES, HEIGHT, WIDTH = 13, 96, 96
LATENT_CHANNELS = 8
TEXT_DIM = 128
FLOW_SHIFT = 3.0
TEXT_LENGTH = 512  # WanPipeline's default `max_sequence_length`

# Words that the captions do not use but a person might; they are in the vocabulary so that the tokenizer
# does not have to change when the captions do.
_SPARE_WORDS = "the in on of with to is it at from into while near its video clip scene one two three".split()


def vocabulary() -> list[str]:
    words = {word for seed in range(4000) for word in scenes.sample_scene(seed).caption().replace(",", " ,").split()}
    words |= set(chain(scenes.COLOURS, scenes.TONES, scenes.SHAPES, scenes.TEXTURES, scenes.DIRECTIONS, _SPARE_WORDS))
    return sorted(words)


def tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "</s>", "<unk>"]
    vocab = {word: index for index, word in enumerate(special + vocabulary())}
    core = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", vocab["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def text_encoder(vocab_size: int) -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocab_size,
            d_model=TEXT_DIM,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=32,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def vae(latents_mean: list[float] | None = None, latents_std: list[float] | None = None) -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=40,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True],
        latents_mean=latents_mean or [0.0] * LATENT_CHANNELS,
        latents_std=latents_std or [1.0] * LATENT_CHANNELS,
        in_channels=48,
        out_channels=48,
        patch_size=4,
        scale_factor_temporal=2,
        scale_factor_spatial=8,
    )


def transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=3,
        attention_head_dim=64,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=256,
        ffn_dim=768,
        num_layers=8,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )


def scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT, num_train_timesteps=1000
    )


def drawn(seeds: Iterable[int]) -> np.ndarray:
    """Videos (N, F, H, W, 3) of these scenes, as bytes: hundreds of them have to fit into memory."""
    return np.stack(
        [(scenes.render(scenes.sample_scene(s), frames=FRAMES) * 255).round().astype(np.uint8) for s in seeds]
    )


def pick_device(name: str | None = None) -> torch.device:
    if name:
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def save_atomically(state: Any, path: Path) -> None:
    part = path.with_name(path.name + ".part")
    torch.save(state, part)
    part.rename(path)
