"""The proving ground: members are trained on what their pipelines compute, and those that are there draw videos."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import zoo
from training.zoo.data import KINDS, Batch
from training.zoo.members import NAMES, member
from unicp.demo import scenes
from zoo import parts

CAPTION = "a red ball moving left slowly over a gray striped background"


def _embedded(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    words = parts.tokenizer()(captions, padding="max_length", max_length=parts.TEXT_LENGTH, return_tensors="pt")
    return parts.text_encoder()(words.input_ids, words.attention_mask).last_hidden_state, words.attention_mask


def _batch(kind: str, size: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    height, width = (pixels // parts.SPATIAL for pixels in KINDS[kind].size)
    latents = torch.randn(size, parts.CHANNELS, parts.LATENT_FRAMES, height, width, generator=generator)
    text, mask = _embedded([CAPTION] * size)
    empty_text, empty_mask = _embedded([""])
    return Batch(
        latents=latents,
        text=text,
        mask=mask,
        empty_text=empty_text,
        empty_mask=empty_mask,
        first_frame=torch.zeros_like(latents) if KINDS[kind].first_frame else None,
        generator=generator,
    )


def _calls(module: Any, run: Any) -> list[dict[str, Any]]:
    """The arguments of the calls that ``run`` makes of a module, by diffusers' names for them."""
    names = list(inspect.signature(module.forward).parameters)
    usual = {"x": "hidden_states", "y": "encoder_hidden_states"}
    seen: list[dict[str, Any]] = []

    def note(_module: Any, args: Any, kwargs: Any, _output: Any) -> None:
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        seen.append({usual.get(name, name): value for name, value in named.items()})

    hook = module.register_forward_hook(note, with_kwargs=True)
    run()
    hook.remove()
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_training_gives_the_transformer_what_the_pipeline_gives_it(name: str) -> None:
    chosen = member(name)
    torch.manual_seed(0)
    modules = chosen.modules()
    pipe = chosen.pipeline(modules)
    call = {**chosen.call(), **chosen.inputs(scenes.sample_scene(0)), "num_inference_steps": 2, "output_type": "latent"}
    module = modules["transformer"]
    sampled = _calls(module, lambda: pipe(prompt=CAPTION, **call, generator=torch.Generator().manual_seed(0)))
    batch = _batch(chosen.data[0], 8)
    with torch.no_grad():
        trained = _calls(module, lambda: chosen.loss(modules, batch))[-1]
    assert trained["hidden_states"].shape[1:] == sampled[0]["hidden_states"].shape[1:]
    assert trained["encoder_hidden_states"].shape[-1] == sampled[0]["encoder_hidden_states"].shape[-1]
    assert float(trained["timestep"].min()) >= 0 and float(trained["timestep"].max()) <= 1000
    # The caption is in the last row of what a pipeline calls first, in our own one in the first.
    rows = sampled[0]["encoder_hidden_states"]
    text = rows[0 if name == "open-sora" else -1].squeeze(0)[: parts.TEXT_LENGTH]
    torch.testing.assert_close(trained["encoder_hidden_states"][0].squeeze(0), text)
    for key in ("image_rotary_emb", "rope_interpolation_scale", "num_frames", "height", "width"):
        torch.testing.assert_close(trained.get(key), sampled[0].get(key))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_but_unused_ones_learns(name: str) -> None:
    chosen = member(name)
    modules = chosen.shortened(chosen.modules())
    chosen.loss(modules, _batch(chosen.data[0], 8)).backward()
    for module in modules.values():
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.names())
def test_members_that_are_there_draw_videos(name: str) -> None:
    pipe, call = zoo.load(name)
    scene = scenes.sample_scene(0, held_out=True)
    call |= {"num_inference_steps": 2, "output_type": "np"}
    video = pipe(prompt=scene.caption(), **call, **zoo.inputs(name, scene)).frames[0]
    assert video.shape == (parts.FRAMES, call["height"], call["width"], 3)


def test_patches_of_latents_are_undone() -> None:
    latents = torch.randn(2, 8, 7, 12, 12)
    patched = parts.patched(latents, 2)
    assert patched.shape == (2, 32, 7, 6, 6)
    assert torch.equal(parts.unpatched(patched, 2), latents)


def test_padding_changes_nothing_that_the_text_encoder_says() -> None:
    ids = parts.tokenizer()([CAPTION], return_tensors="pt").input_ids
    padded = torch.nn.functional.pad(ids, (0, 20))
    with torch.no_grad():
        short, long = parts.text_encoder()(ids), parts.text_encoder()(padded)
    torch.testing.assert_close(long.last_hidden_state[:, : ids.shape[1]], short.last_hidden_state)
    assert not long.last_hidden_state[:, ids.shape[1] :].any()
    torch.testing.assert_close(long.pooler_output, short.pooler_output)
