"""The contact sheet of a batch: one HTML file with everything in it."""

from __future__ import annotations

import base64
import contextlib
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..files import whole
from .manifest import DONE, FAILED, Entry, Manifest, record_path
from .progress import duration

FILE = "summary.html"

STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: clamp(.8rem, 3vw, 2rem); color: #1c1c1c; background: #fff }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 1rem }
a { color: inherit }
figure { margin: 0 } img { width: 100%; height: auto; background: #ddd; border-radius: 4px }
figcaption { font-size: 13px; overflow-wrap: anywhere } small { color: #595959 }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0 }
@media (prefers-color-scheme: dark) { body { background: #161616; color: #eee } small { color: #aaa } }
"""


def _picture(manifest: Manifest, entry: Entry) -> bytes | None:
    """The thumbnail of a clip, made from its file if a killed batch left none."""
    kept = manifest.thumbnail(entry.key)
    if kept is not None:
        return kept
    with contextlib.suppress(Exception):  # a missing picture is no reason to fail
        from .worker import thumbnail

        return thumbnail(_first_frame(manifest.folder / entry.name))
    return None


def _first_frame(path: Path) -> Any:
    import imageio.v3
    import numpy as np
    from PIL import Image

    if path.suffix.lower() == ".mp4":
        return np.asarray(imageio.v3.imread(path, index=0))[None]
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))[None]


def _figure(manifest: Manifest, entry: Entry) -> str:
    picture = _picture(manifest, entry)
    source = f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}" if picture else ""
    about = [f"seed {entry.seed}"]
    if entry.fraction is not None:
        about.append(f"{entry.fraction:.0%} computed")
    if entry.seconds:
        about.append(f"{entry.seconds:.1f} s")
    record = record_path(Path(entry.name)).name
    about = [each.replace(" ", "&nbsp;") for each in about]  # a number stays with its unit
    image = f'<img src="{source}" alt="{escape(entry.prompt)}" loading="lazy">' if source else "video"
    return (
        f'<figure><a href="{quote(entry.name)}">{image}</a><figcaption>{escape(entry.prompt)}<br>'
        f'<small>{", ".join(about)} · <a href="{quote(record)}">record</a></small></figcaption></figure>'
    )


def write(manifest: Manifest) -> Path:
    """Write ``summary.html`` beside the clips, whole or not at all, and return its path."""
    entries = manifest.entries()
    done = [entry for entry in entries if entry.state == DONE]
    failed = [entry for entry in entries if entry.state == FAILED]
    fractions = [entry.fraction for entry in done if entry.fraction is not None]
    facts = [f"{len(done)} of {len(entries)} clips"]
    if fractions:
        facts.append(f"{sum(fractions) / len(fractions):.0%} of the denoiser's operations computed, on average")
    if done:
        facts.append(f"{duration(sum(entry.seconds or 0.0 for entry in done))} of work")
    path = manifest.folder / FILE
    with whole.staged(path) as part, part.open("w", encoding="utf-8") as file:
        file.write(
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(manifest.folder.name)}</title>'
        )
        file.write(f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>')
        file.write(f"<h1>{escape(manifest.folder.name)}</h1><p>{'; '.join(facts)}</p>")
        if failed:
            file.write(f"<h2>{len(failed)} failed</h2><table><tr><th>prompt<th>seed<th>why")
            for entry in failed:
                file.write(f"<tr><td>{escape(entry.prompt)}<td>{entry.seed}<td>{escape(entry.error or '')}")
            file.write("</table>")
        file.write("<main>")
        for entry in done:
            file.write(_figure(manifest, entry))
        file.write("</main></html>\n")
    return path
