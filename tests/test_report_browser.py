"""The report in a real browser: it loads, plays, switches prompts and methods, in light and dark and on a phone."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import WanPipeline
from PIL import Image

import unicp
from tests.browser import Browser, find

PROMPTS = ["a red ball bouncing", "a blue star"]
STATE = "window.unicpPlayer"


@pytest.fixture(scope="module")
def page(wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe = WanPipeline.from_pretrained(wan_folder)
    pipe.set_progress_bar_config(disable=True)
    sizes: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 6}
    comparison = unicp.compare(pipe, ["schedule", "fewer-steps"], PROMPTS, progress=False, **sizes)
    return comparison.report(tmp_path_factory.mktemp("report") / "report.html", fps=8)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Any:
    program = find()
    if program is None:
        pytest.skip("no Chromium on this machine; on Debian: apt-get install chromium")
    with Browser(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def pixels(browser: Browser, canvas: str) -> np.ndarray:
    size = f"document.getElementById('{canvas}')"
    data = browser.run(f"Array.from({size}.getContext('2d').getImageData(0, 0, {size}.width, {size}.height).data)")
    return np.asarray(data).reshape(32, 48, 4)[..., :3]


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(("width", "phone"), [(1200, False), (390, True)], ids=["desk", "phone"])
def test_the_report(browser: Browser, page: Path, tmp_path: Path, width: int, phone: bool, dark: bool) -> None:
    browser.view(width, 800, dark=dark, phone=phone)
    browser.open(page)
    browser.wait(f"{STATE} && {STATE}.drawn > 0")
    assert browser.run("document.documentElement.scrollWidth") <= width  # nothing runs over the side

    browser.run("document.getElementById('play').click()")
    browser.wait(f"{STATE}.frame === 3")
    browser.run("document.getElementById('play').click()")
    assert browser.run(f"{STATE}.playing") is False

    one, other, apart = (pixels(browser, name) for name in ("left", "right", "difference"))
    assert one.std() > 0 and not np.array_equal(one, other)
    assert np.array_equal(apart, np.minimum(255, np.abs(one - other) * 4))

    browser.run("{const s = document.getElementById('prompt'); s.value = '1'; s.onchange()}")
    browser.wait(f"{STATE}.prompt === 1")
    browser.wait(f"{STATE}.drawn > 5")
    assert not np.array_equal(pixels(browser, "left"), one)
    browser.run("{const s = document.getElementById('method'); s.value = 'fewer-steps steps=2'; s.onchange()}")
    assert "fewer-steps steps=2" in browser.run("document.getElementById('right-text').textContent")

    browser.run("{const s = document.getElementById('measure'); s.value = 'ssim'; s.onchange()}")
    assert browser.run("document.querySelectorAll('#charts figure:not([hidden])').length") == 1
    browser.run("document.querySelector('.legend button').click()")
    assert browser.run("document.querySelectorAll('#charts .curve.off').length") > 0

    shot = Image.open(io.BytesIO(browser.screenshot(tmp_path / "report.png").read_bytes())).convert("L")
    assert (np.asarray(shot)[:40].mean() < 100) == dark  # the paper's brightness
    assert shot.size[1] > 2000
    assert not browser.errors
