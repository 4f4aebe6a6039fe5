"""Every published model with every method, rehearsed at 480p and 720p: ``docs/rehearsal.md``.

    python -m benchmarks.rehearsal [--models wan-1.3b,wan-14b] [--steps 20]
    python -m benchmarks.rehearsal --docs

Nothing is computed and no accelerator is needed (:mod:`unicp.offline.rehearse`). What is done already is kept in
``benchmarks/results/rehearsal.json``, from which ``--docs`` writes the page.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import common, figures
from unicp.engine.report import readable_bytes
from unicp.offline import pretend, published, rehearse

STEPS = 20
MEMORY = {("wan-1.3b", "480p"): 24e9, ("wan-14b", "720p"): 80e9}
"""Bytes of the accelerators on which UniCP has to have room beside these."""
LINK = 64e9
"""Peak bytes a second between host and device: PCI Express 5.0, 16 lanes."""
PAGE = Path(__file__).resolve().parent.parent / "docs" / "rehearsal.md"
RESULTS = Path(__file__).resolve().parent / "results" / "rehearsal.json"


def known() -> dict[str, Any]:
    return figures.read(RESULTS)["rows"] if RESULTS.is_file() else {}


def rows(made: rehearse.Rehearsal) -> dict[str, Any]:
    """What the table says of one model at one size."""
    named = {"unaccelerated": made.plain, **made.methods}
    return {
        "size": f"{made.width}x{made.height}",
        "frames": made.frames,
        "steps": made.steps,
        "weights_bytes": made.weights_bytes,
        "methods": [
            {
                "method": name,
                "giga_operations": {kind: round(count / 1e9) for kind, count in each.operations.items()},
                "computed_fraction": round(each.computed_fraction, 4),
                "speedup": round(each.speedup, 3),
                "seconds": round(each.seconds, 2),
                "kept_bytes": each.kept_bytes,
                "peak_bytes": each.peak_bytes,
                "measuring_bytes": each.measuring_bytes,
                "reads": each.reads,
            }
            for name, each in named.items()
        ],
    }


def rehearsed(name: str, steps: int) -> None:
    model = published.published(name)
    with pretend.Unfilled():
        pipe = model.build(pretend.DEVICE)
    for label, (width, height) in model.sizes.items():
        memory = MEMORY.get((name, label))
        made = rehearse.rehearse(
            model,
            published.configs(),
            width=width,
            height=height,
            frames=model.frames,
            steps=steps,
            device=pretend.DEVICES["h100"],
            memory=None if memory is None else int(memory),
            pipe=pipe,
            on_run=lambda what: print(f"{name} {label}: {what}", flush=True),  # noqa: B023
        )
        print(made, flush=True)
        found = {**known(), f"{name} {label}": rows(made)}
        common.save("rehearsal", {"rows": found}, made_by="python -m benchmarks.rehearsal")


def page() -> str:
    """The page of the documentation."""
    found = known()
    order = [f"{name} {label}" for name, model in published.MODELS.items() for label in model.sizes]
    lines = []
    for key in order:
        if key not in found:
            continue
        each = found[key]
        lines.append(
            f"| **{key}** | {each['size']}, {each['frames']} frames; weights {readable_bytes(each['weights_bytes'])} "
            "| | | | | | | |"
        )
        for row in each["methods"]:
            kinds = row["giga_operations"]
            whole = sum(kinds.values())
            attention = kinds.get("self-attention", 0) / (whole or 1)
            lines.append(
                f"| | {row['method']} | {whole / 1e6:.1f} | {row['computed_fraction']:.0%} | {attention:.0%} "
                f"| {readable_bytes(row['kept_bytes'])} | {readable_bytes(row['peak_bytes'])} | {row['reads']} "
                f"| {row['speedup']:.2f}x |"
            )
    heads = "| model | method | PFLOP | share | of it self-attention | kept | peak | reads | projected |"
    table = "\n".join([heads, "|---|---|--:|--:|--:|--:|--:|--:|--:|", *lines])
    return between(between(PAGE.read_text("utf-8"), "table", table), "table of the host", from_host(found))


def between(text: str, name: str, table: str) -> str:
    """The page with another table between two comments."""
    begin, end = f"<!-- {name} -->", f"<!-- end of the {name} -->"
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{table}\n{end}{rest.partition(end)[2]}"


def from_host(found: dict[str, Any]) -> str:
    """What it would cost to keep UniCP's outputs in the host's memory, at 720p: all of them, wherever they fit."""
    lines = [
        "| 720p | kept | a step | a filled one, from the host | kept on the device | kept on the host | budget |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for key, row in found.items():
        model, size = key.split()
        if size != "720p" or (model, size) in MEMORY:
            continue
        methods = {each["method"]: each for each in row["methods"]}
        whole, unicp, budget = (methods[name] for name in ("unaccelerated", "unicp, all", "budget"))
        filled = round((1 - unicp["computed_fraction"]) * row["steps"])
        brought = unicp["kept_bytes"] / LINK
        rest = unicp["seconds"] + filled * brought
        lines.append(
            f"| {model} | {readable_bytes(unicp['kept_bytes'])} | {whole['seconds'] / row['steps']:.1f} s "
            f"| {brought:.1f} s | {unicp['speedup']:.2f}x | {whole['seconds'] / rest:.2f}x | {budget['speedup']:.2f}x |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(published.MODELS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--docs", action="store_true", help="write docs/rehearsal.md from what is known")
    args = parser.parse_args(arguments)
    if args.docs:
        PAGE.write_text(page(), "utf-8")
        return
    for name in args.models.split(","):
        rehearsed(name, args.steps)


if __name__ == "__main__":
    main()
