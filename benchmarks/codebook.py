"""Derive an AdaCache codebook for the demo model (ours; the paper publishes codebooks for Open-Sora only).

    python -m benchmarks.codebook [--prompts 4] [--budget 0.48]

The unaccelerated model is run on captions from its training split, measuring the change per step as AdaCache does.
Candidate codebooks have the rates 4, 3, 2, 1 with thresholds at quantiles of those changes. Of those that compute at
most the budgeted share of the steps, the one with the best mean PSNR on these captions is printed, its thresholds
rounded to two digits. Held-out captions are not looked at. The median motion score is MoReg's scale for this model.
"""

from __future__ import annotations

import argparse
from statistics import mean, median

import numpy as np
from rich.progress import track

import unicp
from benchmarks import common
from unicp import AdaCacheConfig
from unicp.tensors import metrics

QUANTILES = (
    (0.15, 0.50, 0.80), (0.00, 0.40, 0.70), (0.30, 0.60, 0.90), (0.20, 0.60, 0.95), (0.40, 0.70, 0.95),
    (0.50, 0.80, 0.95),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--budget", type=float, default=0.48, help="largest mean share of computed steps")
    args = parser.parse_args()
    pipe = common.pipeline()
    prompts = common.training_prompts(args.prompts)

    baselines, changes, motions = [], [], []
    everything = AdaCacheConfig(codebook=((1.0, 1),), moreg=True)
    for prompt in track(prompts, "measuring"):
        with unicp.accelerate(pipe, everything) as session:
            baselines.append(common.generate(pipe, prompt))
            steps = [record for record in session.report().steps if record.metric is not None]
        changes.append([record.metric for record in steps])
        motions += [record.motion for record in steps]
    free = np.array(changes)[:, 1:-2].ravel()  # without the forced steps
    candidates = []
    for quantiles in track(QUANTILES, "candidates"):
        thresholds = [float(f"{np.quantile(free, q):.2g}") if q else None for q in quantiles]
        entries = [(t, rate) for t, rate in zip(thresholds, (4, 3, 2), strict=True) if t is not None]
        if [t for t, _ in entries] != sorted({t for t, _ in entries}):
            continue
        codebook = (*entries, (1.0, 1))
        psnr, fraction = [], []
        with unicp.accelerate(pipe, AdaCacheConfig(codebook=codebook)) as session:
            for prompt, baseline in zip(prompts, baselines, strict=True):
                psnr.append(metrics.psnr(common.generate(pipe, prompt).frames, baseline.frames))
                fraction.append(session.report().computed_steps / unicp.demo.STEPS)
        candidates.append({"codebook": codebook, "computed": mean(fraction), "psnr": mean(psnr), "worst": min(psnr)})
    for candidate in candidates:
        print(
            f"{candidate['computed']:6.1%}  {candidate['psnr']:5.1f} dB  worst {candidate['worst']:5.1f}  "
            f"{candidate['codebook']}"
        )
    within = [c for c in candidates if c["computed"] <= args.budget]
    best = max(within, key=lambda c: c["psnr"]) if within else None
    print(f"\nchosen: {best}\nmedian motion score: {median(motions):.4f}")
    common.save(
        "codebook",
        {"prompts": prompts, "budget": args.budget, "candidates": candidates, "chosen": best,
         "median_motion": median(motions), "mean_change_per_step": np.array(changes).mean(0).round(4).tolist()},
    )  # fmt: skip


if __name__ == "__main__":
    main()
