"""``accelerate``, ``restore``, ``Session``: what they take, refuse, warn of, and leave alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import unicp
from tests.contract import PRIMARY, actions, case, fresh, plain, quietly, traces
from tests.family import OLDER
from tests.tiny import FAMILIES, denoisers
from unicp.specs import BlockList, ModelSpec, find_spec

families = pytest.mark.parametrize("family", PRIMARY)
RESIDUAL = case("adacache-residual").config
SCHEDULE = case("schedule-linear").config


# --- warnings -------------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("name", ["adacache-residual", "schedule-linear"])
def test_a_config_that_never_acts_warns_once(family: str, name: str) -> None:
    chosen = FAMILIES[family]
    pipe = chosen.build()
    session = unicp.accelerate(pipe, case(name).always_compute)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            chosen.generate(pipe)
        assert len(session.reports) == 2
    messages = [str(w.message) for w in caught if issubclass(w.category, unicp.UnicpWarning)]
    assert len(messages) == 1
    assert session.config.method in messages[0]
    assert "never acted" in messages[0]
    assert ("threshold" if name.startswith("adacache") else "interval") in messages[0]
    for report in session.reports:  # each says it
        assert any(note.startswith("nothing was skipped: ") and note[21:] in messages[0] for note in report.notes)


def test_a_short_run_says_why_it_never_acted() -> None:
    pipe = FAMILIES["wan"].build()
    unicp.accelerate(pipe, RESIDUAL)
    with pytest.warns(unicp.UnicpWarning, match="too short"):
        FAMILIES["wan"].generate(pipe, steps=4)


def test_a_run_that_broke_off_is_no_reason_to_warn() -> None:
    pipe = FAMILIES["wan"].build()
    session = unicp.accelerate(pipe, RESIDUAL)

    def callback(_: Any, i: int, *__: Any) -> dict[str, Any]:
        raise RuntimeError

    with warnings.catch_warnings():
        warnings.simplefilter("error", unicp.UnicpWarning)
        with pytest.raises(RuntimeError):
            FAMILIES["wan"].generate(pipe, callback=callback)
        assert not session.report().complete
        session.restore()  # the end of it, at last
    assert len(session.reports) == 1


@families
def test_a_report_in_the_middle_of_a_run_leaves_it_alone(family: str) -> None:
    chosen = FAMILIES[family]
    pipe = chosen.build()
    session = unicp.accelerate(pipe, RESIDUAL)
    seen: list[tuple[int, int, int]] = []

    def callback(_: Any, i: int, *__: Any) -> dict[str, Any]:
        report = session.report()
        assert report.complete == (i == 9)
        assert list(report.steps) == list(session.report().steps)
        seen.append((len(report.steps), len(session.records), len(session.reports)))
        return {}

    latents = chosen.generate(pipe, callback=callback)
    calls = len(chosen.branches)
    # With the last step, the video is over: it has become a report.
    assert seen == [(calls * i, calls * i, 0) for i in range(1, 10)] + [(calls * 10, 0, 1)]
    expected = fresh(family, "adacache-residual")
    assert torch.equal(latents, expected[0])
    assert actions(session.report()) == expected[1]


def test_a_warning_made_an_error_leaves_the_model_right() -> None:
    chosen = FAMILIES["wan"]
    pipe = chosen.build()
    session = unicp.accelerate(pipe, case("adacache-residual").always_compute)
    with warnings.catch_warnings():
        warnings.simplefilter("error", unicp.UnicpWarning)
        with pytest.raises(unicp.UnicpWarning):
            chosen.generate(pipe)
        assert torch.equal(chosen.generate(pipe), plain("wan"))
    assert len(session.reports) == 2


# --- two at once ----------------------------------------------------------------------------------------------------


@families
def test_two_pipelines_do_not_see_each_other(family: str) -> None:
    """The second one makes a whole video, with another config and request, between two steps of the first."""
    chosen = FAMILIES[family]
    one, two = chosen.build(), chosen.build()
    session_one, session_two = unicp.accelerate(one, RESIDUAL), unicp.accelerate(two, SCHEDULE)
    nested: list[torch.Tensor] = []

    def callback(_: Any, i: int, *__: Any) -> dict[str, Any]:
        if i in (2, 5):
            nested.append(chosen.generate(two, steps=7, prompts=(1, 2)))
        return {}

    latents = chosen.generate(one, callback=callback)
    expected = fresh(family, "adacache-residual")
    assert torch.equal(latents, expected[0])
    assert actions(session_one.report()) == expected[1]
    expected = fresh(family, "schedule-linear", steps=7, prompts=(1, 2))
    assert all(torch.equal(other, expected[0]) for other in nested)
    assert [actions(report) for report in session_two.reports] == [expected[1]] * 2
    session_one.restore()
    assert torch.equal(chosen.generate(two), fresh(family, "schedule-linear")[0])
    assert torch.equal(chosen.generate(one), plain(family))


def test_classes_are_left_alone() -> None:
    chosen = FAMILIES["wan"]
    pipe, other = chosen.build(), chosen.build()
    kinds = {type(module) for module in pipe.transformer.modules()} | {type(pipe)}
    before = {kind: dict(vars(kind)) for kind in kinds}
    unicp.accelerate(pipe, RESIDUAL)
    chosen.generate(pipe)
    assert all(dict(vars(kind)) == before[kind] for kind in kinds)
    assert torch.equal(chosen.generate(other), plain("wan"))


def test_two_denoisers_have_states_of_their_own() -> None:
    chosen = FAMILIES["wan2.2"]
    pipe = chosen.build()
    session = unicp.accelerate(pipe, RESIDUAL)
    chosen.generate(pipe)
    report = session.report()
    assert len(session.reports) == 1
    of = {name: [r for r in report.steps if r.denoiser == name] for name in chosen.denoisers}
    assert [r.index for r in of["transformer"]] == [i for i in range(5) for _ in "cu"]
    assert [r.index for r in of["transformer_2"]] == [i for i in range(5, 10) for _ in "cu"]
    # Each warms up on its own, and its first step has nothing to compare with.
    for records in of.values():
        assert [r.action for r in records[:4]] == ["compute"] * 4
        assert records[0].metric is None
        assert records[2].metric is not None
        assert "reuse" in {r.action for r in records}


# --- a module alone -------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("name", ["adacache-residual", "adacache-forecast", "schedule-linear"])
def test_the_transformer_alone(family: str, name: str) -> None:
    chosen = FAMILIES[family]
    pipe = chosen.build()
    session = unicp.accelerate(pipe.transformer, case(name).config)
    first, second = quietly(lambda: (chosen.generate(pipe), chosen.generate(pipe)))
    assert torch.equal(first, second)
    assert not torch.equal(first, plain(family))
    reports = session.reports
    assert len(reports) == 2
    assert actions(reports[0]) == actions(reports[1])
    assert {r.action for r in reports[0].steps} > {"compute"}
    assert {r.branch for r in reports[0].steps} == set(chosen.branches)
    # Wan's pipeline says all there is to know through cache_context, but for what its solver makes of the outputs: of
    # a transformer alone, forecasts are not corrected.
    if family == "wan" and not OLDER and not session._hooked[0].needs.correct:
        assert torch.equal(first, fresh(family, name)[0])
    unicp.restore(pipe.transformer)
    assert torch.equal(chosen.generate(pipe), plain(family))


# --- replacing and restoring ----------------------------------------------------------------------------------------


@families
def test_the_last_config_counts(family: str) -> None:
    chosen = FAMILIES[family]
    pipe = chosen.build()
    old = unicp.accelerate(pipe, SCHEDULE)
    new = unicp.accelerate(pipe, RESIDUAL)
    assert torch.equal(chosen.generate(pipe), fresh(family, "adacache-residual")[0])
    assert old.reports == []
    old.restore()  # a stale session takes nothing away from the new one
    assert torch.equal(chosen.generate(pipe), fresh(family, "adacache-residual")[0])
    assert len(new.reports) == 2
    unicp.restore(pipe)
    unicp.restore(pipe)
    assert torch.equal(chosen.generate(pipe), plain(family))
    assert len(new.reports) == 2


def test_a_session_restores_on_leaving() -> None:
    chosen = FAMILIES["wan"]
    pipe = chosen.build()
    before = traces(pipe.transformer)
    with pytest.raises(ZeroDivisionError), unicp.accelerate(pipe, RESIDUAL) as session:
        chosen.generate(pipe)
        raise ZeroDivisionError
    assert traces(pipe.transformer) == before
    assert len(session.reports) == 1
    assert torch.equal(chosen.generate(pipe), plain("wan"))


def test_restoring_leaves_no_attribute_on_a_module() -> None:
    """An empty registry of hooks would be copied, saved and walked through by diffusers like any other."""
    pipe = FAMILIES["wan"].build()
    modules = dict(pipe.transformer.named_modules())
    before = {path: set(module.__dict__) for path, module in modules.items()}
    for name in ("schedule-stack", "adacache-residual", "unicp-windows"):
        unicp.accelerate(pipe, case(name).config).restore()
        assert {path: set(module.__dict__) for path, module in modules.items()} == before


def test_restore_in_the_middle_of_a_run() -> None:
    chosen = FAMILIES["wan"]
    pipe = chosen.build()
    session = unicp.accelerate(pipe, RESIDUAL)

    def callback(_: Any, i: int, *__: Any) -> dict[str, Any]:
        if i == 2:
            session.restore()
        return {}

    quietly(lambda: chosen.generate(pipe, callback=callback))
    assert torch.equal(chosen.generate(pipe), plain("wan"))
    assert [r.index for r in session.report().steps] == [0, 0, 1, 1, 2, 2]


# --- what is refused ------------------------------------------------------------------------------------------------


class Blocks(torch.nn.Module):
    """A denoiser unicp does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(3)])

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = torch.tanh(block(hidden_states))
        return hidden_states * timestep.reshape(-1, 1, 1)


