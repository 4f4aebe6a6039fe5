"""The studio's page in a real browser: it runs, cancels, refuses, remembers, and nothing leaves the machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.browser import Browser, find
from unicp.cli import studio as verb
from unicp.studio import server
from unicp.studio.workshop import Workshop

pytestmark = pytest.mark.slow
PROMPT = "a red ball bouncing"
PLAYER = "document.querySelector('.unicp-player').player"


@pytest.fixture(scope="module")
def address(wan_folder: Path) -> Iterator[str]:
    from unicp.studio.page import build  # loads gradio, which takes seconds wherever tests are collected

    page = server.launch(build(Workshop(verb.backend("cpu", None)), [str(wan_folder), "demo"]))
    yield page.local_url
    page.close(verbose=False)


class Page:
    """One page of the studio, as a person uses it."""

    def __init__(self, browser: Browser, address: str) -> None:
        self.browser = browser
        browser.view(1400, 900)
        browser.open(address)
        browser.wait("!!document.querySelector('#make') && document.querySelector('#hint').innerText.includes('speed')")

    def write(self, field: str, text: str) -> None:
        self.browser.run(
            f"{{const f = document.querySelector('#{field} textarea, #{field} input'); f.focus(); f.select()}}"
        )
        self.browser.send("Input.insertText", text=text)
        self.browser.run(f"document.querySelector('#{field} textarea, #{field} input').blur()")

    def small(self, steps: int = 8) -> None:
        """Sizes of the tiny model."""
        if not self.browser.run("!!document.querySelector('#size input, #size textarea')"):
            self.browser.run("document.querySelector('#more button').click()")
            self.browser.wait("!!document.querySelector('#size input, #size textarea')")
        for field, text in {"prompt": PROMPT, "size": "48x32", "frames": "5", "steps": str(steps)}.items():
            self.write(field, text)

    def press(self, button: str) -> None:
        self.browser.wait(f"!document.querySelector('#{button}').disabled")
        self.browser.run(f"document.querySelector('#{button}').click()")

    def status(self) -> str:
        return str(self.browser.run("document.querySelector('#status').innerText"))

    def wait(self, text: str, where: str = "status") -> None:
        self.browser.wait(f"document.querySelector('#{where}')?.innerText.includes({json.dumps(text)})")

    def text(self, where: str) -> str:
        return str(self.browser.run(f"document.querySelector('#{where}').innerText"))


@pytest.fixture
def open_page(address: str, tmp_path: Path) -> Iterator[Any]:
    program = find()
    if program is None:
        pytest.skip("no Chromium on this machine; on Debian: apt-get install chromium")
    with ExitStack() as stack:
        count = 0

        def opened() -> Page:
            nonlocal count
            count += 1
            return Page(stack.enter_context(Browser(program, tmp_path / f"profile-{count}")), address)

        yield opened


def test_a_run_is_shown_copied_and_remembered(open_page: Any, address: str) -> None:
    page = open_page()
    browser = page.browser
    assert browser.run("document.querySelector('.unicp-player').hidden")
    page.small()
    page.press("make")
    page.wait("PSNR", "figures")
    browser.wait(f"{PLAYER}.drawn > 3")
    assert "SSIM" in page.text("figures") and "motion" in page.text("figures") and "memory" in page.text("figures")
    assert browser.run("document.querySelectorAll('#decisions rect').length") == 16
    canvases = browser.run(
        "Array.from(document.querySelectorAll('.unicp-player canvas')).map((c) => {"
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "return [c.width, c.height, Math.max(...d.filter((_, i) => i % 4 < 3))]})"
    )
    assert [tuple(size[:2]) for size in canvases] == [(48, 32)] * 3 and all(size[2] > 0 for size in canvases)
    browser.run("document.querySelector('.unicp-player .play').click()")
    frame = browser.run(f"{PLAYER}.frame")
    arrow = "new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true})"
    browser.run(f"document.querySelector('.unicp-player .play').dispatchEvent({arrow})")
    assert browser.run(f"{PLAYER}.frame") == (frame + 1) % 5

    browser.send("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    browser.run("document.querySelector('#code button').click()")
    browser.wait("!!document.querySelector('#copy-python')")
    for button, said in (
        ("copy-python", "unicp.accelerate(pipe, unicp.BudgetConfig"),
        ("copy-command", "unicp generate 'a red"),
    ):
        page.press(button)
        page.wait("Copied", button)
        assert said in browser.run("navigator.clipboard.readText()")

    first = page.text("figures")
    page.write("seed", "4")
    page.press("make")
    page.wait("2. budget", "runs")
    assert page.text("runs").count(PROMPT) == 2
    browser.run("Array.from(document.querySelectorAll('#runs input')).at(-1).click()")  # the first one again
    browser.wait(f"document.querySelector('#figures').innerText === {json.dumps(first)}")

    hosts = browser.run("performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert hosts and all(host.startswith((address, "data:", "blob:")) for host in hosts)
    assert not browser.errors


def test_cancel(open_page: Any) -> None:
    page = open_page()
    page.small(steps=900)
    page.press("make")
    page.wait("step ")
    page.press("cancel")
    page.wait("Cancelled")
    page.small()
    page.press("make")
    page.wait("PSNR", "figures")
    assert page.status() == "" and not page.browser.errors


@pytest.mark.parametrize(
    ("field", "text", "said"),
    [
        ("prompt", " ", "The prompt is empty"),
        ("seed", "-3", "The seed must be a whole number"),
        ("size", "50x32", "Width 50 is not a multiple of"),
        ("seed", "four", "The seed must be a whole number, got 'four'"),
        ("guidance", "-1", "Guidance must be a number of at least 0"),
        ("steps", "0", "Steps must be a whole number of at least 1"),
        ("settings", "leap=7", "leap must be a number from 0 to 1"),
        ("model", "no/such folder", "There is no model folder"),
    ],
)
def test_bad_input_is_answered_in_a_sentence(open_page: Any, field: str, text: str, said: str) -> None:
    page = open_page()
    page.small()
    page.write(field, text)
    page.press("make")
    page.wait(said[1:])
    assert page.status().rstrip().endswith(".") and "Traceback" not in page.status()
    assert not page.browser.run("document.querySelector('#make').disabled")


def test_two_pages_take_turns(open_page: Any) -> None:
    one, two = open_page(), open_page()
    one.small(steps=900)
    two.small()
    two.write("seed", "21")
    one.press("make")
    one.wait("step ")
    two.press("make")
    two.wait("1 video is being made before this one")
    one.press("cancel")
    one.wait("Cancelled")
    two.wait("PSNR", "figures")
    assert "PSNR" not in one.text("figures")  # each its own


def test_a_page_that_is_closed_leaves_nothing_waiting(open_page: Any) -> None:
    one, two = open_page(), open_page()
    one.small(steps=900)
    one.press("make")
    one.wait("step ")
    one.browser.open("about:blank")
    two.small()
    two.write("seed", "22")
    two.press("make")
    two.wait("PSNR", "figures")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_it_fits(open_page: Any, width: int, dark: bool, tmp_path: Path) -> None:
    page = open_page()
    browser = page.browser
    browser.view(width, 900, dark=dark, phone=width == 390)
    page.small()
    page.press("make")
    page.wait("PSNR", "figures")
    browser.wait(f"{PLAYER}.drawn > 0")
    assert browser.run("document.documentElement.scrollWidth") <= width  # nothing runs over the side
    for part in (
        "#make",
        ".unicp-player .left",
        ".unicp-player .play",
        ".unicp-cards .card",
        "#decisions .unicp-scroll",
    ):
        box = browser.run(f"{{const r = document.querySelector('{part}').getBoundingClientRect(); [r.left, r.right]}}")
        assert box[0] >= 0 and box[1] <= width and box[1] - box[0] > 20, part
    assert browser.run("document.body.classList.contains('dark')") == dark
    browser.screenshot(tmp_path / "page.png")
    assert not browser.errors
