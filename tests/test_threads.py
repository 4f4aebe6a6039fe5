"""Threads that share one model: one video at a time is accelerated, the others are computed, and none mixes with it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import unicp
from tests.contract import quietly
from tests.tiny import FAMILIES
from unicp.hosts.diffusers.hooks import ContextReceiver

CONFIGS = {
    "schedule": unicp.ScheduleConfig(interval=3, fill="linear"),
    "stack": unicp.AdaCacheConfig(codebook=((1e9, 3),)),
    "budget": unicp.BudgetConfig(target_speedup=2),
    "units": unicp.UniCPConfig(delta=1e9, max_window=3, pcas=False),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
SECONDS = 600


def own(base: Any) -> Any:
    """A copy of the pipeline with a scheduler of its own, as a server makes one for each request."""
    local = copy.copy(base)
    local.scheduler = copy.deepcopy(base.scheduler)
    return local


def at_once(*works: Callable[[], None]) -> None:
    """Run them in threads of their own; an error in one is raised here, and none may hang."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert not any(thread.is_alive() for thread in threads), "a deadlock"
    if errors:
        raise errors[0]


def test_each_thread_has_a_context_of_its_own() -> None:
    receiver, seen = ContextReceiver(), []
    receiver.set_context("cond")

    def other() -> None:
        seen.append(receiver.current)
        receiver.set_context("uncond")

    at_once(other)
    assert seen == [None] and receiver.current == "cond"


def serial(family: Any, config: Any, seeds: range, steps: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Every video made accelerated and plain, one after another."""
    base, twin = family.build(), family.build()
    unicp.accelerate(base, config)
    return {
        seed: (
            quietly(lambda seed=seed: family.generate(own(base), seed=seed, prompts=(seed,), steps=steps)),
            family.generate(twin, seed=seed, prompts=(seed,), steps=steps),
        )
        for seed in seeds
    }


def check_two_threads(family: Any, config: Any, videos: int, steps: int) -> None:
    twins = serial(family, config, range(2 * videos), steps)
    base = family.build()
    session = unicp.accelerate(base, config)
    made: dict[int, torch.Tensor] = {}

    def work(first: int) -> None:
        for seed in range(first, 2 * videos, 2):
            made[seed] = family.generate(own(base), seed=seed, prompts=(seed,), steps=steps)

    quietly(lambda: at_once(lambda: work(0), lambda: work(1)))
    kinds = [next((k for k in (0, 1) if torch.equal(made[seed], twins[seed][k])), None) for seed in sorted(made)]
    assert len(made) == 2 * videos and None not in kinds, kinds  # its accelerated twin's, or the plain one's
    assert 0 in kinds
    assert not quietly(session.cached_tensors)


@configs
def test_two_threads_on_one_model(config: Any) -> None:
    torch.set_num_threads(1)
    check_two_threads(FAMILIES["wan"], config, videos=3, steps=8)


@pytest.mark.slow
@configs
@pytest.mark.parametrize("name", ["wan", "ltx", "wan2.2"])
def test_two_threads_of_twenty_videos_each(name: str, config: Any) -> None:
    torch.set_num_threads(1)
    check_two_threads(FAMILIES[name], config, videos=20, steps=10)


@configs
def test_a_video_of_another_thread_in_the_middle_of_one(config: Any) -> None:
    """The first one goes on as if alone, the other one is the plain model's, and the report says so."""
    family = FAMILIES["wan"]
    twins = serial(family, config, range(2), 10)
    base = family.build()
    session = unicp.accelerate(base, config)
    others: list[torch.Tensor] = []

    def between(_: Any, i: int, __: Any, tensors: Any) -> Any:
        if i == 4:
            at_once(lambda: others.append(family.generate(own(base), seed=1, prompts=(1,), steps=10)))
        return tensors

    video = quietly(lambda: family.generate(own(base), seed=0, prompts=(0,), steps=10, callback=between))
    assert torch.equal(video, twins[0][0]) and torch.equal(others[0], twins[1][1])
    (report,) = session.reports
    assert any("another video" in note for note in report.notes)


def test_threads_one_after_another_are_all_accelerated() -> None:
    """As a server with a pool of threads and a lock has them; one broke off, and its thread is gone or waits."""
    family, config = FAMILIES["wan"], CONFIGS["schedule"]
    twins = serial(family, config, range(3), 8)
    base = family.build()
    session = unicp.accelerate(base, config)
    made: list[torch.Tensor] = []

    def one(seed: int) -> None:
        made.append(family.generate(own(base), seed=seed, prompts=(seed,), steps=8))

    def breaks_off() -> None:
        def stop(*_: Any) -> Any:
            raise KeyError

        with pytest.raises(KeyError):
            family.generate(own(base), steps=8, callback=stop)

    at_once(lambda: one(0))
    at_once(breaks_off)
    at_once(lambda: one(1))
    at_once(lambda: one(2))
    assert [torch.equal(video, twins[seed][0]) for seed, video in enumerate(made)] == [True] * 3
    assert [report.complete for report in session.reports] == [True, False, True, True]


def test_a_thread_that_broke_off_and_lives_on_keeps_the_turn_for_one_video_at_most() -> None:
    family, config = FAMILIES["wan"], CONFIGS["schedule"]
    twins = serial(family, config, range(2), 8)
    base = family.build()
    unicp.accelerate(base, config)
    made: list[torch.Tensor] = []

    def stop(*_: Any) -> Any:
        raise KeyError

    with pytest.raises(KeyError):  # in this thread, which goes on
        family.generate(own(base), steps=8, callback=stop)

    def work() -> None:
        made.extend(family.generate(own(base), seed=seed, prompts=(seed,), steps=8) for seed in (0, 1))

    quietly(lambda: at_once(work))
    assert torch.equal(made[0], twins[0][1]) and torch.equal(made[1], twins[1][0])
