"""Draw what AdaCache decided: steps of several prompts, computed or reused, over the measured change.

python -m benchmarks.timeline [--prompts 8] [-o docs/images/timeline.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap

import unicp
from benchmarks import common
from unicp import AdaCacheConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/images/timeline.png"))
    args = parser.parse_args()
    pipe = common.pipeline()
    prompts = unicp.demo.prompts(args.prompts)
    rows, fractions = [], []
    fig, (top, bottom) = plt.subplots(
        2, 1, figsize=(9, 5.2), sharex=True, height_ratios=(2, 1), constrained_layout=True, dpi=150
    )
    for prompt in prompts:
        with unicp.accelerate(pipe, AdaCacheConfig()) as session:
            common.generate(pipe, prompt)
            report = session.report()
        cond = [record for record in report.steps if record.branch == "cond"]
        rows.append([1 if record.action == "compute" else 0 for record in cond])
        fractions.append(report.computed_fraction)
        measured = [(record.index, record.metric) for record in cond if record.metric is not None]
        bottom.plot(*zip(*measured, strict=True), marker="o", markersize=2.5, linewidth=0.8, alpha=0.8)
    top.pcolormesh(
        range(len(rows[0]) + 1), range(len(rows) + 1), rows, cmap=ListedColormap(["#d9e6f2", "#1f5a91"]),
        edgecolors="white", linewidth=0.8,
    )  # fmt: skip
    top.set_yticks([i + 0.5 for i in range(len(rows))])
    top.set_yticklabels(
        [f"{p if len(p) <= 58 else p[:57] + '…'}  {f:.0%}" for p, f in zip(prompts, fractions, strict=True)], fontsize=6
    )
    top.invert_yaxis()
    top.set_title("AdaCache on the demo model: computed steps (dark) and reused steps (light)", fontsize=9)
    bottom.set_ylabel("relative change of the\nmiddle block's attention\nsince the last computed step", fontsize=7)
    bottom.set_xlabel("denoising step", fontsize=8)
    bottom.tick_params(labelsize=7)
    bottom.set_ylim(0)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(args.output)
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
