"""Configs: every field is checked, and the message names the value."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

import unicp
from unicp.policies import Config, config_from_dict, config_types

NAN, INF = float("nan"), float("inf")

BAD: dict[type[Config], dict[str, list[Any]]] = {
    unicp.AdaCacheConfig: {
        "codebook": [
            "opensora",
            "",
            None,
            5,
            (),
            (0.1, 0.2),
            ((0.1,),),
            ((0.1, 2, 3),),
            ((0.1, 0),),
            ((0.1, -1),),
            ((0.1, 1.5),),
            ((0.1, "2"),),
            ((0.1, True),),
            ((-0.1, 2), (1.0, 1)),
            ((NAN, 2),),
            (("0.1", 2),),
            ((0.2, 2), (0.1, 3)),
            ((0.1, 2), (0.1, 3)),
        ],
        "rescale": ["yes", 1, None],
        "correct": ["yes", 1, None],
        "moreg": ["off", 0, None],
        "moreg_form": ["mean", None, 3],
        "moreg_scale": [0, -1, NAN, "1", None, True],
        "moreg_power": [0, -2, NAN, "8", None],
        "moreg_gradient": [-1, NAN, "10", None],
        "moreg_window": [(0.1,), (0.9, 0.1), (-0.1, 0.5), (0.5, 1.1), (NAN, 0.5), 0.5, None, "ab", (0.1, 0.5, 0.9)],
        "moreg_strides": [(), (0,), (1.5,), (-1,), ("1",), 1, None, "12"],
        "metric_location": ["middle", None, 3],
        "metric_kind": ["attention", None, 3],
        "guidance": ["both", None],
        "fill": ["reuse", None],
        "damping": [-0.1, 1.1, NAN, "1", None],
        "warmup_steps": [0, -1, 1.5, NAN, "2", None, True],
        "cooldown_steps": [-1, 1.5, "2", None, True],
    },
    unicp.ScheduleConfig: {
        "compute": [(), (3, 1), (1, 1), (-1,), (1.5,), ("1",), "123", 5, (True,)],
        "interval": [0, -1, 1.5, NAN, "2", True],
        "warmup_steps": [0, -1, 1.5, "2", None],
        "fill": ["cubic", None, 1],
        "damping": [-0.1, 1.1, NAN, None],
        "unit": ["block", None],
    },
    unicp.BudgetConfig: {
        "profile": [3, ("a",), True],
        "target_speedup": [INF, 0.9, -1, NAN, "2", True],
        "min_psnr": [INF, -1, NAN, "30", True],
        "correct": ["yes", 1, None],
        "override_reserve": [-0.1, 1.1, NAN, "0.1", True],
        "leap": [-0.1, 1.1, "no", None],
        "override_zscore": [0, -1, NAN, "3", None],
        "warmup_steps": [0, -1, 1.5, "2", True],
        "cooldown_steps": [-1, 1.5, "2", True],
    },
    unicp.UniCPConfig: {
        "profile": [3, ("a",), True],
        "delta": [-0.1, NAN, "0.1", None, True],
        "delta_cross": [-0.1, NAN, "0.1", True],
        "delta_mlp": [-0.1, NAN, "0.1", True],
        "delta_prune": [-0.1, NAN, "0.1", None, True],
        "max_window": [0, -1, 1.5, NAN, "2", None, True],
        "max_cache_bytes": [0, -1, 1.5, NAN, "2", True],
        "warmup_steps": [0, -1, 1.5, "2", None, True],
        "cooldown_steps": [-1, 1.5, "2", None, True],
        "edcw": ["offline", None, True],
        "pcas": ["yes", 1, None],
        "windows": ["all", 1, None],
        "fill": ["linear", None, True],
        "damping": [-0.1, 1.1, NAN, None],
        "correct": ["yes", 1, None],
        "target_speedup": [INF, 0.9, -1, NAN, "2", True],
        "dws": ["mix", "blend", None, True],
        "refresh_from_sliced": ["yes", 1, None],
        "map_level": ["yes", 1, None],
        "map_bytes": [-1, 1.5, "2", None, True],
        "statistic": ["median", None],
        "storage": ["int4", None, 8],
        "stack": ["adacache", 3],
    },
}


def _base(kind: type[Config], field: str) -> dict[str, Any]:
    return {"interval": 2} if kind is unicp.ScheduleConfig and field not in ("compute", "interval") else {}


def _parts(value: Any) -> list[Any]:
    """A value and everything in it: a message names the part that is wrong."""
    inside = [part for item in value for part in _parts(item)] if isinstance(value, tuple) else []
    return [value, *inside]


@pytest.mark.parametrize("kind", config_types().values(), ids=list(config_types()))
def test_every_field_has_bad_values_here(kind: type[Config]) -> None:
    assert set(BAD.get(kind, {})) == {field.name for field in dataclasses.fields(kind)}
    assert all(BAD[kind].values())


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        pytest.param(kind, field, value, id=f"{kind.method}-{field}-{value!r}")
        for kind, fields in BAD.items()
        for field, values in fields.items()
        for value in values
    ],
)
def test_bad_values_are_refused_by_name(kind: type[Config], field: str, value: Any) -> None:
    fields = {**_base(kind, field), field: value}
    for make in (lambda: kind(**fields), lambda: config_from_dict({"method": kind.method, **fields})):
        with pytest.raises(unicp.UnicpError) as error:
            make()
        message = str(error.value)
        assert "\n" not in message
        assert len(message) < 300
        assert field in message
        assert any(repr(part) in message for part in _parts(value)), message


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: unicp.ScheduleConfig(), ["compute=", "interval="]),
        (lambda: unicp.ScheduleConfig(compute=(1,), interval=2), ["exactly one"]),
        (lambda: unicp.ScheduleConfig(interval=2, unit="stack", fill="linear"), ["'linear'", "stack"]),
        (lambda: unicp.AdaCacheConfig().replace(codebok=((1.0, 1),)), ["'codebok'", "Did you mean 'codebook'?"]),
        (lambda: config_from_dict({"method": "adacache", "codebok": 1}), ["'codebok'", "Did you mean 'codebook'?"]),
        (lambda: config_from_dict({"method": "adacash"}), ["'adacash'", "Did you mean 'adacache'?"]),
        (lambda: config_from_dict({"method": None}), ["None"]),
        (lambda: config_from_dict({"method": ["adacache"]}), ["['adacache']"]),
        (lambda: config_from_dict({"interval": 2}), ["method"]),
        (lambda: config_from_dict([]), ["method", "[]"]),  # type: ignore[arg-type]
        (lambda: config_from_dict({"method": "schedule", "interval": {"a": 1}}), ["interval", "{'a': 1}"]),
    ],
)
def test_what_else_is_refused(make: Any, said: list[str]) -> None:
    with pytest.raises(unicp.UnicpError) as error:
        make()
    assert all(part in str(error.value) for part in said), str(error.value)


@pytest.mark.parametrize("kind", config_types().values(), ids=list(config_types()))
def test_configs_are_frozen_and_keyword_only(kind: type[Config]) -> None:
    config = kind(**_base(kind, ""))
    for field in dataclasses.fields(kind):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, getattr(config, field.name))
        assert field.kw_only
        assert field.name in (kind.__doc__ or ""), f"{field.name} is not documented"
    changed = config.replace(warmup_steps=4)
    assert (config.warmup_steps, changed.warmup_steps) == (kind(**_base(kind, "")).warmup_steps, 4)
    hash(config)


def test_lists_become_tuples() -> None:
    config = unicp.AdaCacheConfig(codebook=[[0.1, 2], [1.0, 1]], moreg_strides=[1, 2])  # type: ignore[arg-type]
    assert config.codebook == ((0.1, 2), (1.0, 1))
    assert config.moreg_strides == (1, 2)
    assert unicp.ScheduleConfig(compute=[0, 5]).compute == (0, 5)  # type: ignore[arg-type]
    assert unicp.ScheduleConfig(compute=range(3)).compute == (0, 1, 2)  # type: ignore[arg-type]
    assert json.loads(config.to_json())["codebook"] == [[0.1, 2], [1.0, 1]]


def test_defaults_are_the_references() -> None:
    config = unicp.AdaCacheConfig()
    assert (config.moreg_scale, config.moreg_power, config.moreg_gradient) == (0.385, 8.0, 10.0)
    assert (config.moreg_window, config.moreg_strides, config.moreg_form) == ((0.1, 0.9), (1,), "reference")
    assert (config.warmup_steps, config.cooldown_steps) == (2, 2)
    assert (config.metric_location, config.metric_kind, config.guidance) == ("mid", "self_attention", "shared")
    assert (config.fill, config.moreg) == ("residual", False)
