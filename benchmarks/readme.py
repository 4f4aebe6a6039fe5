"""Write the measured figures into the README and docs/results.md, from the committed results.

    python -m benchmarks.readme            # after make bench

A test holds both to these files, so no number in them comes from anywhere else.
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
    counted = evaluation["right_of_asked"]["all videos"]["colour"][1]
    right = {
        group: ", ".join(
            f"{name} {100 * good / asked:.0f}%" for name, (good, asked) in evaluation["right_of_asked"][group].items()
        )
        for group in ("one object", "two objects")
    }
    lines += [
        "",
        f"The engine's overhead when it computes everything: {every:+.1%} of the loop's time "
        "(`python -m benchmarks.overhead`).",
        "",
        f"`{provenance['command']}`, {provenance['date']}, {machine['processor']}, {machine['cores']} cores; "
        f"torch {versions['torch']}, diffusers {versions['diffusers']}.",
        "",
        f"The demo model itself, judged from the pixels of {counted} held-out videos (`python -m training.evaluate`), "
        f"is right with one object in: {right['one object']}; with two, where both have to be right, in: "
        f"{right['two objects']}.",
        "",
        "**At the same speed**, everybody's curve read at that speed-up; more in [docs/results.md](docs/results.md):",
        "",
        (RESULTS / "compare-50.md").read_text().strip(),
    ]
    return "\n".join([BEGIN, "", *lines, "", END])


def _provenance(results: dict[str, Any]) -> str:
    about = results["provenance"]
    machine, versions = about["machine"], about["versions"]
    return (
        f"`{about['command']}`, {about['date']}, {machine['gpu'] or machine['processor']}, {machine['cores']} cores; "
        f"torch {versions['torch']}, diffusers {versions['diffusers']}."
    )


def _table(results: dict[str, Any], name: str) -> list[str]:
    """A table of methods on the demo model."""
    lines = [
        f"{len(results['prompts'])} held-out captions, {results['steps']} steps; speed-up: wall-clock of the denoising "
        "loop, median over the captions, each",
        "against the unaccelerated run of the same caption a few runs before.",
        "",
        f"| {name} | arithmetic | speed-up | PSNR, mean / worst | SSIM | motion ratio |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in results["table"]:
        lines.append(
            f"| {row[name]} | {row['computed_fraction']:.0%} | {row['speedup']:.2f}× "
            f"| {row['psnr']:.1f} / {row['psnr_worst']:.1f} dB | {row['ssim']:.3f} | {row['motion_ratio']:.2f} |"
        )
    return [*lines, "", _provenance(results), ""]


def page() -> str:
    """docs/results.md."""
    lines = [
        "# Results",
        "",
        "Written by `python -m benchmarks.readme` from `benchmarks/results/`. All of it is one small model on a CPU:",
        "how the methods behave, not what a large model on a GPU will show. Quality is against the unaccelerated video",
        "of the same caption and seed. Arithmetic: share of the denoiser's parameters that calls run through.",
        "",
    ]
    ablation, budget, slicing = (_load(RESULTS / f"{name}.json") for name in ("ablation", "budget", "slicing"))
    lines += ["## UniCP, part by part", "", *_table(ablation, "variant")]
    lines += [
        "What was seen. The change from step to step is a U for self-attention and MLPs: high in the first ten",
        "steps, a third of that in the middle, rising again at the end; for cross-attention the right arm is low.",
        "Windows of every module's own, as in the paper, lose to fixed windows here: modules that are computed at",
        "different steps see each other's old outputs. With one window for all of them (`shared_windows`, ours)",
        "EDCW is ahead of fixed windows at the same arithmetic: by 2 dB at 41%, and at 48% by 5 dB over intervals",
        "by kind at 50%, as PAB has them. Slicing alone (without the shift) is the worst row: at 252 tokens attention",
        "is a small part of the time, so it saves nothing, and its error comes on top. The shift (DWS) does not beat",
        "EDCW alone on this model: with windows of their own it slices hardly anywhere and the rows are equal; with",
        "the shared one it slices where all would have been computed anew, for no time and 4 dB. Where slicing has",
        "room, at long sequences, is in a table below. All of it lies below fewer steps, on this model.",
        "",
    ]
    lines += ["![Change of the modules' outputs from step to step, and what UniCP does](images/unicp-curves.png)", ""]
    lines += ["![Slicing error by rank](images/unicp-slicing.png)", ""]
    lines += ["## The budget", "", *_table(budget, "method")]
    prediction = budget["prediction"]
    lines += [
        f"`min_psnr=35` was reached by {budget['min_psnr_35_reached']:.0%} of the captions. Predicted against real",
        f"error of {prediction['plans']} random plans, Spearman's rank correlation: "
        + ", ".join(f"{value:.2f} with {name}" for name, value in prediction["spearman"].items())
        + ".",
        f"Tuned on {budget['tuning_prompts']} captions of the training side. All of this section was measured before",
        "budgets leapt; the comparison in the README is newer, and has leaps.",
        "",
    ]
    lines += [
        "## Sliced attention by sequence length",
        "",
        f"One self-attention module of the Wan architecture, {slicing['heads']} heads of {slicing['head_size']},",
        "random weights: the whole module is timed, projections included. The error is that of random weights, which",
        "have no preferred directions: the worst there is.",
        "",
        "| tokens | rank | speed-up (least to most) | arithmetic | error, random weights |",
        "|---:|---:|---:|---:|---:|",
    ]
    for row in slicing["rows"]:
        ratio = row["speedup"]
        lines.append(
            f"| {row['tokens']} | {row['rank']} | {ratio['median']:.2f}× ({ratio['min']:.2f} to {ratio['max']:.2f}) "
            f"| {row['arithmetic_speedup']:.2f}× | {row['error_random_weights']:.2f} |"
        )
    lines += ["", _provenance(slicing), "", *_compiled(), *_batch()]
    return "\n".join(lines)


def _compiled() -> list[str]:
    compiled = _load(RESULTS / "compiled.json")
    lines = [
        "## torch.compile",
        "",
        f"The denoising loop with the transformer's blocks compiled over the same loop uncompiled, {compiled['steps']} "
        "steps, interleaved",
        "runs, pairwise; nothing was compiled again while it was measured.",
        "",
        "| method | speed-up, median (least to most) |",
        "|---|---:|",
    ]
    for name, ratio in compiled["ratios"].items():
        lines.append(f"| {name} | {ratio['median']:.2f}× ({ratio['min']:.2f} to {ratio['max']:.2f}) |")
    return [*lines, "", _provenance(compiled), ""]


def _batch() -> list[str]:
    batch = _load(RESULTS / "batch.json")
    assert all(batch["same"].values())
    gains = ", ".join(f"{gain:.2f} times as many on {engine}" for engine, gain in batch["gains"].items())
    lines = [
        "## Batches",
        "",
        f"{batch['prompts']} clips of {batch['steps']} steps, the same bits on every engine; one CPU thread a worker.",
        f"Against one worker, two make {gains}. Overhead: what a clip",
        "takes beyond the pipeline's call and the encoding of its video; of two workers, one waits for the last clip.",
        "",
        "| engine | clips a minute | overhead |",
        "|---|---:|---:|",
    ]
    for name, run in batch["runs"].items():
        lines.append(f"| {name} | {run['clips_per_minute']:.1f} | {run['overhead_fraction']:.1%} |")
    return [*lines, "", _provenance(batch), ""]


def main() -> None:
    (ROOT / "docs" / "results.md").write_text(page())
    path = ROOT / "README.md"
    text = path.read_text()
    before, _, rest = text.partition(BEGIN)
    path.write_text(before + block() + rest.partition(END)[2])
    print("README.md and docs/results.md written")


if __name__ == "__main__":
    main()
