"""The pretended device, and rehearsals on it: no tensor of another device, counted reads, memory, published models."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import unicp
from tests.contract import CASES, config_on, covering, quietly
from tests.family import moved
from tests.tiny import FAMILIES, denoisers
from tests.tiny_variants import VARIANTS
from unicp import cli
from unicp.errors import UnicpError
from unicp.offline import published, rehearse
from unicp.offline.local import local
from unicp.offline.pretend import DEVICE, Pretend, device_named
from unicp.tensors.host import accelerator, listed

WAN = published.published("wan-1.3b")
TINY = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "ffn_dim": 16,
    "text_dim": 16,
    "freq_dim": 16,
}
FAMILIES_HERE = [name for name in FAMILIES if name not in {"wan-animate", *(family.name for family in VARIANTS)}]
"""One of each transformer, but one whose stand-in for a pipeline makes conditions of its own on the CPU."""
MADE_ANEW = {"anyflow": 1, "easyanimate": 1, "kandinsky5": 2}
"""Families whose pipelines make the timestep of each call anew, and how often the first step's is read: only its value
tells which step that is, until the scheduler has taken one."""
READING = ["schedule-linear", "adacache-residual", "budget-default", "unicp-online", "unicp-forecast"]


def pretended(family: str, case: str, device: Pretend, videos: int = 1) -> unicp.SessionReport:
    """A run of a tiny pipeline on the pretended device, with every tensor of the call there.

    Of several videos, the reads are those of the last one.
    """
    chosen = FAMILIES[family]
    pipe = chosen.build()
    for denoiser in denoisers(chosen, pipe):
        denoiser.to(DEVICE)
        device.weights(denoiser)
        denoiser.register_forward_pre_hook(lambda *_: setattr(device, "calls", device.calls + 1))
    session = unicp.accelerate(pipe, config_on(family, case))

    def run(pipe: Any, **call: Any) -> Any:
        return pipe(**moved(call, DEVICE))

    with torch.no_grad(), device:
        for _ in range(videos):
            device.reads.clear()
            quietly(lambda: chosen.run(pipe, run, generator=torch.Generator().manual_seed(0)))
        return session.report()


@pytest.mark.parametrize(
    ("family", "case"),
    [
        *covering([name for name in FAMILIES_HERE if FAMILIES[name].primary], READING),
        *(
            pytest.param(name, case, marks=pytest.mark.slow)
            for name in FAMILIES_HERE
            for case in READING
            if not FAMILIES[name].primary
        ),
    ],
)
def test_at_most_one_read_a_computed_step_and_none_of_tensors_elsewhere(family: str, case: str) -> None:
    device = Pretend()
    report = pretended(family, case, device)
    measured = [read for read in device.reads if read.ours and read.where.startswith("run.py")]
    assert len(measured) <= report.computed_steps
    if case.startswith(("schedule", "budget")):  # a budget without a reserve is told its errors at the end
        assert len(measured) <= case.startswith("budget") * len(FAMILIES[family].denoisers)
    # Timesteps and noise levels are known on the host: 42 reads in ten steps were usual once.
    others = [read for read in device.reads if read.ours and read not in measured]
    assert len(others) <= MADE_ANEW.get(family, 0), others
    assert all(read.call <= len(FAMILIES[family].branches) for read in others), others


@pytest.mark.parametrize("family", ["wan", "wan2.2", "hunyuan-video", "cogvideox"])
def test_nothing_is_read_as_the_second_video_begins(family: str) -> None:
    """Multistep solvers keep timesteps of the video before."""
    device = Pretend()
    pretended(family, "schedule-linear", device, videos=2)
    assert not [read for read in device.reads if read.ours]


@functools.cache
def live(family: str, case: str | None) -> tuple[list[int], int, int]:
    """Bytes that are alive on the pretended device as each call of a denoiser begins, those the report says, and those
    of a call's latents.
    """
    chosen, device = FAMILIES[family], Pretend()
    pipe, seen, latents = chosen.build(), list[int](), list[int]()

    def begin(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(device.memory.now)
        latents.append(next(iter((*args, *kwargs.values()))).nbytes)

    for denoiser in denoisers(chosen, pipe):
        denoiser.to(DEVICE)
        device.weights(denoiser)
        denoiser.register_forward_pre_hook(begin, with_kwargs=True)
    session = unicp.accelerate(pipe, config_on(family, case)) if case is not None else None

    def run(pipe: Any, **call: Any) -> Any:
        return pipe(**moved(call, DEVICE))

    with torch.no_grad(), device:
        quietly(lambda: chosen.run(pipe, run, steps=8, generator=torch.Generator().manual_seed(0)))
        return seen, session.report().cache_bytes if session is not None else 0, max(latents)


@pytest.mark.parametrize(
    ("case", "family"),
    covering(
        [f"{method}-{name}" for method, cases in CASES.items() for name, each in cases.items() if not each.profiled],
        ["wan", "latte", "hunyuan-video"],
    ),
)
def test_what_the_report_says_is_kept_is_what_is_alive(family: str, case: str) -> None:
    plain, _, latents = live(family, None)
    accelerated, kept, _ = live(family, case)
    most = max(now - before for now, before in zip(accelerated, plain, strict=True))
    # The latents of the call before may be alive until the next one.
    assert 0.98 * kept <= most <= 1.02 * kept + latents


READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x.max()),
    "bool": lambda x: bool(x[0] > 0),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "equal": lambda x: torch.equal(x, x),
}


def test_a_small_tensor_is_fetched_once_until_somebody_writes_to_it() -> None:
    device = Pretend()
    with torch.no_grad(), device:
        tensor = torch.empty(4, device=DEVICE) + 1
        assert len(listed(tensor)) == len(listed(tensor)) == 4
        assert len(device.reads) == 1
        tensor.add_(1)
        listed(tensor)
    assert len(device.reads) == 2


@pytest.mark.parametrize("name", READS)
def test_reads_are_counted_whatever_way_they_take(name: str) -> None:
    device = Pretend()
    with torch.no_grad(), device:
        READS[name](torch.empty(4, device=DEVICE) + 1)
    assert len(device.reads) == 1
    assert not device.reads[0].ours  # this file asked


def test_values_that_follow_from_the_host_are_kept() -> None:
    with torch.no_grad(), Pretend():
        x = torch.arange(4.0).to(DEVICE) * 2
        x[1] = 7.0
        assert x.tolist() == [0.0, 7.0, 4.0, 6.0]
        assert (x > 5).nonzero().flatten().tolist() == [1, 3]


def test_a_tensor_of_the_host_in_the_way_fails() -> None:
    with torch.no_grad(), Pretend(), pytest.raises(UnicpError, match="tensors of two devices"):
        _ = torch.empty(3, device=DEVICE) + torch.ones(3)


def test_float64_fails_on_a_device_without() -> None:
    with torch.no_grad(), Pretend(double=False), pytest.raises(UnicpError, match="float64"):
        torch.empty(3, device=DEVICE).double()


def test_live_bytes_and_their_peak() -> None:
    device = Pretend()
    with torch.no_grad(), device:
        x = torch.empty(1000, device=DEVICE)
        assert device.memory.now == 4000
        y = x.view(10, 100) + 1
        assert (device.memory.now, device.memory.peak) == (8000, 8000)
        del y
    assert (device.memory.now, device.memory.peak) == (4000, 8000)


def test_large_tensors_are_not_copied_whole_to_be_measured() -> None:
    from unicp.tensors.metrics import CHUNK, relative_change

    device = Pretend()
    with torch.no_grad(), device:
        new, old = (torch.empty(1, 20, CHUNK, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
        held = device.memory.now
        device.mark()
        relative_change(new, old)
    assert device.memory.peak - held <= 5 * 4 * CHUNK  # a layer's size is twenty times 2 bytes


@functools.cache
def tiny() -> rehearse.Rehearsal:
    model = published.Published(**{**vars(WAN), "config": {**WAN.config, **TINY}})
    return rehearse.rehearse(
        model, published.configs(), width=64, height=64, frames=9, steps=20, device=device_named("h100")
    )


def test_a_rehearsal_says_what_a_real_run_reports() -> None:
    made = tiny()
    pipe = published.Published(**{**vars(WAN), "config": {**WAN.config, **TINY}}).build("cpu")
    pipe.transformer.float()
    call = {k: v.float() for k, v in WAN.embeddings(pipe.transformer, "cpu").items()}
    config = published.configs()["schedule"]
    session = unicp.accelerate(pipe, config)
    pipe(height=64, width=64, num_frames=9, num_inference_steps=20, output_type="latent", **WAN.call, **call)
    report = session.report()
    figures = made.methods["schedule"]
    assert sum(figures.operations.values()) == report.operations
    assert sum(made.plain.operations.values()) == report.all_operations
    assert figures.computed_fraction == report.computed_fraction
    assert figures.computed_steps == report.computed_steps
    assert figures.timeline == report.timeline()
    assert set(json.loads(json.dumps(made.to_dict()))["methods"]) == set(published.configs())


def test_unicp_keeps_to_its_bytes() -> None:
    whole = tiny().methods["unicp, all"]
    limit = whole.kept_bytes // 3
    chosen = unicp.UniCPConfig(target_speedup=2, pcas=False, max_cache_bytes=limit, correct=False)
    model = published.Published(**{**vars(WAN), "config": {**WAN.config, **TINY}})
    made = rehearse.rehearse(
        model, {"limited": chosen}, width=64, height=64, frames=9, steps=20, device=device_named("a100")
    ).methods["limited"]
    assert 0 < made.kept_bytes <= limit
    assert made.computed_fraction < 1  # those that are kept are filled more often, for the speed that is asked for
    assert any("units are kept" in note for note in made.notes)
    with pytest.raises(UnicpError, match="max_cache_bytes=1: the smallest output"):
        rehearse.rehearse(
            model, {"limited": chosen.replace(max_cache_bytes=1)}, width=64, height=64, frames=9, steps=20,
            device=device_named("a100"),
        )  # fmt: skip


def test_operations_of_wan_14b_at_720p_are_those_of_the_hand_calculation() -> None:
    """docs/rehearsal.md has it in words."""
    model = published.published("wan-14b")
    made = rehearse.rehearse(
        model, {"schedule": unicp.ScheduleConfig(interval=2)}, width=1280, height=720, frames=81, steps=4,
        device=device_named("h100"),
    )  # fmt: skip
    tokens, width, layers, text, mlp = 21 * 45 * 80, 5120, 40, 512, 13824
    attention = 4 * 2 * tokens * width**2 + 4 * tokens**2 * width
    cross = 2 * 2 * tokens * width**2 + 2 * 2 * text * width**2 + 4 * tokens * text * width
    call = layers * (attention + cross + 4 * tokens * width * mlp)
    counted = sum(made.plain.operations.values())
    assert counted == pytest.approx(4 * 2 * call, rel=0.02)
    assert made.plain.operations["self-attention"] == 4 * 2 * layers * attention


def folder(path: Path, family: str) -> Any:
    """A tiny pipeline's configuration in a folder, without weights; returns the pipeline."""
    pipe = FAMILIES[family].build()
    pipe.save_config(path)
    for name in ("transformer", "transformer_2", "vae"):
        if hasattr(getattr(pipe, name, None), "save_config"):
            getattr(pipe, name).save_config(path / name)
    pipe.scheduler.save_config(path / "scheduler")
    return pipe


