"""Reads prompts from ``.txt`` (one per line), ``.csv``, ``.jsonl`` and ``.parquet``, whose columns may set more."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UnicpError, first_line, missing_extra, unknown

MAX_SEED = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a prompts file.

    Attributes:
        number: number of its line (``.txt``, ``.jsonl``) or record (``.csv``, where the header is 1, and ``.parquet``).
        seeds: seeds that the row names; empty if it names none.
        values: what else it sets: ``negative_prompt`` (str), ``steps`` (int), ``guidance`` (float), ``size``
            ((width, height) in pixels), ``frames`` (int), ``method`` (str), ``image`` (absolute path).
    """

    number: int
    prompt: str
    seeds: tuple[int, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)


def parse_size(text: str) -> tuple[int, int]:
    """Width and height in pixels.

    Raises:
        ValueError: it is not ``WIDTHxHEIGHT``.

    >>> parse_size("832x480")
    (832, 480)
    """
    match = re.fullmatch(r"(\d+)\s*[x×]\s*(\d+)", text.strip().lower())
    if match is None or not int(match[1]) or not int(match[2]):
        raise ValueError(f"must be WIDTHxHEIGHT in pixels, as in 832x480, got {text!r}")
    return int(match[1]), int(match[2])


def _whole(value: Any, least: int, most: float = math.inf) -> int:
    number = float(value) if not isinstance(value, bool) else math.nan
    if not number.is_integer() or not least <= number <= most:
        raise ValueError(f"must be a whole number of at least {least}, got {value!r}")
    return int(number)


def _number(value: Any) -> float:
    number = float(value) if not isinstance(value, bool) else math.nan
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"must be a number of at least 0, got {value!r}")
    return number


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be text, got {value!r}")
    return value


def _size(value: Any) -> tuple[int, int]:
    if isinstance(value, list | tuple) and len(value) == 2:
        return _whole(value[0], 1), _whole(value[1], 1)
    return parse_size(_text(value))


def _seeds(value: Any) -> tuple[int, ...]:
    """One seed, or several: a list, or numbers with blanks, commas or semicolons between them."""
    several = re.split(r"[\s,;]+", value.strip()) if isinstance(value, str) else value
    if not isinstance(several, list | tuple):
        several = [several]
    seeds = tuple(_whole(each, 0, MAX_SEED) for each in several)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"must be one or several different whole numbers, got {value!r}")
    return seeds


READERS: dict[str, Callable[[Any], Any]] = {
    "negative_prompt": _text,
    "steps": lambda value: _whole(value, 1),
    "guidance": _number,
    "size": _size,
    "frames": lambda value: _whole(value, 1),
    "method": _text,
    "image": _text,
}
"""Functions that read the columns other than ``prompt`` and ``seed``."""
COLUMNS = ("prompt", "seed", *READERS)


def _of_text(path: Path) -> Iterable[tuple[int, Any]]:
    for number, line in enumerate(path.read_text("utf-8-sig").splitlines(), 1):
        if line.strip():
            yield number, {"prompt": line}


def _of_csv(path: Path) -> Iterable[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        for number, record in enumerate(reader, 2):
            if None in record or None in record.values():
                raise UnicpError(
                    f"{path}, row {number}: has {_count(record)}, the header has {len(record) - (None in record)}"
                )
            yield number, {str(name).strip(): value for name, value in record.items()}


def _count(record: Mapping[Any, Any]) -> str:
    more = record.get(None) or []
    count = sum(value is not None for name, value in record.items() if name is not None) + len(more)
    return f"{count} fields"


def _of_jsonl(path: Path) -> Iterable[tuple[int, Any]]:
    # Not splitlines: JSON strings may contain other characters that end a line (U+2028).
    for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise UnicpError(f"{path}, row {number}: is no JSON: {error}") from None


def _of_parquet(path: Path) -> Iterable[tuple[int, Any]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise missing_extra("pyarrow", "parquet", f"prompts in {path.name}") from None
    try:
        records = parquet.read_table(path).to_pylist()
    except Exception as error:  # pyarrow raises various errors for files that are not Parquet
        raise UnicpError(f"{path} cannot be read as Parquet: {first_line(error, 200)}") from None
    return enumerate(records, 1)


FORMATS: dict[str, Callable[[Path], Iterable[tuple[int, Any]]]] = {
    ".txt": _of_text,
    ".csv": _of_csv,
    ".jsonl": _of_jsonl,
    ".parquet": _of_parquet,
}
"""Functions that read a file of prompts, by its suffix."""


def _row(path: Path, number: int, record: Any) -> Row:
    where = f"{path}, row {number}"
    if not isinstance(record, Mapping):
        raise UnicpError(f'{where}: must be an object such as {{"prompt": "a red ball"}}, got {record!r:.80}')
    for name in record:
        if name not in COLUMNS:
            raise UnicpError(f"{where}: {unknown('column', name, COLUMNS)}")
    # An empty cell sets nothing. An empty negative prompt in JSON does: it replaces the pipeline's own.
    empty = (None, "") if path.suffix.lower() == ".csv" else (None,)
    given = {name: value for name, value in record.items() if value not in empty and value == value}
    prompt = given.pop("prompt", None)
    if not isinstance(prompt, str) or not prompt.strip():
        raise UnicpError(f"{where}: has no prompt; every row needs words in the column prompt")
    values: dict[str, Any] = {}
    for name, value in given.items():
        try:
            values[name] = _seeds(value) if name == "seed" else READERS[name](value)
        except (TypeError, ValueError) as error:
            problem = str(error) if str(error).startswith("must be") else f"cannot be {value!r}"
            raise UnicpError(f"{where}: {name} {problem}") from None
    if "image" in values:
        image = (path.parent / Path(values["image"]).expanduser()).absolute()
        if not image.is_file():
            raise UnicpError(f"{where}: there is no image {image}")
        values["image"] = str(image)
    return Row(number=number, prompt=prompt.strip(), seeds=values.pop("seed", ()), values=values)


def read(path: Path) -> list[Row]:
    """The rows of a file, checked.

    Columns: ``prompt``, and any of ``negative_prompt``, ``seed`` (one or several), ``steps``, ``guidance``, ``size``
    (``832x480``), ``frames``, ``method`` and ``image`` (a path, relative to the file). An empty cell leaves the
    command's own value.

    Raises:
        UnicpError: the file cannot be read, or a row is wrong: with its number.
    """
    read_records = FORMATS.get(path.suffix.lower())
    if read_records is None:
        raise unknown(f"format of {str(path)!r}: its ending", path.suffix, FORMATS)
    try:
        rows = [_row(path, number, record) for number, record in read_records(path)]
    except UnicodeDecodeError:
        raise UnicpError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    except csv.Error as error:
        raise UnicpError(f"{path} cannot be read as CSV: {error}") from None
    except OSError as error:
        raise UnicpError(f"cannot read the prompts in {path}: {error.strerror or error}") from None
    if not rows:
        raise UnicpError(f"there is no prompt in {path}")
    return rows
