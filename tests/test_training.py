"""What trains the demo model: the parts fit together, survive saving, and are judged as they should be."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline

from training import evaluate, export, models
from training.transformer import REAL_TOKENS, Denoiser, PaddedCrossAttention
from unicp.demo import scenes
from unicp.demo.check import check

CAPTIONS = [scenes.sample_scene(0).caption(), scenes.sample_scene(4).caption(), ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's folder with untrained weights."""
    target = tmp_path_factory.mktemp("exported") / "model"
    export.export(export.untrained(), target)
    return target


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    pipe = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Videos small enough for a test."""
    for name, value in {"FRAMES": 5, "HEIGHT": 32, "WIDTH": 32}.items():
        monkeypatch.setattr(models, name, value)


# --- the parts ------------------------------------------------------------------------------------------------------


def test_the_tokenizer_knows_every_word_and_leaves_room_for_padding() -> None:
    tokenizer = models.tokenizer()
    words = tokenizer([scenes.sample_scene(seed).caption() for seed in range(300)], padding=True, return_tensors="pt")
    assert not (words.input_ids == tokenizer.unk_token_id).any()
    assert int(words.attention_mask.sum(1).max()) < REAL_TOKENS
    assert tokenizer("").input_ids == [tokenizer.eos_token_id]


@torch.no_grad()
def test_shortened_cross_attention_equals_wans_over_the_padded_text() -> None:
    torch.manual_seed(0)
    attention = models.transformer().blocks[0].attn2.eval()
    dim = attention.to_q.in_features
    hidden, padding = torch.randn(2, 12, dim), torch.randn(dim)
    text = padding.expand(2, models.TEXT_LENGTH, dim).clone()  # (B, 512, C): nine words, then the same vector on and on
    text[:, :9] = torch.randn(2, 9, dim)
    expected = attention(hidden, text)
    assert (expected - attention(hidden, text[:, :9])).abs().max() > 1e-2  # the padding does matter
    attention.set_processor(PaddedCrossAttention())
    torch.testing.assert_close(attention(hidden, text[:, :REAL_TOKENS]), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_training_and_pipeline_compute_the_same_velocity() -> None:
    torch.manual_seed(0)
    tokenizer = models.tokenizer()
    denoiser = Denoiser(len(tokenizer)).eval()
    text_encoder, transformer = export._denoiser_parts(denoiser)
    pipe = WanPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, transformer=transformer, vae=models.vae(),
        scheduler=models.scheduler(),
    )  # fmt: skip
    text, _ = pipe.encode_prompt(CAPTIONS, do_classifier_free_guidance=False, max_sequence_length=models.TEXT_LENGTH)
    latents, timestep = torch.randn(3, models.LATENT_CHANNELS, 2, 8, 8), torch.tensor([900.0, 500.0, 20.0])
    expected = transformer(latents, timestep, text, return_dict=False)[0]
    words = tokenizer(CAPTIONS, padding="max_length", max_length=REAL_TOKENS, return_tensors="pt")
    velocity = denoiser(latents, timestep, words.input_ids, words.attention_mask)
    torch.testing.assert_close(velocity, expected, atol=2e-5, rtol=1e-4)


# --- export ---------------------------------------------------------------------------------------------------------


def test_the_folder_is_an_ordinary_pipeline_in_half_precision(folder: Path) -> None:
    from safetensors import safe_open

    for part, dtype in {"text_encoder": "BF16", "transformer": "BF16", "vae": "F16"}.items():
        (path,) = (folder / part).glob("*.safetensors")
        with safe_open(path, "pt") as weights:
            assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {dtype}  # noqa: SIM118
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < export.LIMIT_MB * 1e6
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.rglob("*"))
    assert not folder.with_name("model.part").exists()


def test_the_folder_says_what_it_is_and_nothing_of_the_machine(folder: Path) -> None:
    card = (folder / "README.md").read_text("utf-8")
    assert "untrained" in card
    assert "{" not in card
    for path in folder.rglob("*.json"):
        assert str(folder.parent) not in path.read_text("utf-8")


def test_a_loaded_pipeline_is_what_was_saved(pipe: Any) -> None:
    parts = export.untrained()
    for name, dtype in export.STORED.items():
        export.round_weights(getattr(parts, name), dtype)
    export.compare(export.fingerprint(parts), export.fingerprint(pipe))
    assert pipe.text_encoder.shared.weight is pipe.text_encoder.encoder.embed_tokens.weight


@pytest.mark.parametrize("part", ["text_encoder", "transformer", "vae"])
def test_lost_weights_are_noticed(folder: Path, pipe: Any, part: str) -> None:
    broken = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    weight = (
        broken.text_encoder.shared.weight if part == "text_encoder" else list(getattr(broken, part).parameters())[-2]
    )
    torch.nn.init.normal_(weight)
    with pytest.raises(SystemExit, match=f"the {part} does not survive"):
        before = export.fingerprint(pipe)
        # The text goes into the transformer too: what comes first is named.
        export.compare(before, export.fingerprint(broken))


def test_the_averages_are_exported_and_not_the_latest_weights() -> None:
    tokenizer = models.tokenizer()
    denoiser = Denoiser(len(tokenizer))
    latest = {name: value.clone() for name, value in denoiser.state_dict().items()}
    average = {name: value.detach() + 1 for name, value in denoiser.named_parameters()}
    export.load_averages(denoiser, {"model": latest, "average": average})
    for name, value in denoiser.state_dict().items():
        torch.testing.assert_close(value, latest[name] + 1, msg=name)  # the tied embedding under both its names
    with pytest.raises(SystemExit, match=r"do not fit the model: \['text_encoder.shared.weight'\]"):
        del average["text_encoder.shared.weight"]
        export.load_averages(denoiser, {"model": latest, "average": average})


def test_export_refuses_what_it_must_not_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with pytest.raises(SystemExit, match=r"vae.pt is missing"):
        export.trained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="left alone"):
        export.save(export.untrained(), tmp_path)
    assert (tmp_path / "notes.txt").exists()
    monkeypatch.setattr(sys, "argv", ["export", "--random"])
    with pytest.raises(SystemExit):
        export.main()
    assert "would replace the trained model" in capsys.readouterr().err


# --- evaluation -----------------------------------------------------------------------------------------------------


def test_the_judged_captions_are_the_held_out_prompts() -> None:
    assert [scene.caption() for scene in scenes.held_out_scenes(12, 3)] == scenes.prompts(12, 3)


def test_tally_counts_videos_and_objects() -> None:
    # Two things, the second one wrong: the video's direction is wrong, and so is that motion's, but no other's.
    scene = next(s for s in map(scenes.sample_scene, range(100)) if len({t.motion for t in s.things} - {"still"}) == 2)
    first, second = scene.things
    video = scenes.render(scene, frames=9)
    all_right = {criterion: [1, 1] for criterion in evaluate.CRITERIA}
    right = evaluate.tally([check(video, scene)])
    assert right["all videos"] == right["two objects"] == all_right
    assert right["one object"]["colour"] == [0, 0]
    assert right[first.motion]["direction"] == right[second.motion]["direction"] == [1, 1]
    other = scenes.Thing(shape=second.shape, colour=second.colour, motion="still", speed="slow")
    wrong = evaluate.tally([check(video, scenes.Scene(things=(first, other)))])
    assert wrong["all videos"] == all_right | {"direction": [0, 1]}
    assert wrong[first.motion]["direction"] == [1, 1]
    assert wrong["still"] == {"colour": [1, 1], "count": [0, 0], "direction": [0, 1], "speed": [0, 0]}


@pytest.mark.usefixtures("small")
def test_a_videos_noise_is_its_own_whatever_the_batch(pipe: Any) -> None:
    ticks = []

    def run(rows: list[int]) -> torch.Tensor:
        videos = evaluate.generate(
            pipe, [CAPTIONS[row] for row in rows], rows, steps=2, guidance=4.0, tick=lambda: ticks.append(1)
        )
        return torch.from_numpy(videos)

    both = run([0, 1])
    assert both.shape == (2, 5, 32, 32, 3)
    assert len(ticks) == 2
    torch.testing.assert_close(run([1])[0], both[1], atol=1e-4, rtol=0)
    assert (both[0] - both[1]).abs().max() > 1e-2


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("reference", [False, True])
def test_evaluation_writes_its_figures(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: bool
) -> None:
    words = ["--model", str(folder), "-o", str(tmp_path / "figures.json"), "--sheet", str(tmp_path / "sheet.png")]
    words += ["--count", "3", "--batch", "2", "--steps", "1", "--device", "cpu"] + ["--reference"] * reference
    monkeypatch.setattr(sys, "argv", ["evaluate", *words])
    evaluate.main()
    text = (tmp_path / "figures.json").read_text("utf-8")
    assert str(tmp_path) not in text
    assert str(folder.parent) not in text
    report = json.loads(text)
    assert report["command"].startswith("python -m training.evaluate --model model -o figures.json")
    assert report["right_of_asked"]["all videos"]["colour"][1] == 3
    assert ("steps" in report["settings"]) is not reference
    assert len(report["weights"]) == 16
    assert (tmp_path / "sheet.png").stat().st_size > 0
