"""What the tests of the command line share: a pipeline's folder with tiny random weights, and a way to call it."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from unicp import cli
from unicp.offline import trials

if "PYTEST_XDIST_WORKER" in os.environ:  # workers beside each other: one thread each, and in what they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

gc.collect()
gc.freeze()  # what was imported stays: no collection need walk through it again

hypothesis.settings.register_profile("unicp", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("unicp")


@pytest.fixture
def only_new_objects() -> Iterator[None]:
    """The garbage collector sees what is made in this test alone, which makes it fast."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


SMALL = ["--size", "48x32", "--frames", "5", "--steps", "8"]


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Wan pipeline that is as small as can be, and knows a few words."""
    torch.manual_seed(0)
    words = ["<pad>", "</s>", "<unk>", *"a red blue ball star bouncing fast".split()]
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    sizes = {"vocab_size": len(words), "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    pipe = WanPipeline(
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
    folder = tmp_path_factory.mktemp("tiny") / "model"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def run(wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Calls ``unicp generate`` with the tiny model, in an empty current folder. Returns the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments: str, model: str | None = None) -> int:
        return cli.main(["generate", "--model", model or str(wan_folder), *SMALL, *arguments])

    return call


@pytest.fixture(scope="module")
def pipe(wan_folder: Path) -> WanPipeline:
    """That pipeline; modules with another one have a fixture of their own."""
    pipe = WanPipeline.from_pretrained(wan_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def by_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed-ups of tuned plans by their steps, not as timed: tiny models are mostly overhead."""
    monkeypatch.setattr(trials.Tuner, "_overhead", lambda self: 0.1)
