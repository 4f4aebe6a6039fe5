"""UniCP acts inside the steps that a budget computes."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest

import unicp
from tests.tiny import FAMILIES
from unicp import BudgetConfig, Profile, UniCPConfig
from unicp.policies.plans.step_plan import computing

WAN = FAMILIES["wan"]
PLAN = computing(10, {0, 1, 2, 4, 5, 6, 8, 9})


@pytest.mark.parametrize("family", ["wan", "ltx", "hunyuan-video-1.5"])
def test_skipped_steps_are_filled_as_ever(family: str) -> None:
    chosen = FAMILIES[family]
    pipe = chosen.build()
    windows = UniCPConfig(delta=50.0, delta_mlp=0, fill="reuse", edcw="online", pcas=False)
    budget = BudgetConfig(target_speedup=1.0, override_reserve=0.0, correct=False, leap=0.0)
    with (
        patch("unicp.policies.plans.step_plan.untuned", lambda *_, **__: PLAN),
        unicp.accelerate(pipe, windows.replace(stack=budget)) as session,
    ):
        chosen.generate(pipe)
        actions = {record.index: record.action for record in session.report().steps}
    assert [index for index, action in actions.items() if action == "forecast"] == [3, 7]
    partial = {index for index, action in actions.items() if action == "partial"}
    assert partial and partial < set(PLAN.compute[1:])


@pytest.mark.usefixtures("by_steps")
def test_unicp_acts_inside_the_steps_of_a_tuned_plan(tmp_path: Path) -> None:
    path = tmp_path / "plans.safetensors"
    more = {"effort": "low", "progress": False, "target_speedup": 1.5}
    profile = WAN.run(WAN.build(), lambda run, **call: unicp.tune(run, None, **call), steps=20, **more)
    profile.save(path)
    budget = BudgetConfig(profile=str(path), target_speedup=1.5)
    runs = []
    for config in (budget, UniCPConfig(stack=budget, delta=5.0, edcw="online")):
        pipe = WAN.build()
        session = unicp.accelerate(pipe, config)
        WAN.generate(pipe, steps=20)
        runs.append(session.report())
    alone, inside = ({r.index for r in report.steps if r.action in ("forecast", "leap", "reuse")} for report in runs)
    assert alone == inside != set()
    assert runs[1].computed_fraction < 0.8 * runs[0].computed_fraction
    assert not any("no profile" in note for note in runs[1].notes)
    session = unicp.accelerate(WAN.build(), UniCPConfig(stack=budget, delta=0, pcas=False))  # nothing to do inside
    assert session._hooked[0].parts.book is not None
    inside = Profile(config=UniCPConfig(stack=budget), metadata={})
    inside.save(tmp_path / "inside.safetensors")
    with pytest.raises(unicp.UnicpError, match="names another profile in its stack"):
        unicp.accelerate(WAN.build(), tmp_path / "inside.safetensors")
