"""Every video transformer of the installed diffusers is described by a spec, or listed with the reason why not."""

from __future__ import annotations

import ast
import functools
import json
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import unicp
from tests.contract import case
from tests.coverage import PATH, covered
from tests.family import OLDER
from tests.tiny import FAMILIES
from unicp import specs
from unicp.specs import BlockList, ModelSpec, find_spec, known_specs
from unicp.specs.discovery import discover
from unicp.specs.unsupported import UNSUPPORTED

ROOT = Path(diffusers.__file__).parent
RESIDUAL = case("adacache-residual").config
CALLS = {"num_frames", "video_length", "frames"}  # what a pipeline that makes videos is asked for


@functools.cache
def _video_transformers(folder: Path) -> set[str]:
    """Classes named for video, and those that pipelines use which are asked for frames. Nothing is imported."""
    found = set()
    for path in sorted((folder / "models" / "transformers").glob("*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            model = isinstance(node, ast.ClassDef) and any("ModelMixin" in ast.unparse(base) for base in node.bases)
            if model and re.search("3D(?!iT)|Video", node.name):
                found.add(node.name)
    for path in sorted((folder / "pipelines").rglob("pipeline_*.py")):
        source = path.read_text("utf-8")
        if not any(name in source for name in CALLS):
            continue
        for node in ast.parse(source).body:
            methods = {part.name: part for part in getattr(node, "body", []) if isinstance(part, ast.FunctionDef)}
            if not {"__init__", "__call__"} <= methods.keys():
                continue
            call, init = methods["__call__"].args, methods["__init__"].args
            if CALLS & {argument.arg for argument in (*call.args, *call.kwonlyargs)}:
                denoisers = [a.annotation for a in init.args if a.arg in ("transformer", "transformer_2")]
                found |= {n for a in denoisers if a for n in re.findall(r"\w+Transformer\w*", ast.unparse(a))}
    return found


def test_every_video_transformer_of_diffusers_is_accounted_for() -> None:
    found = _video_transformers(ROOT)
    assert len(found) > 20
    missing = found - known_specs().keys() - UNSUPPORTED.keys()
    assert not missing, f"neither a spec nor a reason in specs/unsupported.py: {sorted(missing)}"


@pytest.mark.skipif(OLDER, reason="what is listed is in the pinned diffusers")
def test_nothing_is_listed_twice_or_in_vain() -> None:
    assert not known_specs().keys() & UNSUPPORTED.keys()
    gone = UNSUPPORTED.keys() - _video_transformers(ROOT)
    assert not gone, f"diffusers has these no longer: {sorted(gone)}"
    assert all(reason for reason in UNSUPPORTED.values())


def test_an_unknown_transformer_would_be_named(tmp_path: Path) -> None:
    (tmp_path / "models" / "transformers").mkdir(parents=True)
    (tmp_path / "pipelines" / "new").mkdir(parents=True)
    model = "class NewTransformer3DModel(ModelMixin): ...\nclass NewTransformer2DModel(ModelMixin): ...\n"
    (tmp_path / "models" / "transformers" / "new.py").write_text(model)
    pipeline = (
        "class NewPipeline:\n"
        "    def __init__(self, transformer: OmniTransformer | None): ...\n"
        "    def __call__(self, prompt, num_frames=81): ...\n"
        "class ImagePipeline:\n"
        "    def __init__(self, transformer: FlatTransformer): ...\n"
        "    def __call__(self, prompt): ...\n"
    )
    (tmp_path / "pipelines" / "new" / "pipeline_new.py").write_text(pipeline)
    assert _video_transformers(tmp_path) == {"NewTransformer3DModel", "OmniTransformer"}


def test_what_was_tested_is_what_the_contract_is_run_for() -> None:
    assert specs.tested() == covered(), "run: python -m tests.coverage"
    assert json.loads(PATH.read_text("utf-8")) == specs.tested()
    assert specs.tested().keys() == known_specs().keys(), (
        "a spec that the contract is not run for must not be registered"
    )


# --- structural discovery -------------------------------------------------------------------------------------------


class Block(torch.nn.Module):
    def __init__(self, into: int = 8, out: int = 8, pair: bool = False) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(into, out)
        self.pair = pair

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        out = torch.tanh(self.linear(x) + temb)
        return (out, x) if self.pair else out


class Unknown(torch.nn.Module):
    """A denoiser that nobody described: its blocks lie in a submodule."""

    def __init__(self, *blocks: Block) -> None:
        super().__init__()
        self.embed = torch.nn.ModuleList([torch.nn.Linear(4, 8), torch.nn.Linear(8, 8)])
        self.body = torch.nn.Module()
        self.body.layers = torch.nn.ModuleList(blocks)
        self.out = torch.nn.Linear(8, 4)
        self.eval()

    def forward(self, sample: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        for layer in self.embed:
            sample = layer(sample)
        for block in self.body.layers:
            sample = block(sample, temb=t.reshape(-1, 1, 1))
            sample = sample[0] if isinstance(sample, tuple) else sample
        return self.out(sample)


def _run(model: torch.nn.Module) -> list[torch.Tensor]:
    x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1))
    outputs = []
    with torch.no_grad():
        for t in torch.linspace(1, 0.1, 10):
            outputs.append(model(x, t))
            x = x - 0.1 * outputs[-1]
    return outputs


@pytest.mark.parametrize("config", [unicp.AdaCacheConfig(), unicp.ScheduleConfig(interval=2, unit="stack")])
def test_an_unknown_model_is_found_by_its_structure(config: unicp.Config) -> None:
    torch.manual_seed(0)
    model = Unknown(*(Block() for _ in range(4)))
    assert find_spec(model) is None
    spec = discover(model)
    assert spec is not None
    assert [name for name, *_ in spec.stack(model)] == [f"body.layers.{i}" for i in range(4)]
    assert (spec.hidden, spec.timestep, spec.block_lists[0].streams) == ("sample", "t", ("x",))
    plain = _run(model)
    if isinstance(config, unicp.AdaCacheConfig):
        config = config.replace(codebook=((1e6, 3),))
    session = unicp.accelerate(model, config)
    reused = _run(model)
    actions = [record.action for record in session.report().steps]
    assert actions.count("reuse") >= 3
    assert not all(torch.equal(a, b) for a, b in zip(plain, reused, strict=True))
    session.restore()
    assert all(torch.equal(a, b) for a, b in zip(_run(model), plain, strict=True))


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        (
            [Block(), Block(8, 16), Block(16, 8)],
            r"'body.layers.1' of Unknown took x of shape \(2, 6, 8\) .*\(2, 6, 16\)",
        ),
        ([Block(), Block(), Block(pair=True)], r"'body.layers.2' .* returned \(2, 6, 8\) and \(2, 6, 8\)"),
    ],
    ids=["another-shape", "two-tensors"],
)
def test_blocks_that_cannot_be_passed_over_are_named(blocks: list[Block], said: str) -> None:
    model = Unknown(*blocks)
    plain = _run(model)
    session = unicp.accelerate(model, unicp.AdaCacheConfig())
    with pytest.raises(unicp.UnicpError, match=said):
        _run(model)
    session.restore()
    assert all(torch.equal(a, b) for a, b in zip(_run(model), plain, strict=True))


