"""Step 4: the trained parts as an ordinary diffusers folder, loaded back and compared.

    python -m training.export                              # training/runs -> src/unicp/demo/model
    python -m training.export --random --to some/folder    # the same layout with untrained weights, for tests

The text encoder and the transformer are the exponential averages of training, in bfloat16; the VAE, whose rounding
would show in the picture, is in float16.
"""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import WanPipeline

from training import models
from training.transformer import Denoiser
from unicp import demo
from unicp.demo import scenes

MODEL = demo.path()
LIMIT_MB = 40
STORED = {"text_encoder": torch.bfloat16, "transformer": torch.bfloat16, "vae": torch.float16}
TOLERANCE = 1e-4
"""Largest difference, relative to the largest value, between outputs before and after saving: float32 noise."""

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---

# The demo model of unicp

A small text-to-video diffusion transformer of the Wan architecture, in the ordinary diffusers folder layout:

```python
import torch, unicp
from diffusers import WanPipeline

pipe = WanPipeline.from_pretrained(unicp.demo.path(), dtype=torch.float32)
```

It exists so that methods which skip or reuse a video model's computation can be tried, tested and compared in minutes
on a CPU, with no download. It is not a model for making videos of anything else.

## What it is

{parts}

Native size: {frames} frames of {height} x {width} pixels. The weights are stored in half precision (the VAE in float16,
the rest in bfloat16); load them in float32 on a CPU.

## What it was trained on

Videos drawn by `unicp.demo.scenes`, with the captions that module writes; no photograph, film or other data of anyone.
{history}
One caption in twenty (chosen by its hash, `scenes.is_held_out`) was never trained on. The text encoder and the
transformer were trained together by flow matching with caption dropout, so classifier-free guidance works; the weights
are an exponential average. The scripts are in `training/`.

## How good it is

`python -m training.evaluate` generates held-out captions and measures, from pixels, whether colours, number of
objects, motion and speed are those of the caption; the figures, with the command and the machine, are in
`training/evaluation.json` of the repository.

## Limits

- It knows {words} words: the colours, shapes, motions and backgrounds of `unicp.demo.scenes`. Other words are unknown
  to it, and other wordings than those captions use were not trained on.
- Other sizes and numbers of frames than the native ones were not trained on.
- Results on it say how a method behaves on a small Wan-architecture model, not how it ranks on a large one.

## Licence

Apache-2.0, as the code that made it.
"""


class Parts(NamedTuple):
    """Everything of a pipeline, in float32, and what to say of its training."""

    tokenizer: Any
    text_encoder: torch.nn.Module
    transformer: torch.nn.Module
    vae: torch.nn.Module
    history: str


def _denoiser_parts(denoiser: Denoiser) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Text encoder and transformer, the latter with its ordinary attention instead of training's shortened one."""
    transformer = models.transformer()
    transformer.load_state_dict(denoiser.transformer.state_dict())
    return denoiser.text_encoder.eval(), transformer.eval()


def untrained(seed: int = 0) -> Parts:
    torch.manual_seed(seed)
    tokenizer = models.tokenizer()
    text_encoder, transformer = _denoiser_parts(Denoiser(len(tokenizer)))
    return Parts(tokenizer, text_encoder, transformer, models.vae().eval(), "These weights are untrained.")


def load_averages(denoiser: Denoiser, checkpoint: dict[str, Any]) -> None:
    """The averaged weights of a checkpoint of training.transformer, every one of them or an error."""
    denoiser.load_state_dict(checkpoint["model"])
    parameters = dict(denoiser.named_parameters())
    if missing := parameters.keys() ^ checkpoint["average"].keys():
        raise SystemExit(f"the checkpoint's averages do not fit the model: {sorted(missing)[:3]} ...")
    # Parameter by parameter: a state dict names the tied embedding twice, and the second would be the latest weights.
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(checkpoint["average"][name])


