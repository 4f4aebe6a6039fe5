"""A recipe without a model, for tests of the batch: its clips are noise of their seed, made in milliseconds."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unicp.batch import driver
from unicp.batch.clips import Clip, Rank, Rendered, key_of
from unicp.batch.engines import Setting
from unicp.batch.local import LocalEngine
from unicp.batch.ray_engine import RayEngine, connect

held: list[Any] = []
"""What a worker's libraries keep until it ends."""
ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
"""Of a process that is to find this tree."""


@dataclass(frozen=True)
class FakeRecipe:
    """What a prompt says is done: ``fail``, ``kill`` (the worker, always), ``once`` (the worker,
    the first time), ``crowd`` (where there are others), ``gpu`` (in a
    way that leaves the GPU unusable). Of several ranks: ``alone`` (rank 1 fails, the others wait for it for ever),
    ``leave`` (rank 1 is killed, the first time, and the others fail by that), ``late`` (rank 1 fails once the video is
    made)."""

    log: str
    seconds: float = 0.0
    unloadable: bool = False
    without: str | None = None  # the device on which it cannot be loaded

    def load(self, device: str | None, rank: Rank | None = None) -> FakeMaker:
        if self.without is not None:
            with open(self.log + ".loads", "a") as log:
                log.write(f"{device}\n")
        if self.unloadable or (self.without is not None and device == self.without):
            raise RuntimeError("no such weights")
        if os.environ.get("UNICP_TEST_SEMAPHORE"):
            held.append(multiprocessing.get_context("spawn").Lock())
        return FakeMaker(self, rank)


class FakeMaker:
    def __init__(self, recipe: FakeRecipe, rank: Rank | None = None) -> None:
        self.recipe, self.rank = recipe, rank

    @property
    def log(self) -> str:
        """What this process has begun: of each rank but 0 a file of its own."""
        return self.recipe.log if not self.rank or not self.rank.number else f"{self.recipe.log}{self.rank.number}"

    def act(self, rank: Rank, prompt: str) -> None:
        """What a prompt asks of several ranks."""
        if rank.number == 1:
            if "leave" in prompt and not os.path.exists(self.log):
                open(self.log, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            if "alone" in prompt or "late" in prompt:
                raise ValueError("only here")
        elif "alone" in prompt:
            time.sleep(1000)
        elif "leave" in prompt and not os.path.exists(f"{self.recipe.log}1"):
            raise RuntimeError("Connection closed by peer")

    def document(self, values: Mapping[str, Any]) -> str:
        open(f"{self.log}.written", "a").close()
        return json.dumps(values)

    def make(self, clips: Sequence[Clip]) -> list[Rendered | Exception]:
        if self.rank is not None:
            self.act(self.rank, clips[0].prompt)
        said = ["once" in clip.prompt and clip.key in made(self.recipe.log) for clip in clips]
        with open(self.log, "a") as log:
            log.write("".join(f"{clip.key} {os.getpid()} {len(clips)}\n" for clip in clips))
        time.sleep(self.recipe.seconds)
        for clip, again in zip(clips, said, strict=True):
            if "kill" in clip.prompt or ("once" in clip.prompt and not again):
                os.kill(os.getpid(), signal.SIGKILL)
            if "gpu" in clip.prompt:
                raise RuntimeError("CUDA error: device-side assert triggered")
            if "crowd" in clip.prompt:
                raise MemoryError("too many at once") if len(clips) > 1 else ValueError("bad\nprompt")
        return [
            ValueError("bad <b> prompt")
            if "fail" in clip.prompt
            else Rendered(frames=noise(clip.seed), fps=8, scale=1, record={"prompt": clip.prompt}, fraction=0.5)
            for clip in clips
        ]


def noise(seed: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)


def stills(folder: Path) -> dict[str, Any]:
    """The pixels of every clip in a folder."""
    return {path.name: np.asarray(Image.open(path)) for path in folder.glob("*.png")}


def made(log: str) -> list[str]:
    """Keys of the clips that were begun, in order."""
    path = Path(log)
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def clip(prompt: str, seed: int = 0, group: str | None = "same") -> Clip:
    key = key_of({"prompt": prompt, "seed": seed})
    return Clip(key=key, name=f"{prompt.replace(' ', '-')}-{seed}.png", prompt=prompt, seed=seed, group=group)


def render(folder: Path, clips: Sequence[Clip], recipe: Any = None, **options: Any) -> driver.Result:
    """A batch of fake clips on this machine."""
    recipe = recipe or FakeRecipe(str(folder.with_name("log")))
    return driver.run(clips, folder, recipe, LocalEngine, **options)


def on_ray(setting: Setting) -> RayEngine:
    return RayEngine(setting, connect(None, 2), cpus=0.5)


if __name__ == "__main__":  # python -m tests.batch_fakes FOLDER COUNT SECONDS ENGINE: what is killed in a test
    target, count, pause, engine = sys.argv[1:]
    many = [clip("a ball", seed) for seed in range(int(count))]
    recipe = FakeRecipe(str(Path(target).with_name("log")), float(pause))
    # As `python -m` names this module __main__, the workers would look for the recipe there.
    from tests.batch_fakes import FakeRecipe as Importable

    make_engine = {"local": LocalEngine, "ray": on_ray}[engine]
    driver.run(many, Path(target), Importable(recipe.log, recipe.seconds), make_engine, workers=2)
