"""Committed figures: small JSON files. Figures of single runs have few significant digits; tables lie by column.

    {"columns": {"psnr": [34.631, 28.119], "steps": [25, 25]}}    a list of objects that have the same keys
    {"all": 0.34, "count": 32}                                     a list of equal values
    {"range": 32}                                                  0, 1, ..., 31
    {"bits": "1101"}                                               true, true, false, true
    {"runs": [["a", 2], ["b", 1]]}                                 "a", "a", "b", where that is shorter
    {"decimals": 2, "digits": [3463, 2812]}                        34.63, 28.12, where that is shorter; of lists, too
    {"held_out": 32}                                               unicp.demo.prompts(32)

:func:`read` undoes all of that but the rounding. What is measured in full, and what measuring goes on from, lies beside
them in files that git ignores.
"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import unicp
from unicp.files.whole import staged

DIGITS = 5
"""Significant ones, of figures of single runs. Means over them are kept exactly: rounded twice, one that lies between
two shown figures could become the other one."""
COARSE = dict.fromkeys(("total_seconds", "motion_ratio", "psnr", "ssim", "lpips"), 4)
"""Of those that stand in tables with three digits at most."""
RUNS = ("per_prompt", "results")
"""Keys of figures of single runs, which are most of the bytes."""
LIMIT = 400_000
"""Bytes that all committed figures may take together."""
MEASURES = ("psnr", "ssim", "lpips", "motion_ratio")
"""What a committed comparison keeps of the quality of each video: what the tables of the docs are made of."""
FORMS = ({"columns"}, {"all", "count"}, {"range"}, {"bits"}, {"runs"}, {"decimals", "digits"}, {"held_out"})
SHORTEST = 3
"""Shorter lists stay as they are, but for tables."""


def write(path: Path, values: dict[str, Any]) -> Path:
    """Write figures, whole or not at all: a line for each key, so that a change shows which part of them changed."""
    rounded = {key: _rounded(value, _digits(key, 0)) for key, value in values.items()}
    lines = (f"{_compact(key)}:{_compact(_folded(value))}" for key, value in rounded.items())
    with staged(path) as part:
        part.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
    return path


def read(path: Path) -> dict[str, Any]:
    """Figures that :func:`write` wrote."""
    return {key: _unfolded(value) for key, value in json.loads(path.read_text("utf-8")).items()}


def write_comparison(path: Path, comparison: unicp.Comparison) -> Path:
    """Write the runs of a comparison; not what follows from them, nor what each denoiser call did."""
    values = comparison.to_dict()
    del values["summary"]
    for point in (values["baseline"], *values["points"]):
        point["observed"] = {name: value for name, value in point["observed"].items() if name != "calls"}
        for result in point["results"]:
            result["quality"] = {name: result["quality"][name] for name in MEASURES if name in result["quality"]}
    return write(path, values)


def read_comparison(path: Path) -> unicp.Comparison:
    return unicp.Comparison.from_dict(read(path))


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _rounded(value: Any, digits: int) -> Any:
    """With so many significant digits; with all of them if that is none."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if digits else value
    if isinstance(value, dict):
        return {str(key): _rounded(item, _digits(str(key), digits)) for key, item in value.items()}
    return [_rounded(item, digits) for item in value] if isinstance(value, list | tuple) else value


def _digits(key: str, around: int) -> int:
    return COARSE.get(key, around) if around else DIGITS * (key in RUNS)


def _folded(value: Any) -> Any:
    folded = _by_item(value)
    places = _places(value) if isinstance(value, list) else None
    if places:
        whole = _shifted(value, places)
        digits = {"decimals": places, "digits": _by_item(whole)}
        if len(_compact(digits)) < len(_compact(folded)) and repr(_pointed(whole, places)) == repr(value):
            return digits
    return folded


def _places(value: Any) -> int | None:
    """The most decimal places in a list of decimal numbers, or of lists of them; ``None`` if other things are in it."""
    if isinstance(value, list):
        found = [_places(item) for item in value]
        return None if None in found else max(found, default=None)  # type: ignore[type-var]
    part = repr(value).partition(".")[2]  # empty if there is no point
    return len(part) if type(value) is float and part.isdecimal() else None


def _shifted(value: Any, places: int) -> Any:
    """Decimal numbers as whole ones, the point moved behind so many places."""
    return [_shifted(item, places) for item in value] if isinstance(value, list) else round(value * 10**places)


def _by_item(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) in FORMS:
            raise ValueError(f"figures cannot have the keys {', '.join(value)}: they mean a folded list")
        return {key: _folded(item) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    if len(value) >= SHORTEST:
        if len({_compact(item) for item in value}) == 1:
            return {"all": _folded(value[0]), "count": len(value)}
        if all(isinstance(item, bool) for item in value):
            return {"bits": "".join("01"[item] for item in value)}
        if all(type(item) is int for item in value) and value == list(range(len(value))):
            return {"range": len(value)}
        if (
            isinstance(value[0], str)
            and [value[0]] == unicp.demo.prompts(1)
            and value == unicp.demo.prompts(len(value))
        ):
            return {"held_out": len(value)}
        runs = [[item, len(list(same))] for item, same in groupby(value)] if _plain(value) else []
        if runs and len(_compact({"runs": runs})) < len(_compact(value)):
            return {"runs": runs}
    if len(value) > 1 and all(isinstance(item, dict) and item and list(item) == list(value[0]) for item in value):
        return {"columns": {key: _folded([item[key] for item in value]) for key in value[0]}}
    return [_folded(item) for item in value]


def _plain(value: list[Any]) -> bool:
    """Whether these are all strings, or all whole numbers, or all of them decimal ones."""
    return len({type(item) for item in value}) == 1 and type(value[0]) in (str, int, float)


def _unfolded(value: Any) -> Any:
    if isinstance(value, list):
        return [_unfolded(item) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"columns"}:
        columns = {key: _unfolded(items) for key, items in value["columns"].items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if set(value) == {"all", "count"}:
        return [_unfolded(value["all"]) for _ in range(value["count"])]
    if set(value) == {"range"}:
        return list(range(value["range"]))
    if set(value) == {"held_out"}:
        return unicp.demo.prompts(value["held_out"])
    if set(value) == {"runs"}:
        return [item for item, count in value["runs"] for _ in range(count)]
    if set(value) == {"decimals", "digits"}:
        return _pointed(_unfolded(value["digits"]), value["decimals"])
    if set(value) == {"bits"}:
        return [bit == "1" for bit in value["bits"]]
    return {key: _unfolded(item) for key, item in value.items()}


def _pointed(value: Any, places: int) -> Any:
    """What :func:`_shifted` shifted."""
    return [_pointed(item, places) for item in value] if isinstance(value, list) else value / 10**places
