"""Profiles: whole or not at all, on the way out and on the way in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import unicp
from unicp import Profile
from unicp.profiles import FORMAT, KEY, content_of
from unicp.profiles.identity import weights_digest

CONFIG = unicp.AdaCacheConfig(codebook=((0.1, 3), (1.0, 1)), moreg=True, moreg_strides=(1, 2))


def _profile(**fields: Any) -> Profile:
    tensors = {"errors": torch.arange(6.0).reshape(2, 3), "motion": torch.ones(2, dtype=torch.float16)}
    return Profile(**{"config": CONFIG, "tensors": tensors, "metadata": {"model": "demo", "steps": 50}, **fields})


def _write(path: Path, metadata: dict[str, str] | None, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    save_file({"x": torch.ones(2)} if tensors is None else tensors, path, metadata=metadata)
    return path


def _text(**changes: Any) -> str:
    return json.dumps({"format": FORMAT, "config": CONFIG.to_dict(), "metadata": {}, **changes})


def _refused(path: Path | str, *said: str) -> None:
    with pytest.raises(unicp.UnicpError) as error:
        Profile.load(path)
    message = str(error.value)
    assert all(part in message for part in (*said, Path(path).name[:50])), message
    assert "\n" not in message
    assert len(message) < 600 + len(str(path))


@pytest.mark.parametrize("config", [CONFIG, unicp.ScheduleConfig(compute=(0, 1, 5)), unicp.AdaCacheConfig()])
def test_round_trip(tmp_path: Path, config: Any) -> None:
    profile = _profile(config=config)
    profile.save(tmp_path / "a.safetensors")
    again = Profile.load(tmp_path / "a.safetensors")
    assert again.config == config
    assert again.metadata == profile.metadata
    assert again.tensors.keys() == profile.tensors.keys()
    for name, tensor in profile.tensors.items():
        assert again.tensors[name].dtype == tensor.dtype
        assert torch.equal(again.tensors[name], tensor)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_it_carries_its_format(tmp_path: Path) -> None:
    from safetensors import safe_open

    _profile().save(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as opened:
        assert json.loads(opened.metadata()[KEY])["format"] == FORMAT == 1


def test_saving_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    _profile().save(path)
    _profile(config=unicp.ScheduleConfig(interval=2)).save(str(path))
    assert Profile.load(str(path)).config == unicp.ScheduleConfig(interval=2)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(tmp_path: Path, share: float) -> None:
    path = tmp_path / "a.safetensors"
    _profile().save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    _refused(path, "not a readable profile")


@pytest.mark.parametrize(
    "data",
    [b"", b"\0" * 8, b"\xff" * 64, b"hello, world", (10**6).to_bytes(8, "little") + b"{}", b"\x02" + b"\0" * 7 + b"{}"],
)
def test_any_other_file(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    _refused(path, "profile")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"other": "{}"}])
def test_a_safetensors_file_of_others(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    _refused(_write(tmp_path / "a.safetensors", metadata), "no unicp profile", "unicp calibrate")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        '"text"',
        "null",
        "{}",
        json.dumps({"format": 1}),
        json.dumps({"format": 1, "config": {}}),
        "[" * 100_000,
        _text(config=None),
        _text(config=[]),
        _text(config={"method": "adacash"}),
        _text(config={"method": ["adacache"]}),
        _text(config={"method": "adacache", "codebok": 1}),
        _text(config={"method": "adacache", "codebook": [[0.2, 1], [0.1, 1]]}),
        _text(config={"method": "adacache", "codebook": [[10**1000, 1], [0.1, 1]]}),
        _text(config={"method": "adacache", "warmup_steps": "2"}),
        _text(config={"method": "schedule", "compute": [0], "interval": 2}),
        _text(metadata=[1]),
        _text(metadata=None),
    ],
)
def test_damaged_metadata(tmp_path: Path, text: str) -> None:
    _refused(_write(tmp_path / "a.safetensors", {KEY: text}))


@pytest.mark.parametrize("version", [2, 99, 0, -1, "1", 1.5, None, [1], True])
def test_another_format(tmp_path: Path, version: Any) -> None:
    _refused(_write(tmp_path / "a.safetensors", {KEY: _text(format=version)}), repr(version), str(FORMAT))


def test_there_is_no_such_file(tmp_path: Path) -> None:
    _refused(tmp_path / "a.safetensors", "no profile")
    _refused(tmp_path, "no profile")  # a folder
    _refused(tmp_path / ("x" * 5000 + ".safetensors"), "no profile")
    _refused("a\0b.safetensors", "no profile")


@pytest.mark.parametrize("name", ["../../etc/x", "/etc/x", "a\nb", "", "x" * 3000, "weights\u202e", "a" * 10 + "\0"])
def test_hostile_tensor_names_are_only_names(tmp_path: Path, name: str) -> None:
    path = tmp_path / "sub" / "a.safetensors"
    path.parent.mkdir()
    _profile(tensors={name: torch.ones(1)}).save(path)
    assert list(Profile.load(path).tensors) == [name]
    assert [p.name for p in tmp_path.rglob("*")] == ["sub", "a.safetensors"]


@pytest.mark.parametrize("name", ["with space.safetensors", "ünï.safetensors", "no-suffix", "-x.safetensors", "a\nb"])
def test_odd_file_names(tmp_path: Path, name: str) -> None:
    _profile().save(tmp_path / name)
    assert Profile.load(tmp_path / name).config == CONFIG
    assert [p.name for p in tmp_path.iterdir()] == [name]


# --- what cannot be written -------------------------------------------------------------------------------------------


def test_no_folder_to_write_into(tmp_path: Path) -> None:
    with pytest.raises(unicp.UnicpError, match=r"cannot write the profile .*missing"):
        _profile().save(tmp_path / "missing" / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(unicp.UnicpError, match="cannot write the profile"):
        _profile().save(tmp_path / "a.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(unicp.UnicpError, match="cannot write the profile"):
        _profile().save(tmp_path / ("x" * 300))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fields", [{"metadata": {"x": object()}}, {"tensors": {"x": 3}}])
def test_what_cannot_be_saved_leaves_the_old_file(tmp_path: Path, fields: dict[str, Any]) -> None:
    path = tmp_path / "a.safetensors"
    _profile().save(path)
    with pytest.raises((unicp.UnicpError, TypeError, ValueError, AttributeError)):
        _profile(**fields).save(path)
    assert Profile.load(path).config == CONFIG
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_break_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    _profile().save(path)

    def half(tensors: Any, target: Any, metadata: Any) -> None:
        Path(target).write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises(KeyboardInterrupt):
        _profile(config=unicp.ScheduleConfig(interval=2)).save(path)
    assert Profile.load(path).config == CONFIG
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the system's own error, in the middle of writing."""
    code = f"""
import resource, torch, unicp
from pathlib import Path
path = Path({str(tmp_path)!r}) / "a.safetensors"
profile = unicp.Profile(config=unicp.AdaCacheConfig(), tensors={{"a": torch.ones(10)}})
profile.save(path)
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
try:
    unicp.Profile(config=unicp.ScheduleConfig(interval=2), tensors={{"a": torch.ones(100_000)}}).save(path)
except unicp.UnicpError as error:
    assert "cannot write the profile" in str(error) and "\\n" not in str(error), error
else:
    raise SystemExit("nothing was raised")
assert unicp.Profile.load(path).config == unicp.AdaCacheConfig()
"""
    source = Path(unicp.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_tensors_that_share_or_are_not_contiguous(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    profile = _profile(tensors={"a": base.T, "b": base[:2], "c": base})
    profile.save(tmp_path / "a.safetensors")
    again = Profile.load(tmp_path / "a.safetensors")
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in profile.tensors.items())


def test_a_config_counts_by_the_content_of_its_profile(tmp_path: Path) -> None:
    found = []
    for name, value in (("a", 0.0), ("b", 0.0), ("c", 1.0)):
        path = tmp_path / f"{name}.safetensors"
        _profile(tensors={"x": torch.full((1,), value)}).save(path)
        inner = unicp.UniCPConfig(profile=str(path))
        found.append((content_of(inner), content_of(unicp.UniCPConfig(stack=unicp.BudgetConfig(profile=str(path))))))
    for one, same, other in zip(*found, strict=True):
        assert one == same != other
        assert str(tmp_path) not in str(one)
    with pytest.raises(unicp.UnicpError, match=r"there is no profile gone\.safetensors; make one with"):
        content_of(unicp.UniCPConfig(profile="gone.safetensors"))


def test_weights_have_a_digest() -> None:
    torch.manual_seed(0)
    one, same, other = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    same.load_state_dict(one.state_dict())
    digests = [weights_digest({"transformer": module}) for module in (one, same, other)]
    assert digests[0] == digests[1] != digests[2]


def test_a_profile_whose_place_is_gone_is_saved_elsewhere(tmp_path: Path) -> None:
    from unicp.cli import measuring

    profile = Profile(config=unicp.ScheduleConfig(interval=2), tensors={}, metadata={})
    with pytest.raises(unicp.UnicpError, match=r"cannot write the profile .* it is in ") as raised:
        measuring.write(profile, tmp_path / "gone" / "mine.safetensors")
    place = str(raised.value).split("it is in ")[1].split(" instead")[0]
    assert Profile.load(place).config == profile.config
