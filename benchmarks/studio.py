"""The picture of the studio in the README: its page in a headless Chromium, with a video of the demo model.

    python -m benchmarks.studio            # the figures on it are timed: run it alone

Needs the extra ``studio`` and a Chromium.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from tests import browser
from unicp.cli import studio
from unicp.studio import server
from unicp.studio.page import build
from unicp.studio.workshop import Workshop

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "studio.png"
PATIENCE = 600.0
"""Seconds after which the videos must be there."""


def main() -> None:
    program = browser.find()
    if program is None:
        raise SystemExit("no Chromium on this machine; on Debian: apt-get install chromium")
    page = server.launch(build(Workshop(studio.backend("cpu", None)), ["demo"]))
    try:
        with (
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
            browser.Browser(program, Path(profile)) as chromium,
        ):
            chromium.view(1400, 900)
            chromium.open(page.local_url)
            chromium.wait("document.querySelector('#hint')?.innerText.includes('speed')")
            chromium.run("document.querySelector('#make').click()")
            until = time.monotonic() + PATIENCE
            while not chromium.run("document.body.innerText.includes('1. budget')"):
                if time.monotonic() > until:
                    raise SystemExit(chromium.run("document.querySelector('#status').innerText"))
                time.sleep(1.0)
            chromium.wait("document.querySelector('.unicp-player').player.frame >= 6")
            print(f"written: {chromium.screenshot(PICTURE)}")
    finally:
        page.close(verbose=False)


if __name__ == "__main__":
    main()
