"""Damaged and hostile profiles and configs by the thousand: refused by a ``UnicpError``, or good for use.

Nothing else is ever raised, nothing in them is executed, and nothing is written. Mutations are drawn from a seed; a
failure names it, and ``mutated(seed)`` makes the same file again.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import random
import struct
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import unicp
from tests.contract import CASES, profile_of
from tests.tiny import FAMILIES
from unicp import Profile
from unicp.policies import config_from_dict
from unicp.policies.budget import BudgetConfig, PlanBook
from unicp.policies.plans.step_plan import resampled
from unicp.profiles import KEY, config_of

WAN = FAMILIES["wan"]
PICKLE = "\x80\x04cos\nsystem\n(S'touch executed'\ntR."
HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 10**30, -(10**400), 1e308, float("nan"), float("inf"), "", "x", "../../x", "/etc/passwd",
    "a\0b", "x" * 5000, "__class__", "nan", PICKLE, [], {}, [[]], [1, 2, 3], [0.1, "a"], {"a": 1}, [None] * 50,
    [[1, 2]] * 9,
)  # fmt: skip
BOOK = {
    "sigmas": [1.0, 0.8, 0.6, 0.4, 0.2, 0.1],
    "plans": [
        {
            "steps": 6,
            "compute": [0, 1, 3, 5],
            "segments": [[1, 3, 1, 0.7], [3, 5, 0, 1.0]],
            "places": [],
            "default": False,
            "speedup": 2.0,
            "psnr": [30.0, 31.0],
            "expected": {"1": [0.1, 0.01]},
        }
    ],
}


@functools.cache
def original() -> tuple[dict[str, Any], bytes]:
    """Header and tensors of a good profile with everything in it."""
    data = Path(profile_of("wan")).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def packed(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Ways to everything in a nest of mappings and lists."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


def spoil(value: Any, draw: random.Random) -> Any:
    """The same nest with something else, nothing, or something more at one to three places."""
    value = copy.deepcopy(value)
    for _ in range(draw.randint(1, 3)):
        place = draw.choice(places(value))
        if not place:
            continue
        holder = value
        for key in place[:-1]:
            holder = holder[key]
        what = draw.random()
        if what < 0.2:
            del holder[place[-1]]
        elif what < 0.3 and isinstance(holder, dict):
            holder[draw.choice([str(h) for h in HOSTILE])] = holder[place[-1]]
        elif what < 0.4 and isinstance(holder, list):
            holder.extend(holder[:3])
        else:
            holder[place[-1]] = copy.deepcopy(draw.choice(HOSTILE))
    return value


def mutated(seed: int) -> bytes:
    """A profile that was damaged in one of the ways that files are, or on purpose."""
    draw = random.Random(seed)
    header, body = original()
    whole = packed(header, body)
    how = draw.randrange(7)
    if how == 0:  # cut off
        return whole[: draw.randrange(len(whole))]
    if how == 1:  # some bytes changed, mostly in the header
        data = bytearray(whole)
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(len(whole) if draw.random() < 0.2 else len(whole) - len(body))] = draw.randrange(256)
        return bytes(data)
    if how == 2:  # a header of another size
        return struct.pack("<Q", draw.choice([0, 1, 7, 2**31, 2**40, 2**63, 2**64 - 1])) + whole[8:]
    if how == 3:  # other names, types, shapes and places of tensors
        entries = {key: value for key, value in header.items() if key != "__metadata__"}
        return packed({**spoil(entries, draw), "__metadata__": header["__metadata__"]}, body)
    if how == 4:  # tensors of other types and shapes that are right in themselves
        name = draw.choice([key for key in header if key != "__metadata__"])
        first, last = header[name]["data_offsets"]
        shape = draw.choice([[last - first], [1, last - first], [last - first, 1, 1]])
        return packed({**header, name: {**header[name], "dtype": "U8", "shape": shape}}, body)
    values = json.loads(header["__metadata__"][KEY])
    if how == 5 and draw.random() < 0.5:  # plans, which this profile has none of
        values["config"] = {"method": "budget", "target_speedup": 1.5}
        values["metadata"]["budget"] = spoil(BOOK, draw)
    else:
        values = spoil(values, draw)
    return packed({**header, "__metadata__": {KEY: json.dumps(values)}}, body)


def read(path: Path, pipe: Any) -> bool:
    """Do with a file all that is done with profiles, to the last moment before a video. Whether it was accepted."""
    try:
        profile = Profile.load(path)
        config = config_of(path)
        if isinstance(profile.metadata.get("budget"), dict):
            book = PlanBook.from_dict(profile.metadata["budget"])
            for count in (3, 9):
                plan = book.choose(BudgetConfig(target_speedup=1)).plan
                resampled(plan, range(plan.steps, 0, -1), range(count, 0, -1))
        part = profile.of("transformer")
        part.check_model(pipe.transformer)
        part.errors("mean", {}, "reuse")
        for unit in part.units:
            if part.moments(unit) is not None:
                part.slicing(unit)
        assert getattr(config, "profile", None) in (None, str(path))
    except unicp.UnicpError as error:
        assert "\n" not in str(error) and len(str(error)) < 1500, str(error)[:2000]
        return False
    return True


class Watch:
    """Notes what Python's audit hook tells of files written, processes and code; hooks cannot be taken off again."""

    FORBIDDEN = (
        "os.system",
        "subprocess.Popen",
        "os.exec",
        "os.remove",
        "os.rename",
        "shutil.rmtree",
        "pickle.find_class",
    )

    def __init__(self) -> None:
        self.on, self.seen = False, []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on or (event == "pickle.find_class" and _of_solver()):
            return
        if event in self.FORBIDDEN or (event == "open" and _writes(arguments)):
            self.seen.append((event, arguments))


