"""``unicp inspect`` shows what is in a profile, or how a video was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from ..errors import UnicpError
from .screen import messages, results

FIGURES_HELP = "Folder for the figures; by default beside the profile. They need matplotlib (extra plots)."


def inspect(
    file: Path = typer.Argument(..., metavar="PROFILE|VIDEO", help="A .safetensors profile, or a video or its .json."),
    output: Path | None = typer.Option(None, "-o", "--output", metavar="FOLDER", help=FIGURES_HELP),
    kind: str = typer.Option("png", "--format", metavar="NAME", help="png or svg."),
    figures: bool = typer.Option(True, "--figures/--no-figures", help="Write figures too."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """Shows what a profile holds, as text and figures, or what was done at each step of a video.

    [bold]Examples[/bold]

    unicp inspect demo.safetensors

    unicp inspect demo.safetensors -o figures/ --format svg

    unicp inspect a-red-ball.mp4
    """
    screen = results()
    if file.suffix.lower() != ".safetensors":
        screen.print(_video(file), markup=False, soft_wrap=True)
        return
    from ..offline import inspect as inspection
    from ..profiles import Profile

    if kind not in ("png", "svg"):
        raise UnicpError(f"--format must be png or svg, got {kind!r}")
    profile = Profile.load(file)
    screen.print(inspection.text(profile), markup=False, soft_wrap=True)
    if figures:
        try:
            written = inspection.draw(profile, output or file.parent, file.stem, f".{kind}")
        except UnicpError as error:
            if output is not None:
                raise
            written = []  # matplotlib is missing, but figures were not asked for
            messages().print(f"no figures: {error}", markup=False, soft_wrap=True)
        for path in written:
            screen.print(f"wrote {path}", markup=False, soft_wrap=True)


def _video(file: Path) -> str:
    """The report in the .json beside a video, as ``unicp generate`` printed it."""
    from ..engine.report import SessionReport, StepRecord

    record = file.with_suffix(".json")
    try:
        values: dict[str, Any] = json.loads(record.read_text("utf-8"))
        report = values["report"]
    except FileNotFoundError:
        raise UnicpError(
            f"there is no {record}; unicp inspect reads a profile, or a video that unicp generate made"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnicpError(f"{record} was not written by unicp generate: {error!r:.120}") from None
    if report is None:
        return f"{values.get('prompt', file.name)}\nunaccelerated"
    try:
        records = tuple(StepRecord(**step) for step in report["steps"])
        names = ("method", "computed_fraction", "cache_bytes", "sliced_bytes", "seconds", "complete")
        counts = {name: report[name] for name in ("operations", "all_operations") if name in report}
        shown = SessionReport(
            steps=records, notes=tuple(report.get("notes", ())), **{name: report[name] for name in names}, **counts
        )
    except (KeyError, TypeError) as error:
        raise UnicpError(f"the report in {record} was written by another version of unicp: {error!r:.120}") from None
    lines = [str(values.get("prompt", file.name)), str(shown)]
    lines += [f"  {unit[-18:]:<18}{line[:60]}" for unit, line in shown.unit_timeline().items()]
    return "\n".join(lines)
