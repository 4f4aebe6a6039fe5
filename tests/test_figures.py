"""Committed figures are small, and say what was measured."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import unicp
from benchmarks import compare, figures
from tests.test_compare import FEW, PROMPTS
from tests.test_house import project_files
from unicp import ScheduleConfig

RESULTS = Path(figures.__file__).parent / "results"
FILES = [path for path in project_files() if path.parent == RESULTS and path.suffix == ".json"]


def test_all_of_them_together_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in project_files() if path.is_relative_to(RESULTS)}
    kept = {name: size for name, size in sizes.items() if not name.endswith(".safetensors")}
    assert sum(kept.values()) <= figures.LIMIT, kept


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_is_written_as_measuring_writes_it(path: Path, tmp_path: Path) -> None:
    again = figures.write(tmp_path / path.name, figures.read(path))
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "value",
    [
        [{"psnr": 1.5, "units": {}, "steps": 25}, {"psnr": 2.5, "units": {}, "steps": 25}],
        [{"a": 1, "b": 2}, {"b": 2, "a": 1}],  # another order of keys is not a table
        [{"a": 1}, {"b": 2}, {}],
        [{}, {}, {}, {}],
        [True, False, True, True],
        [1, True, 1.0, 1],  # equal, but not the same
        [0, 1, 2, 3],
        [False, 1, 2, 3],
        [[13, 96, 96, 3]] * 32,
        [None, None, None, "inf", [], [[]], ""],
        [[34.63, 28.1, -0.25], [120.0, 7.5, 31.07], [34.63, 28.1, -0.25]],
        [0.1 + 0.2, 1e-7, 1e16, 0.25, 0.5, 123456.789012345678, 1 / 3],
        [0.25, -0.0, 0.5, 0.75, 0.125, 0.375, 0.625, 0.875, 0.0625],
        {"of one": {"rows": [{"x": [{"y": 1}, {"y": 2}]}, {"x": [{"y": 3}, {"y": 4}]}]}},
    ],
)
def test_what_is_written_is_read(tmp_path: Path, value: Any) -> None:
    back = figures.read(figures.write(tmp_path / "some.json", {"value": value}))["value"]
    assert back == value and repr(back) == repr(value)


def test_only_figures_of_single_runs_are_rounded(tmp_path: Path) -> None:
    value = {"psnr": math.pi * 10, "speedup": math.pi, "steps": 123456789, "units": {"reuse": 1234567}}
    path = figures.write(tmp_path / "some.json", {"table": [value], "per_prompt": {"adacache": [value, value]}})
    back = figures.read(path)
    assert back["table"] == [value]
    assert back["per_prompt"]["adacache"] == [{**value, "psnr": 31.42, "speedup": 3.1416}] * 2


def test_held_out_captions_are_written_as_their_number(tmp_path: Path) -> None:
    prompts = unicp.demo.prompts(16)
    path = figures.write(tmp_path / "some.json", {"prompts": prompts, "others": prompts[1:]})
    assert '"prompts":{"held_out":16}' in path.read_text() and prompts[15] in path.read_text()
    assert figures.read(path) == {"prompts": prompts, "others": prompts[1:]}


def test_equal_values_in_a_row_are_written_once(tmp_path: Path) -> None:
    names = ["a situation"] * 4 + ["another one"] * 3 + ["a situation"]
    values = {"names": names, "mixed": [1, 1, 1, 1.0, 1.0, True], "short": ["a", "a", "b"]}
    path = figures.write(tmp_path / "some.json", values)
    assert '"runs":[["a situation",4],["another one",3],["a situation",1]]' in path.read_text()
    back = figures.read(path)
    assert back == values and [type(value) for value in back["mixed"]] == [int, int, int, float, float, bool]


def test_decimal_numbers_are_written_without_their_points(tmp_path: Path) -> None:
    values = {"psnr": [[34.6, 28.1, 31.0, 27.5]] + [[33.4, 25.9, 30.2, 26.0], [35.1, 29.9, 31.7, 28.8]] * 4}
    path = figures.write(tmp_path / "some.json", values)
    assert '"psnr":{"decimals":1,"digits":[[346,281,310,275],' in path.read_text()
    assert figures.read(path) == values


@pytest.mark.parametrize(
    "value", [{"decimals": 1, "digits": [2]}, {"columns": []}, [{"count": 1, "all": 2}], {"x": {"bits": "1"}}]
)
def test_what_could_be_misread_is_not_written(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match="a folded list"):
        figures.write(tmp_path / "some.json", {"value": value})
    with pytest.raises(ValueError, match="not JSON compliant"):
        figures.write(tmp_path / "some.json", {"value": math.inf})
    assert not list(tmp_path.iterdir())


def test_a_committed_comparison_says_the_same(pipe: Any, tmp_path: Path) -> None:
    measured = unicp.compare(pipe, [ScheduleConfig(interval=2), "control"], PROMPTS, progress=False, **FEW)
    path = figures.write_comparison(tmp_path / "compare.json", measured)
    read = figures.read_comparison(path)
    assert path.stat().st_size < 0.4 * measured.save(tmp_path / "whole.json").stat().st_size
    assert compare.table(read) == compare.table(measured)
    assert read.prompts == measured.prompts and read.provenance == figures.read(path)["provenance"]
    for row, whole in zip(read.rows(), measured.rows(), strict=True):
        assert row.identical == whole.identical and row.caption == whole.caption
        assert row.total_speedup.value == pytest.approx(whole.total_speedup.value, rel=1e-3)
        assert row.computed_fraction == whole.computed_fraction
    page = read.report(tmp_path / "page.html").read_text()
    assert all(point.label in page for point in measured.points)
    # It can be taken over by a new one, and that can be committed.
    both = compare.joined(replace(measured, points=measured.points[:1]), read)
    assert figures.read_comparison(figures.write_comparison(path, both)).points[1].results[0].beside is not None