@pytest.mark.parametrize("family", ["wan", "wan2.2", "ltx", "cogvideox", "hunyuan-video", "mochi", "ltx2"])
def test_a_folder_without_weights_is_rehearsed_as_it_is_configured(family: str, tmp_path: Path) -> None:
    pipe = folder(tmp_path, family)
    model = local(str(tmp_path))
    assert len(FAMILIES[family].denoisers) == model.denoisers
    built = model.build(DEVICE)
    assert type(built) is type(pipe)
    shapes = {name: p.shape for name, p in pipe.transformer.named_parameters()}
    assert {name: p.shape for name, p in built.transformer.named_parameters()} == shapes
    schedulers = [{k: v for k, v in p.scheduler.config.items() if k[0] != "_"} for p in (built, pipe)]
    assert schedulers[0] == schedulers[1]
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".safetensors"]
    made = rehearse.rehearse(
        model, {"schedule": unicp.ScheduleConfig(interval=2)}, width=64, height=64, frames=9, steps=8,
        device=device_named("h100"), pipe=built,
    )  # fmt: skip
    assert 0.4 < made.methods["schedule"].computed_fraction < 0.9


def test_a_pipeline_can_be_rehearsed_again_at_another_size(tmp_path: Path) -> None:
    """Mochi's attention reads masks, so that it runs each time: an earlier rehearsal must not answer for it."""
    folder(tmp_path, "mochi")
    model = local(str(tmp_path))
    pipe = model.build(DEVICE)
    configs = {"schedule": unicp.ScheduleConfig(interval=2), "again": unicp.ScheduleConfig(interval=2)}
    for size in (64, 96):
        made = rehearse.rehearse(
            model, configs, width=size, height=size, frames=9, steps=8, device=device_named("h100"), pipe=pipe
        )
        assert made.methods["again"].operations == made.methods["schedule"].operations
        assert made.methods["again"].operations["self-attention"] > 0
        assert made.methods["again"].speedup == pytest.approx(made.methods["schedule"].speedup)


