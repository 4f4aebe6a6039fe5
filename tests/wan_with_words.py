"""A Wan pipeline that is as small as can be, with all its parts: it takes a prompt and returns a video."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel


def build() -> WanPipeline:
    """The pipeline, with random weights; its tokenizer knows a few words."""
    torch.manual_seed(0)
    words = ["<pad>", "</s>", "<unk>", *"a red blue ball star bouncing fast".split()]
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    sizes = {"vocab_size": len(words), "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return WanPipeline(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
        ),
        text_encoder=UMT5EncoderModel(UMT5Config(**sizes, dropout_rate=0.0, pad_token_id=0, eos_token_id=1)),
        transformer=WanTransformer3DModel(
            patch_size=(1, 4, 4),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=16,
            num_layers=2,
            rope_max_seq_len=32,
        ),
        vae=AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            attn_scales=[],
            temperal_downsample=[True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_temporal=2,
            scale_factor_spatial=4,
        ),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )
