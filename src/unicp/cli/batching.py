"""Turns the request of ``unicp batch`` into clips, has them made, and reports their outcomes."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..batch import clips as batch_clips
from ..batch import driver
from ..batch.clips import Clip
from ..batch.engines import Engine, Setting
from ..batch.local import LocalEngine
from ..batch.names import hashed, vbench
from ..batch.progress import counted, duration
from ..batch.prompts import MAX_SEED, Row, read
from ..errors import UnicpError
from ..files.video import check_suffix
from ..files.whole import digest
from ..policies.config import Config
from ..profiles import content_of
from . import calls, options, pipelines
from .clips import absolute, expected_bytes
from .clips import identity as identity_of
from .model import Model
from .screen import messages, results

COLUMN_OPTIONS = {
    "negative_prompt": "--negative",
    "steps": "--steps",
    "guidance": "--guidance",
    "size": "--size",
    "frames": "--frames",
}
FAILED = 1
MAX_LISTED_ERRORS = 10
"""Most different errors that are listed at the end."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The rows of a file, and the command's values for all of them. Both are checked without loading weights.

    Attributes:
        configs: configs by the method that rows name; under ``None`` that of the command.
        contents: the same configs, as they go into the keys of clips.
        given: values by option; ``None`` where an option was not given.
        suffix: suffix of the clips' files.
    """

    file: Path
    rows: Sequence[Row]
    model: Model
    method: str
    configs: Mapping[str | None, Config | None]
    contents: Mapping[str | None, Any]
    given: Mapping[str, Any]
    fps: float | None
    suffix: str

    @classmethod
    def read(
        cls,
        file: Path,
        *,
        model: str,
        method: str,
        settings: Sequence[str],
        given: Mapping[str, Any],
        fps: float | None,
        kind: str,
    ) -> Plan:
        """Read and check everything that can be checked ahead.

        Raises:
            UnicpError: a file, a row, a method or a model that will not do; of a row, with its number.
        """
        suffix = check_suffix(f"video.{kind.lower().lstrip('.')}")
        rows = read(file)
        configs: dict[str | None, Config | None] = {None: absolute(options.read_method(method, settings))}
        for row in rows:
            named = row.values.get("method")
            if named is not None and named not in configs:
                with _of_row(file, row):
                    configs[named] = absolute(options.read_method(named, []))
        found = pipelines.find(model)
        return cls(
            file=file,
            rows=rows,
            model=found,
            method=method,
            configs=configs,
            contents={name: content_of(config) if config is not None else None for name, config in configs.items()},
            given=given,
            fps=fps,
            suffix=suffix,
        )

    def clips(self, *, seed: int, seeds: int, names: str, dtype: str | None, scale: int | None) -> list[Clip]:
        """One clip for each row and seed; equal ones are made once.

        Args:
            seed, seeds: first seed and number of seeds, for rows that do not name several.
            names: ``"hash"`` or ``"vbench"``.

        Raises:
            UnicpError: a row asks for what the pipeline does not do, or no file can be named after it.
        """
        found: dict[str, Clip] = {}
        counts: Counter[str] = Counter()
        for row in self.rows:
            with _of_row(self.file, row):
                values, common = self._values(row)
                size = expected_bytes(self.model, values["call"], self.suffix)
                for number in _seeds(row, seed, seeds):
                    identity = {**common, "prompt": row.prompt, "seed": number, "dtype": dtype, "scale": scale}
                    key = batch_clips.key_of(identity)
                    if key in found:
                        continue
                    if names == "vbench":
                        stem = _vbench(row.prompt, counts)
                    else:
                        stem = hashed(row.prompt, number, key)
                    found[key] = Clip(
                        key=key,
                        name=stem + self.suffix,
                        prompt=row.prompt,
                        seed=number,
                        values=values,
                        group=_group(values),
                        expected_bytes=size,
                    )
        repeated = sum(len(_seeds(row, seed, seeds)) for row in self.rows) - len(found)
        if repeated:
            messages().print(f"{repeated} of the clips are asked for more than once; each is made once")
        return list(found.values())

    def _values(self, row: Row) -> tuple[dict[str, Any], dict[str, Any]]:
        """The values of a row for a worker, and those for the keys of its clips."""
        image = row.values.get("image")
        asked = {option: row.values[name] for name, option in COLUMN_OPTIONS.items() if name in row.values}
        supplied = ("prompt",) if image is None else ("prompt", "image")
        call, fps = calls.build(self.model, {**self.given, **asked}, self.fps, supplied)
        named = row.values.get("method")
        config = self.configs[named]
        values = {
            "call": call,
            "fps": fps,
            "image": image,
            "method": named or self.method,
            "config": None if config is None else config.to_dict(),
        }
        common = {
            "call": call,
            "fps": fps,
            "image": None if image is None else digest(Path(image)),
            "config": self.contents[named],
            "model": identity_of(self.model),
            "format": self.suffix,
        }
        return values, common


@contextmanager
def _of_row(file: Path, row: Row) -> Iterator[None]:
    """Errors within the block name the row."""
    try:
        yield
    except ValueError as error:  # UnicpError is one
        raise UnicpError(f"{file}, row {row.number}: {error}") from None


def _vbench(prompt: str, counts: Counter[str]) -> str:
    stem = vbench(prompt, counts[prompt])
    counts[prompt] += 1
    return stem


def _seeds(row: Row, seed: int, seeds: int) -> Sequence[int]:
    if len(row.seeds) > 1:
        return row.seeds
    first = row.seeds[0] if row.seeds else seed
    if first + seeds - 1 > MAX_SEED:
        raise UnicpError(f"seed {first} and {seeds - 1} more go beyond {MAX_SEED}")
    return range(first, first + seeds)


def _group(values: Mapping[str, Any]) -> str | None:
    """The values that have to be equal for clips to be made in one forward; pipelines take one image at a time."""
    if values["image"] is not None:
        return None
    call = {name: value for name, value in values["call"].items() if name != "negative_prompt"}
    negative = "negative_prompt" in values["call"]
    return json.dumps([call, negative, values["fps"], values["config"], values["method"]], sort_keys=True)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where clips are made, from the command line; ``None`` where it says nothing.

    Attributes:
        ranks: number of devices of a worker, with a process on each.
    """

    engine: str
    workers: int | None
    ranks: int
    device: str | None
    threads: int | None
    address: str | None
    gpus: float | None
    cpus: float | None

    def prepare(self, dtype: str | None) -> tuple[Callable[[Setting], Engine], int, int | None]:
        """A function that makes the engine, the number of workers, and the CPU threads of each.

        Raises:
            UnicpError: a device that is not there, or no Ray.
        """
        if self.engine == "ray":
            from ..batch import ray_engine

            cpus = float(self.ranks) if self.cpus is None else self.cpus
            wanted = (self.workers or 1) * cpus
            ray = ray_engine.connect(self.address, max(os.cpu_count() or 1, int(wanted + 0.999)))
            gpus = self.gpus
            if gpus is None:
                gpus = float(self.ranks) if ray.cluster_resources().get("GPU") else 0.0
            if self.ranks > 1 and gpus not in (0, self.ranks):
                raise UnicpError(
                    f"--gpus-per-worker {gpus:g} and --devices-per-clip {self.ranks} do not agree; leave the former out"
                )
            room = ray_engine.worker_count(ray, gpus)  # checked in any case: without room, workers would wait for ever
            threads = self.threads or (max(1, int(cpus) // self.ranks) if not gpus else None)
            devices = [self.device or (None if gpus else "cpu")]
            if self.ranks > 1:
                on_cpu = not gpus or self.device == "cpu"
                devices = ["cpu" if on_cpu else f"cuda:{index}" for index in range(self.ranks)]
            make_engine = partial(ray_engine.RayEngine, ray=ray, cpus=cpus, gpus=gpus, devices=devices)
            return make_engine, self.workers or room, threads
        device, _ = options.read_device(self.device, dtype)
        places = [str(device)]
        if device.type == "cuda" and device.index is None:
            import torch

            places = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        if device.type != "cpu" and self.ranks > len(places):
            raise UnicpError(
                f"--devices-per-clip {self.ranks}: only {len(places)} can be used here ({', '.join(places)}); "
                "name fewer, or --device cpu"
            )
        workers = self.workers or max(1, len(places) // self.ranks)
        threads = self.threads or max(1, (os.cpu_count() or 1) // (workers * self.ranks))
        return partial(LocalEngine, devices=places, ranks=self.ranks), workers, threads


@contextmanager
def _ending_cleanly() -> Iterator[None]:
    """Within the block, SIGTERM, with which Slurm and others end a job, counts as Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def execute(
    plan: Plan,
    clips: Sequence[Clip],
    folder: Path,
    place: Place,
    recipe: Callable[[int | None], Any],
    *,
    dtype: str | None,
    batch_size: int,
    retries: int,
    resume: bool,
) -> int:
    """Make the clips, by a recipe given the threads of a worker, and report their outcomes. Returns the exit code."""
    make_engine, workers, threads = place.prepare(dtype)
    with _ending_cleanly():
        result = driver.run(
            clips,
            folder,
            recipe(threads),
            make_engine,
            workers=workers,
            batch_size=batch_size,
            retries=retries,
            resume=resume,
        )
    screen = results()
    found = f"; {result.found} were there before" if result.found else ""
    screen.print(f"{counted(result.made, 'clip')} made in {duration(result.seconds)}{found}")
    screen.print(f"wrote {result.summary}", markup=False, soft_wrap=True)
    if not result.failed:
        return 0
    screen.print(f"{len(result.failed)} failed; run it again to try them again:")
    reasons: dict[str, list[str]] = {}
    for name, error in result.failed.items():
        reasons.setdefault(error, []).append(name)
    for error, of in list(reasons.items())[:MAX_LISTED_ERRORS]:
        more = f" and {len(of) - 1} more" if len(of) > 1 else ""
        screen.print(f"  {of[0]}{more}: {error}", markup=False, soft_wrap=True)
    if len(reasons) > MAX_LISTED_ERRORS:
        screen.print(
            f"  and {len(reasons) - MAX_LISTED_ERRORS} other errors; see: unicp batch status {folder}", markup=False
        )
    return FAILED