def _spec(**fields: Any) -> ModelSpec:
    lists = BlockList(path="blocks", streams=("input",), residuals={"mlp": None})
    return ModelSpec(**{"family": "toy", "classes": (), "block_lists": (lists,), "frames": lambda *_: 1, **fields})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("adacash", ["'adacash'", "adacache", "schedule", "Did you mean 'adacache'?"]),
        ("no/such/profile.safetensors", ["no/such/profile.safetensors", "no profile"]),
        ("x" * 5000, ["unknown method"]),
        ("a\0b", ["unknown method"]),
        (3, ["config", "int"]),
        (None, ["config", "NoneType"]),
        (unicp.AdaCacheConfig, ["config", "type"]),
    ],
)
def test_a_config_that_is_none(config: Any, said: list[str]) -> None:
    pipe = FAMILIES["wan"].build()
    before = traces(pipe.transformer)
    with pytest.raises(unicp.UnicpError) as error:
        unicp.accelerate(pipe, config)
    assert all(part in str(error.value) for part in said), str(error.value)
    assert "\n" not in str(error.value)
    assert traces(pipe.transformer) == before


def test_a_config_by_name_or_profile(tmp_path: Path) -> None:
    pipe = FAMILIES["wan"].build()
    assert unicp.accelerate(pipe, "adacache").config == unicp.AdaCacheConfig()
    unicp.Profile(config=SCHEDULE).save(tmp_path / "plan.safetensors")
    for path in (tmp_path / "plan.safetensors", str(tmp_path / "plan.safetensors")):
        assert unicp.accelerate(pipe, path).config == SCHEDULE


