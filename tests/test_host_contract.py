"""What every host owes, whoever calls the denoiser. Hosts are in ``tests/host_adapters.py``."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.contract import counting, covering, quietly, traces
from tests.host_adapters import HOSTS, Host
from unicp import BudgetConfig, ScheduleConfig, UnicpError

CONFIGS = {"budget": BudgetConfig(target_speedup=2), "schedule": ScheduleConfig(interval=2, fill="linear")}
OTHERS: dict[str, dict[str, Any]] = {
    "prompt": {"prompts": (2,)},
    "batch": {"prompts": (1, 2)},
    "size": {"size": 64},
    "steps": {"steps": 14},
}

hosts = pytest.mark.parametrize("name", HOSTS)


class BreakingOff(Exception):
    pass


@contextmanager
def breaking_off(module: torch.nn.Module, call: int) -> Iterator[None]:
    """The denoiser fails at its n-th call."""
    calls = iter(range(call))

    def fail(*_: Any) -> None:
        if next(calls, None) is None:
            raise BreakingOff

    handle = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def under(name: str, config: Any) -> Host:
    host = HOSTS[name]()
    host.put(config)
    return host


@functools.cache
def plain(name: str) -> torch.Tensor:
    return HOSTS[name]().make()


@functools.cache
def fresh(name: str, method: str, other: str = "") -> torch.Tensor:
    """The first video of a host."""
    return under(name, CONFIGS[method]).make(**OTHERS.get(other, {}))


@hosts
def test_a_target_of_1_changes_no_bit(name: str) -> None:
    host = under(name, BudgetConfig(target_speedup=1))
    assert torch.equal(quietly(host.make), plain(name))


@pytest.mark.parametrize(("name", "method"), [(name, m) for name in HOSTS for m in CONFIGS if m in HOSTS[name].methods])
def test_runs_are_shorter_and_agree_bitwise(name: str, method: str) -> None:
    host = under(name, CONFIGS[method])
    entrance = host.denoiser.get_submodule("patch_embedding")
    with counting([entrance]) as counts:
        made = host.make()
    assert counts[0] <= 0.6 * 10 * host.branches
    assert made.isfinite().all() and not torch.equal(made, plain(name))
    assert torch.equal(host.make(), made)
    assert torch.equal(fresh(name, method), made)


@hosts
def test_what_was_taken_off_has_left_nothing(name: str) -> None:
    host = HOSTS[name]()
    before = traces(host.denoiser)
    host.put(CONFIGS["budget"])
    host.make()
    host.take()
    assert traces(host.denoiser) == before
    assert torch.equal(host.make(), plain(name))


@hosts
@pytest.mark.parametrize("call", [0, 1, 5])
def test_the_next_run_does_not_know_of_one_that_broke_off(name: str, call: int) -> None:
    host = under(name, CONFIGS["budget"])
    with breaking_off(host.denoiser, call), pytest.raises(BreakingOff):
        host.make()
    assert torch.equal(host.make(), fresh(name, "budget"))
    host.take()
    assert torch.equal(host.make(), plain(name))


@pytest.mark.parametrize(("name", "other"), covering(HOSTS, OTHERS))
def test_another_request_begins_anew(name: str, other: str) -> None:
    host = under(name, CONFIGS["budget"])
    host.make()
    with breaking_off(host.denoiser, 5), pytest.raises(BreakingOff):
        host.make()
    assert torch.equal(host.make(**OTHERS[other]), fresh(name, "budget", other))
    assert torch.equal(host.make(), fresh(name, "budget"))


@hosts
def test_other_weights_begin_anew(name: str) -> None:
    def change(host: Host) -> None:
        with torch.no_grad():
            for parameter in host.denoiser.parameters():
                parameter.mul_(0.9)

    host, other = under(name, CONFIGS["budget"]), HOSTS[name]()
    host.make()
    change(host)
    change(other)
    other.put(CONFIGS["budget"])
    assert torch.equal(host.make(), other.make())


@hosts
def test_a_report_says_what_was_done(name: str) -> None:
    host = under(name, CONFIGS["budget"])
    with counting([host.denoiser.get_submodule("patch_embedding")]) as counts:
        host.make()
    report = host.report()
    ran = [step for step in report["steps"] if step["action"] in ("compute", "partial")]
    calls = len({step["branch"] for step in report["steps"]})
    assert report["method"] == "budget" and report["complete"]
    assert report["step_count"] == 10 and report["computed_steps"] == 5
    assert len(ran) * host.branches == counts[0] * calls
    assert report["estimated_speedup"] == pytest.approx(2, rel=0.05)
    assert [step["sigma"] for step in report["steps"]] == sorted((s["sigma"] for s in report["steps"]), reverse=True)


@hosts
def test_a_target_that_the_steps_cannot_give_is_said(name: str) -> None:
    host = under(name, BudgetConfig(target_speedup=3))
    quietly(lambda: host.make(steps=4))
    assert any("target_speedup=3 cannot be had of 4 steps: 2 are computed" in note for note in host.report()["notes"])


@hosts
def test_what_cannot_work_says_so_before_the_first_step(name: str) -> None:
    for case in range(len(HOSTS[name]().refused())):
        host = HOSTS[name]()
        attempt, said = host.refused()[case]
        with counting([host.denoiser]) as counts, pytest.raises(UnicpError, match=said):
            attempt()
        assert counts == [0]