def test_a_residual_that_cannot_be_taken_is_named() -> None:
    model = Unknown(Block(), Block(8, 16), Block(16, 8))
    unicp.accelerate(model, unicp.AdaCacheConfig(fill="forecast"))  # nothing acts on the blocks, they are measured
    with pytest.raises(unicp.UnicpError, match=r"body\.layers.* begins as \(2, 6, 8\) and ends as \(2, 6, 16\)"):
        _run(model)


def test_what_has_no_main_list_of_blocks_is_not_found() -> None:
    assert discover(Unknown(Block(), Block())) is None  # its other layers are larger
    assert discover(torch.nn.Linear(4, 4)) is None
    two = torch.nn.Module()
    two.a = torch.nn.ModuleList([Block(), Block()])
    two.b = torch.nn.ModuleList([Block(), Block()])
    assert discover(two) is None
    with pytest.raises(unicp.UnicpError, match="the structure of Unknown is not known"):
        unicp.accelerate(Unknown(Block(), Block()), unicp.UniCPConfig())  # it needs attention modules


def test_a_unit_that_runs_twice_in_a_step_is_named() -> None:
    model = Unknown(*(Block() for _ in range(3)))
    for block in model.body.layers:
        block.forward = lambda x, temb, linear=block.linear: linear(linear(x)) + temb
    lists = BlockList(path="body.layers", streams=("x",), units={"linear": "mlp"})
    spec = ModelSpec(
        family="twice", classes=(), block_lists=(lists,), frames=lambda *_: 1, timestep="t", hidden="sample"
    )
    unicp.accelerate(model, unicp.UniCPConfig(pcas=False, delta_mlp=0.5), spec=spec)
    with pytest.raises(unicp.UnicpError, match=r"body\.layers\.0\.linear runs twice"):
        _run(model)


# --- the guide ------------------------------------------------------------------------------------------------------


def test_the_guides_ten_lines_work(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = Path(__file__).resolve().parent.parent / "docs" / "adding-a-model.md"
    code = re.findall(r"```python\n(.*?)```", guide.read_text("utf-8"), re.DOTALL)[0]
    known_specs()
    monkeypatch.setattr(specs, "_SPECS", dict(specs._SPECS))  # what the guide registers is forgotten
    pipe = FAMILIES["wan"].build()
    pipe.transformer.__class__ = type("MyTransformer3DModel", (type(pipe.transformer),), {})
    names: dict[str, Any] = {"pipe": pipe}
    exec(code, names)
    assert names["session"]._hooked[0].spec.family == "mine"
    for config in (RESIDUAL, unicp.UniCPConfig(delta=0.5, delta_mlp=0.5, pcas=False)):
        session = unicp.accelerate(pipe, config)
        FAMILIES["wan"].generate(pipe, steps=20)
        assert {record.action for record in session.report().steps} & {"reuse", "partial"}
