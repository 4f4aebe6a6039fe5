"""Write the measured figures into the README, from the committed results.

    python -m benchmarks.readme            # after make bench

A test holds the README to these files, so no number in it comes from anywhere else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results: python -m benchmarks.readme -->", "<!-- end of results -->"


def _load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def block() -> str:
    """The README's section between the markers."""
    ada, overhead = _load(RESULTS / "adacache.json"), _load(RESULTS / "overhead.json")
    evaluation = _load(ROOT / "training" / "evaluation.json")
    provenance = ada["provenance"]
    machine, versions = provenance["machine"], provenance["versions"]
    lines = [
        f"The demo model, {ada['steps']} steps, guidance {ada['guidance']:g}, {len(ada['prompts'])} captions it "
        "never saw; against the unaccelerated",
        "video of the same prompt and seed. Speed-up: wall-clock of the denoising loop, interleaved runs, median "
        f"of {len(ada['seconds']['none'])} pairs.",
        "",
        "| method | steps computed | speed-up | PSNR, mean / worst | SSIM | motion ratio | kept |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in ada["table"]:
        kept = f"{row['cache_bytes'] / 2**20:.1f} MiB" if row["cache_bytes"] else ""
        lines.append(
            f"| {row['method']} | {row['computed_steps'] / ada['steps']:.0%} | {row['speedup']['median']:.2f}× "
            f"| {row['psnr']:.1f} / {row['psnr_worst']:.1f} dB | {row['ssim']:.3f} | {row['motion_ratio']:.2f} "
            f"| {kept} |"
        )
    every = overhead["ratios"]["adacache, computing all"]["median"] - 1
    right = evaluation["right_of_asked"]["all videos"]
    lines += [
        "",
        f"The engine's overhead when it computes everything: {every:+.1%} of the loop's time "
        "(`python -m benchmarks.overhead`).",
        "",
        f"`{provenance['command']}`, {provenance['date']}, {machine['processor']}, {machine['cores']} cores; "
        f"torch {versions['torch']}, diffusers {versions['diffusers']}.",
        "",
        "The demo model itself, judged from the pixels of "
        f"{right['colour'][1]} held-out videos: "
        + ", ".join(f"{name} right in {100 * good / asked:.0f}%" for name, (good, asked) in right.items())
        + " (`python -m training.evaluate`).",
    ]
    return "\n".join([BEGIN, "", *lines, "", END])


def main() -> None:
    path = ROOT / "README.md"
    text = path.read_text()
    before, _, rest = text.partition(BEGIN)
    path.write_text(before + block() + rest.partition(END)[2])
    print("README.md written")


if __name__ == "__main__":
    main()