def test_the_folder_of_a_transformer_alone_and_its_file_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder(tmp_path, "wan")
    said = []
    for path in (tmp_path, tmp_path / "transformer", tmp_path / "transformer" / "config.json"):
        asked = ["--size", "64x64", "--frames", "9", "--steps", "8", "--method", "schedule", "--set", "interval=2"]
        assert cli.main(["rehearse", "--model", str(path), *asked, "--json"]) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert [each["model"] for each in said] == [
        str(tmp_path), str(tmp_path / "transformer"), str(tmp_path / "transformer" / "config.json")
    ]  # fmt: skip
    assert said[0]["plain"]["operations"] == said[1]["plain"]["operations"] == said[2]["plain"]["operations"]


def no_pipeline(path: Path) -> None:
    path.mkdir()


def no_json(path: Path) -> None:
    folder(path, "wan")
    (path / "transformer" / "config.json").write_text("{")


def no_class(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')


def other_pipeline(path: Path) -> None:
    folder(path, "latte")


def no_second(path: Path) -> None:
    folder(path, "wan2.2")
    (path / "transformer_2" / "config.json").unlink()


def unlike(path: Path) -> None:
    folder(path, "wan2.2")
    config = json.loads((path / "transformer_2" / "config.json").read_text())
    (path / "transformer_2" / "config.json").write_text(json.dumps({**config, "num_layers": 7}))


def of_images(path: Path) -> None:
    folder(path, "wan")
    config = json.loads((path / "transformer" / "config.json").read_text())
    (path / "transformer" / "config.json").write_text(json.dumps({**config, "in_channels": 36}))


def no_scheduler(path: Path) -> None:
    folder(path, "wan")
    (path / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "NoSuchScheduler"}')


def too_small(path: Path) -> None:
    folder(path, "wan")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (None, "there is no folder {path}"),
        (no_pipeline, "{path} has no transformer/config.json"),
        (no_json, "transformer/config.json is no JSON"),
        (no_class, "config.json names no class"),
        (other_pipeline, "{path} is a LatteTransformer3DModel in a LattePipeline, which cannot be rehearsed"),
        (no_second, "cannot read {path}/transformer_2/config.json"),
        (unlike, "transformer and transformer_2 of {path} differ"),
        (of_images, "the transformer of {path} takes in_channels=36"),
        (no_scheduler, "{path} needs NoSuchScheduler, which diffusers"),
        (too_small, "{path} does not run at 63x64"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(
    make: Callable[[Path], None] | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model"
    if make is not None:
        make(path)
    assert cli.main(["rehearse", "--model", str(path), "--size", "63x64", "--frames", "9", "--steps", "2"]) == 2
    assert said.format(path=path) in capsys.readouterr().err.replace("\n", " ")


def test_open_sora_without_the_zoo_says_where_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in an installed wheel."""
    monkeypatch.setitem(sys.modules, "zoo", None)
    monkeypatch.delitem(sys.modules, "zoo.open_sora", raising=False)
    assert cli.main(["rehearse", "--model", "open-sora"]) == 2
    assert "in the root folder of a checkout" in capsys.readouterr().err.replace("\n", " ")


def test_a_limit_by_memory_leaves_room_for_weights_and_activations() -> None:
    model = published.Published(**{**vars(WAN), "config": {**WAN.config, **TINY}})
    size = {"width": 64, "height": 64, "frames": 9, "steps": 20, "device": device_named("h100")}
    asked = unicp.UniCPConfig(target_speedup=2, pcas=False)
    free = rehearse.rehearse(model, {"unicp": asked}, **size)  # type: ignore[arg-type]
    kept = free.methods["unicp"].kept_bytes
    memory = free.weights_bytes + free.plain.peak_bytes + kept // 2
    made = rehearse.rehearse(model, {"unicp": asked}, memory=memory, **size)  # type: ignore[arg-type]
    (name,) = set(made.methods) - {"unicp"}
    limited = made.methods[name]
    assert made.methods["unicp"] == free.methods["unicp"]
    assert 0 < limited.kept_bytes < kept
    assert made.weights_bytes + limited.peak_bytes <= memory
    assert limited.computed_fraction < 0.9
    with pytest.raises(UnicpError, match="without any method"):
        rehearse.rehearse(model, {}, memory=free.weights_bytes, **size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "wan-99b"], "unknown model 'wan-99b'"),
        (["--model", "wan-14b", "--gpu", "abacus"], "--gpu takes"),
        (["--model", "wan-14b", "--set", "interval=2"], "needs a --method"),
        (["--model", "wan-14b", "--method", "none"], "always shown"),
    ],
)
def test_the_command_line_refuses_what_it_cannot_do(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["rehearse", *arguments]) == 2
    assert said in capsys.readouterr().err.replace("\n", " ")


def test_where_there_is_no_accelerator_torch_need_not_be_new_enough_to_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def old() -> Any:  # as in torch 2.6
        raise RuntimeError("Cannot access accelerator device when none is available.")

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", old)
    assert accelerator() is None