@pytest.mark.parametrize("target", [None, "wan", 3, object()])
def test_a_target_that_is_none(target: Any) -> None:
    for verb in (lambda: unicp.accelerate(target, RESIDUAL), lambda: unicp.restore(target)):
        with pytest.raises(unicp.UnicpError, match=type(target).__name__):
            verb()


def test_a_pipeline_without_a_denoiser() -> None:
    pipe = FAMILIES["wan"].build()
    pipe.transformer = None
    with pytest.raises(unicp.UnicpError, match="WanPipeline has no component named transformer"):
        unicp.accelerate(pipe, RESIDUAL)


def test_an_unknown_denoiser() -> None:
    with pytest.raises(unicp.UnicpError, match=r"Linear.*WanTransformer3DModel.*ScheduleConfig"):
        unicp.accelerate(torch.nn.Linear(4, 4), RESIDUAL)


def test_there_is_no_report_before_the_first_video() -> None:
    session = unicp.accelerate(Blocks(), SCHEDULE)
    assert session.reports == []
    assert session.records == []
    with pytest.raises(unicp.UnicpError, match="generate a video first"):
        session.report()


@pytest.mark.parametrize("fields", [{}, {"fill": "forecast"}])
@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (_spec(block_lists=(BlockList(path="layers", residuals={"mlp": None}),)), "layers"),
        (_spec(block_lists=(BlockList(path="blocks", residuals={"attention": None}),)), "attention, block"),
        (_spec(block_lists=(BlockList(path="blocks", residuals={"mlp": None, "end": "norm9"}),)), "norm9"),
    ],
    ids=["no-such-list", "no-such-residual", "no-such-submodule"],
)
def test_a_spec_that_does_not_fit_leaves_nothing(spec: ModelSpec, said: str, fields: dict[str, str]) -> None:
    model = Blocks()
    before = traces(model)
    with pytest.raises((unicp.UnicpError, AttributeError), match=said):
        unicp.accelerate(model, unicp.AdaCacheConfig(metric_kind="mlp", **fields), spec=spec)
    assert traces(model) == before


