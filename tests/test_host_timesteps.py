"""What ``set_timesteps`` sends to the device is known on the host, without a read."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from typing import Any

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

import unicp
from tests.tiny import FAMILIES
from unicp.engine.solver.timesteps import keep_on_host, leave
from unicp.offline.pretend import DEVICE, Pretend
from unicp.tensors.host import listed

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
WAN = FAMILIES["wan"]


class User:
    """Somebody who wants the method replaced."""


def made(kind: Any, config: dict[str, Any], device: Any, *args: Any, **kwargs: Any) -> Any:
    scheduler = kind(**config)
    scheduler.set_timesteps(*args, device=device, **kwargs)
    return scheduler


@pytest.mark.parametrize(
    ("kind", "config", "call"),
    [
        (FlowMatchEulerDiscreteScheduler, {"shift": 7.0}, {"num_inference_steps": 9}),
        (FlowMatchEulerDiscreteScheduler, {"use_dynamic_shifting": True}, {"sigmas": [1.0, 0.5, 0.2], "mu": 1.3}),
        (UniPCMultistepScheduler, FLOW, {"num_inference_steps": 9}),
    ],
)
def test_its_values_are_known_without_a_read(kind: Any, config: dict[str, Any], call: dict[str, Any]) -> None:
    plain = made(kind, config, "cpu", **call)
    user = User()
    keep_on_host(plain, user)
    try:
        with Pretend() as device:
            there = made(kind, config, DEVICE, **call)
            assert there.timesteps.device == DEVICE
            assert listed(there.timesteps) == plain.timesteps.tolist()
            assert listed(there.sigmas) == plain.sigmas.tolist()
            assert not device.reads
            there.timesteps.neg_()  # somebody writes to it
            listed(there.timesteps)
            assert len(device.reads) == 1
    finally:
        leave(user)


def test_the_class_has_its_own_method_back_when_the_last_one_leaves() -> None:
    class Own(FlowMatchEulerDiscreteScheduler):
        """A class that nobody else uses."""

        def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
            super().set_timesteps(num_inference_steps, device=device)

    own, users = Own.set_timesteps, (User(), User())
    for user in users:
        keep_on_host(Own(), user)
    assert Own.set_timesteps is not own
    assert inspect.signature(Own.set_timesteps) == inspect.signature(own)
    leave(users[0])
    assert Own.set_timesteps is not own
    leave(users[1])
    leave(users[1])
    assert Own.set_timesteps is own


def test_what_others_have_put_around_it_stays() -> None:
    class Own(FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
            super().set_timesteps(num_inference_steps, device=device)

    user, asked = User(), []
    keep_on_host(Own(), user)
    ours = Own.set_timesteps

    @functools.wraps(ours)
    def theirs(self: Any, *args: Any, **kwargs: Any) -> None:
        asked.append(args)
        ours(self, *args, **kwargs)

    Own.set_timesteps = theirs  # type: ignore[method-assign]
    leave(user)
    Own().set_timesteps(4)
    assert asked == [(4,)]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_of_a_scheduler_set_their_own_timesteps(copied: Any) -> None:
    pipe = WAN.build()
    session = unicp.accelerate(pipe, unicp.BudgetConfig(target_speedup=2))
    pipe.scheduler.set_timesteps(10)
    other = copied(pipe.scheduler)
    other.set_timesteps(4)
    assert len(other.timesteps) == 4
    assert len(pipe.scheduler.timesteps) == 10
    session.restore()


def test_restoring_puts_the_method_back_whoever_accelerated_last() -> None:
    class Own(UniPCMultistepScheduler):
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            super().set_timesteps(*args, **kwargs)

    first, second = WAN.build(), WAN.build()
    for pipe in (first, second):
        pipe.scheduler = Own.from_config(pipe.scheduler.config)
    before = vars(Own)["set_timesteps"]
    unicp.accelerate(first, unicp.BudgetConfig(target_speedup=2))
    unicp.accelerate(first, unicp.BudgetConfig(target_speedup=3))
    unicp.accelerate(second, unicp.BudgetConfig(target_speedup=2))
    unicp.restore(first)
    unicp.restore(second)
    assert vars(Own)["set_timesteps"] is before
