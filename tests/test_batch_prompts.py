"""Prompts of ``unicp batch``: every format, what is refused, and the names of clips."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.batch_fakes import clip
from unicp import UnicpError
from unicp.batch.clips import groups, key_of
from unicp.batch.names import MAX_NAME_LENGTH, hashed, vbench
from unicp.batch.prompts import Row, read

# --- prompts --------------------------------------------------------------------------------------------------------

FULL = {
    "prompt": "a red ball",
    "negative_prompt": "blue",
    "seed": "3",
    "steps": "8",
    "guidance": "4.5",
    "size": "48x32",
    "frames": "5",
    "method": "none",
    "image": "start.png",
}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_every_column_of_every_format(tmp_path: Path, kind: str) -> None:
    (tmp_path / "start.png").write_bytes(b"")
    path = tmp_path / f"prompts.{kind}"
    typed = {**FULL, "seed": 3, "steps": 8.0, "guidance": 4.5, "size": [48, 32], "frames": 5}
    if kind == "csv":
        path.write_text(f'{",".join(FULL)}\n{",".join(FULL.values())}\n"a, b",,,,,,,,\n', "utf-8-sig")
    elif kind == "jsonl":
        path.write_text(json.dumps(typed) + '\n\n{"prompt": "a, b", "seed": null}\n')
    else:
        write_parquet(path, [typed, {**dict.fromkeys(FULL), "prompt": "a, b", "guidance": float("nan")}])
    first, second = read(path)
    assert (first.prompt, first.seeds) == ("a red ball", (3,))
    expected = {"negative_prompt": "blue", "steps": 8, "guidance": 4.5, "size": (48, 32), "frames": 5}
    assert first.values == {**expected, "method": "none", "image": str(tmp_path / "start.png")}
    assert (second.prompt, second.seeds, second.values) == ("a, b", (), {})


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist([{**row, "size": row["size"] and "48x32"} for row in rows]), path)


def test_text_is_a_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(" a ball \n\nsize, 3\n")
    assert read(tmp_path / "p.txt") == [Row(number=1, prompt="a ball"), Row(number=3, prompt="size, 3")]


def test_a_line_of_json_may_hold_any_character(tmp_path: Path) -> None:
    """Those among them that only Python takes for the end of a line."""
    prompt = "a ball\u2028and\x85a cube"
    (tmp_path / "p.jsonl").write_text(f'{json.dumps({"prompt": prompt}, ensure_ascii=False)}\r\n{{"prompt": "b"}}\n')
    assert read(tmp_path / "p.jsonl") == [Row(number=1, prompt=prompt), Row(number=2, prompt="b")]


@pytest.mark.parametrize("text", ["7 8", "7,8", "7; 8"])
def test_a_row_may_name_several_seeds(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.csv").write_text(f'prompt,seed\na ball,"{text}"\n')
    (tmp_path / "p.jsonl").write_text('{"prompt": "a ball", "seed": [7, 8]}')
    assert read(tmp_path / "p.csv")[0].seeds == read(tmp_path / "p.jsonl")[0].seeds == (7, 8)


def test_an_empty_negative_prompt_counts_in_json_only(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "negative_prompt": ""}')
    (tmp_path / "p.csv").write_text("prompt,negative_prompt\na,\n")
    assert read(tmp_path / "p.jsonl")[0].values == {"negative_prompt": ""}
    assert read(tmp_path / "p.csv")[0].values == {}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.csv", "prompt,seed\na,1\n,2\n", "row 3: has no prompt"),
        ("p.csv", "prompt,steps\na,1\na,0\n", "row 3: steps must be a whole number of at least 1, got '0'"),
        ("p.csv", "prompt,steps\na,2.5\n", "row 2: steps must be a whole number"),
        ("p.csv", "prompt,steps\na,many\n", "row 2: steps cannot be 'many'"),
        ("p.csv", "prompt,size\na,48\n", "row 2: size must be WIDTHxHEIGHT in pixels, as in 832x480, got '48'"),
        ("p.csv", "prompt,seed\na,-1\n", "row 2: seed must be a whole number of at least 0"),
        ("p.csv", "prompt,seed\na,1 1\n", "row 2: seed must be one or several different"),
        ("p.csv", "prompt,guidance\na,nan\n", "row 2: guidance must be a number of at least 0"),
        ("p.csv", "prompt,promt\na,b\n", "row 2: unknown column 'promt'; known: prompt, seed"),
        ("p.csv", "prompt,image\na,none.png\n", "row 2: there is no image "),
        ("p.csv", "prompt,seed\na,1,5\n", "row 2: has 3 fields, the header has 2"),
        ("p.csv", "prompt,seed\na\n", "row 2: has 1 fields, the header has 2"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "row 2: is no JSON"),
        ("p.jsonl", '{"prompt": "a"}\n\n"b"', "row 3: must be an object"),
        ("p.jsonl", '{"prompt": "a", "steps": true}', "row 1: steps must be a whole number"),
        ("p.jsonl", '{"prompt": 3}', "row 1: has no prompt"),
        ("p.txt", "\n", "there is no prompt in"),
        ("p.docx", "a", "known: .txt, .csv, .jsonl, .parquet"),
    ],
)
def test_a_bad_row_is_refused_with_its_number(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UnicpError) as caught:
        read(tmp_path / name)
    assert said in str(caught.value)
    assert name in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnicpError, match=r"cannot read the prompts in .*none\.txt: No such file"):
        read(tmp_path / "none.txt")
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UnicpError, match="is not UTF-8"):
        read(tmp_path / "p.txt")
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # importing it fails
    with pytest.raises(UnicpError, match=r"p\.parquet need pyarrow.*pip install 'unicp\[parquet\]'"):
        read(tmp_path / "p.parquet")


# --- names, keys and groups -----------------------------------------------------------------------------------------


def test_names_are_stable_and_fit() -> None:
    key = key_of({"prompt": "a red ball", "size": (48, 32)})
    assert key == "db03e3f635fcee1f12c89f03fdee5b0e"  # of what was made before: it must not change
    assert key == key_of({"size": [48, 32], "prompt": "a red ball"}) != key_of({"size": [48, 33]})
    assert hashed("A red ball!", 12, key) == f"a-red-ball-s12-{key[:8]}"
    assert len(hashed("ü" * 300, 2**32 - 1, key).encode()) <= MAX_NAME_LENGTH
    assert len(hashed("山" * 300, 2**32 - 1, key).encode()) <= MAX_NAME_LENGTH
    assert vbench("a person. is Walking, fast", 4) == "a person. is Walking, fast-4"
    for prompt in ("a/b", "a\nb", "..", "x" * 250):
        with pytest.raises(ValueError, match="no file can be named"):
            vbench(prompt, 0)


def test_groups_hold_equal_clips_only() -> None:
    clips = [clip("a", seed, group) for seed, group in enumerate("xyxxy")] + [clip("b", 9, None), clip("b", 10, None)]
    assert [[each.seed for each in group] for group in groups(clips, 2)] == [[0, 2], [1, 4], [3], [9], [10]]
    assert all(len(group) == 1 for group in groups(clips, 1))