def test_a_stream_that_blocks_do_not_take_leaves_nothing() -> None:
    model = Blocks()
    before = traces(model)
    with pytest.raises(unicp.UnicpError, match="'hidden_states'"):
        unicp.accelerate(
            model,
            unicp.ScheduleConfig(interval=2, unit="stack"),
            spec=_spec(block_lists=(BlockList(path="blocks", residuals={"mlp": None}),)),
        )
    assert traces(model) == before


# --- a denoiser of one's own ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [RESIDUAL.replace(metric_kind="mlp"), SCHEDULE, SCHEDULE.replace(fill="reuse")])
def test_a_plain_module_with_a_spec(config: Any) -> None:
    """It returns a tensor, not a tuple, and nobody tells steps or branches: timesteps and the calls' order do."""
    torch.manual_seed(0)
    model = Blocks().eval()
    spec = None if config == SCHEDULE else _spec()

    def run() -> list[torch.Tensor]:
        x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1))
        outputs = []
        with torch.no_grad():
            for t in torch.linspace(1, 0.1, 10):
                outputs += [model(x, t), model(hidden_states=x + 1, timestep=t)]
                x = x - 0.1 * outputs[-2]
        return outputs

    expected = run()
    session = unicp.accelerate(model, config, spec=spec)
    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, expected, strict=True))
    assert len(session.reports) == 2
    assert {r.branch for r in session.report().steps} == {"call 1", "call 2"}
    assert {r.action for r in session.report().steps} > {"compute"}
    session.restore()
    assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))


def test_specs_are_found_by_base_class() -> None:
    class Mine(type(FAMILIES["wan"].build().transformer)):  # type: ignore[misc]
        pass

    assert find_spec(object.__new__(Mine)).family == "wan"
    assert find_spec(Blocks()) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_spec(family: str) -> None:
    chosen = FAMILIES[family]
    for denoiser in denoisers(chosen, chosen.build()):
        spec = find_spec(denoiser)
        assert spec is not None
        assert [module for _, module, _ in spec.stack(denoiser)] == chosen.blocks(denoiser)
        kinds = {kind for blocks in spec.block_lists if blocks.measured for kind in blocks.residuals} | {"block"}
        assert kinds == set(chosen.kinds)
        for name, block, described in spec.blocks(denoiser):
            for path in filter(None, described.residuals.values()):
                assert block.get_submodule(path) is not None, f"{name}.{path}"