def _load(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise SystemExit(f"{path} is missing: run the training first, or pass --random for untrained weights")
    return torch.load(path, map_location="cpu")


def trained(runs: Path) -> Parts:
    vae_state, state = _load(runs / "vae.pt"), _load(runs / "transformer.pt")
    vae = models.vae(state["latents_mean"], state["latents_std"]).eval()
    vae.load_state_dict(vae_state["model"])
    tokenizer = models.tokenizer()
    denoiser = Denoiser(len(tokenizer))
    load_averages(denoiser, state)
    text_encoder, transformer = _denoiser_parts(denoiser)
    history = f"The VAE was trained for {vae_state['step']:,} steps, the transformer for {state['step']:,}."
    return Parts(tokenizer, text_encoder, transformer, vae, history)


@torch.no_grad()
def round_weights(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Round the parameters to what ``dtype`` can hold, in place; they stay float32."""
    for name, parameter in module.named_parameters():
        parameter.copy_(parameter.to(dtype))
        if not parameter.isfinite().all():
            raise SystemExit(f"{name} does not fit into {dtype}")


@torch.inference_mode()
def fingerprint(parts: Any) -> dict[str, torch.Tensor]:
    """What each part makes of a fixed input: of :class:`Parts`, or of a pipeline."""
    generator = torch.Generator().manual_seed(0)
    captions = [scenes.sample_scene(seed).caption() for seed in (0, 4)] + [""]
    words = parts.tokenizer(captions, padding="max_length", max_length=32, return_tensors="pt")
    text = parts.text_encoder(words.input_ids, words.attention_mask).last_hidden_state * words.attention_mask[..., None]
    latents = torch.randn(3, models.LATENT_CHANNELS, 3, 8, 8, generator=generator)
    timestep = torch.tensor([900.0, 500.0, 100.0])
    return {
        "tokenizer": words.input_ids.float(),
        "text_encoder": text,
        "transformer": parts.transformer(latents, timestep, text, return_dict=False)[0],
        "vae": parts.vae.decode(latents[:1], return_dict=False)[0],
        "vae statistics": torch.tensor([parts.vae.config.latents_mean, parts.vae.config.latents_std]),
    }


def compare(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    """Stop with an error unless both fingerprints are the same up to float32 noise."""
    for name, value in before.items():
        error = float((after[name] - value).abs().max() / value.abs().max().clamp_min(1e-12))
        if not error <= TOLERANCE:  # NaN too
            raise SystemExit(f"the {name} does not survive saving and loading: outputs differ by {error:.1e}")


def save(parts: Parts, target: Path) -> None:
    """Write the folder beside its place and move it there when it is complete. Changes the parts' dtype."""
    if target.exists() and not (target / "model_index.json").exists() and any(target.iterdir()):
        raise SystemExit(f"{target} is there and is not a model's folder; it was left alone")
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    modules = {name: getattr(parts, name) for name in STORED}
    for name, dtype in STORED.items():
        # Not `module.to`: that would round buffers too, and diffusers warns of it.
        for parameter in modules[name].parameters():
            parameter.data = parameter.data.to(dtype)
    pipe = WanPipeline(tokenizer=parts.tokenizer, scheduler=models.scheduler(), **modules)
    pipe.save_pretrained(part, safe_serialization=True)
    (part / "README.md").write_text(_card(parts), "utf-8")
    for path in part.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes files that only their owner can read
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)


def _card(parts: Parts) -> str:
    def line(name: str, module: torch.nn.Module, what: str) -> str:
        return f"- `{name}`: {what}, {sum(p.numel() for p in module.parameters()) / 1e6:.2f} M parameters"

    transformer, vae = parts.transformer.config, parts.vae.config
    size = f"{transformer.num_layers} blocks, width {transformer.num_attention_heads * transformer.attention_head_dim}"
    pixels = f"{vae.scale_factor_spatial} x {vae.scale_factor_spatial} pixels and {vae.scale_factor_temporal} frames"
    lines = [
        line("transformer", parts.transformer, f"`WanTransformer3DModel`, {size}"),
        line("vae", parts.vae, f"`AutoencoderKLWan`, {vae.z_dim} latent channels for {pixels}"),
        line("text_encoder", parts.text_encoder, f"`UMT5EncoderModel`, {parts.text_encoder.config.num_layers} layers"),
        f"- `tokenizer`: whole words, {len(parts.tokenizer)} of them",
        f"- `scheduler`: `UniPCMultistepScheduler`, flow matching, shift {models.FLOW_SHIFT:g}",
    ]
    return CARD.format(
        parts="\n".join(lines),
        history=parts.history,
        words=len(parts.tokenizer),
        frames=models.FRAMES,
        height=models.HEIGHT,
        width=models.WIDTH,
    )


@torch.inference_mode()
def vae_quality(vae: Any) -> float:
    """PSNR in dB of a drawn video passed through the VAE."""
    video = (
        torch.from_numpy(scenes.render(scenes.sample_scene(1), frames=models.FRAMES)).permute(3, 0, 1, 2)[None] * 2 - 1
    )
    rebuilt = vae.decode(vae.encode(video).latent_dist.mean, return_dict=False)[0]
    return -10 * math.log10(float(((rebuilt - video) / 2).pow(2).mean()))


def export(parts: Parts, target: Path) -> dict[str, float]:
    """Save, load back, compare, and try the pipeline. Returns the size and what rounding the VAE changes."""
    figures = {"VAE PSNR in float32, dB": vae_quality(parts.vae)}
    for name, dtype in STORED.items():
        round_weights(getattr(parts, name), dtype)
    figures["VAE PSNR as stored, dB"] = vae_quality(parts.vae)
    before = fingerprint(parts)
    save(parts, target)
    figures["size, MB"] = sum(path.stat().st_size for path in target.rglob("*") if path.is_file()) / 1e6
    if figures["size, MB"] > LIMIT_MB:
        raise SystemExit(f"{target} has {figures['size, MB']:.1f} MB; at most {LIMIT_MB} MB may be shipped")
    pipe = WanPipeline.from_pretrained(target, dtype=torch.float32)
    compare(before, fingerprint(pipe))
    pipe.set_progress_bar_config(disable=True)
    small = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "output_type": "pt"}
    video = pipe(scenes.sample_scene(0).caption(), generator=torch.Generator().manual_seed(0), **small).frames
    if not bool(video.isfinite().all()):
        raise SystemExit(f"the pipeline in {target} makes values that are not finite")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="runs", type=Path, default=models.RUNS)
    parser.add_argument("--to", type=Path, default=MODEL)
    parser.add_argument("--random", action="store_true", help="untrained weights, for tests of the layout")
    args = parser.parse_args()
    if args.random and args.to.resolve() == MODEL.resolve():
        parser.error("--random would replace the trained model: name another folder with --to")
    parts = untrained() if args.random else trained(args.runs)
    for name, value in export(parts, args.to).items():
        print(f"{name}: {value:.2f}")
    print(f"saved, loaded back and compared: {args.to}")


if __name__ == "__main__":
    main()