def _of_solver() -> bool:
    """Whether it is the pipeline's own scheduler that is copied, in memory, as a budget does."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.endswith("unicp/engine/solver/response.py"):
        frame = frame.f_back
    return frame is not None


def _writes(arguments: tuple[Any, ...]) -> bool:
    mode, flags = arguments[1], arguments[2]
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    return (isinstance(mode, str) and any(c in mode for c in "wax+")) or (
        isinstance(flags, int) and bool(flags & writing)
    )


@functools.cache
def watch() -> Watch:
    return Watch()


def profiles(seeds: range, folder: Path, full_every: int) -> int:
    """Read so many damaged files, and accelerate a pipeline with some of them. How many were accepted."""
    pipe, accepted = WAN.build(), 0
    path = folder / "a.safetensors"
    for seed in seeds:
        path.write_bytes(mutated(seed))
        watch().on = True
        try:
            good = read(path, pipe)
            accepted += good
            if seed % full_every == 0:
                try:
                    session = unicp.accelerate(pipe, str(path))
                    WAN.generate(pipe, steps=3)
                    session.restore()
                except unicp.UnicpError:
                    unicp.restore(pipe)
        except Exception as error:
            raise AssertionError(f"mutated({seed}): {error!r}") from error
        finally:
            watch().on = False
    assert [p.name for p in folder.iterdir()] == ["a.safetensors"]
    assert not watch().seen
    return accepted


def configs(seeds: range) -> int:
    accepted = 0
    examples = [example.config.to_dict() for cases in CASES.values() for example in cases.values()]
    for seed in seeds:
        draw = random.Random(seed)
        values = spoil(draw.choice(examples), draw)
        try:
            config = config_from_dict(values)
            assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config or "nan" in repr(config)
            accepted += 1
        except unicp.UnicpError as error:
            assert "\n" not in str(error) and len(str(error)) < 1500
        except Exception as error:
            raise AssertionError(f"config {seed}: {values!r:.300}: {error!r}") from error
    return accepted


def test_the_original_is_good(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(packed(*original()))
    assert read(path, WAN.build())
    assert PlanBook.from_dict(BOOK).to_dict() == BOOK


@pytest.mark.parametrize("first", [0, 10_000])
def test_damaged_profiles(tmp_path: Path, first: int) -> None:
    accepted = profiles(range(first, first + 300), tmp_path, full_every=20)
    assert 0 < accepted < 150  # some mutations change nothing that matters; most must be noticed


def test_damaged_configs() -> None:
    assert 0 < configs(range(2000)) < 2000


def test_cut_off_at_every_place_of_the_header(tmp_path: Path) -> None:
    path, whole = tmp_path / "a.safetensors", packed(*original())
    for length in [*range(0, len(whole) - len(original()[1]), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(unicp.UnicpError, match="not a readable profile"):
            Profile.load(path)


@pytest.mark.slow
def test_a_hundred_thousand_damaged_profiles_and_configs(tmp_path: Path) -> None:
    accepted = profiles(range(20_000, 80_000), tmp_path, full_every=200)
    assert 0 < accepted < 30_000
    assert 0 < configs(range(40_000)) < 40_000
