"""Every method and peer on the demo model: the committed comparison.

    python -m benchmarks.compare [--prompts 32] [--steps 50] [--methods NAME,...] [--repeats 1]

Run it once with ``--steps 50`` and once with ``--steps 30``. It may be interrupted: every run is kept in
``benchmarks/results/compare-STEPS.sqlite`` (not committed), and the same command goes on from there. What is committed
is ``compare-STEPS.json``, all figures without the videos. The report, with videos, lies beside it as ``.html``.
The prompts are captions that the demo model was not trained on; MagCache is calibrated on one from the training side.
"""

from __future__ import annotations

import argparse

import unicp
from benchmarks import common


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32, help="held-out captions")
    parser.add_argument("--steps", type=int, default=unicp.demo.STEPS, help="denoising steps")
    parser.add_argument("--methods", help="names with commas between; by default all")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", default=None, help="name of the results, without ending; by default compare-STEPS")
    args = parser.parse_args()
    common.RESULTS.mkdir(exist_ok=True)
    place = common.RESULTS / (args.out or f"compare-{args.steps}")
    comparison = unicp.compare(
        common.pipeline(),
        args.methods.split(",") if args.methods else None,
        unicp.demo.prompts(args.prompts),
        repeats=args.repeats,
        results=place.with_suffix(".sqlite"),
        calibration_prompt=common.training_prompts(1)[0],
        height=unicp.demo.HEIGHT,
        width=unicp.demo.WIDTH,
        num_frames=unicp.demo.FRAMES,
        num_inference_steps=args.steps,
        guidance_scale=unicp.demo.GUIDANCE,
    )
    print(comparison)
    print(f"written: {comparison.save(place.with_suffix('.json')).name}")
    print(f"written: {comparison.report(place.with_suffix('.html'), fps=unicp.demo.FPS).name}")


if __name__ == "__main__":
    main()
