"""Write the measured figures into the README and docs/results.md, from the committed results.

    python -m benchmarks.readme            # after make bench

A test holds both to these files, so no number in them comes from anywhere else.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from statistics import mean
from typing import Any

import unicp
from benchmarks import compare, few_steps, figures, first_steps, levers, long_runs, promise, zoo
from benchmarks import race as racing
from benchmarks.budget import OURS
from unicp.offline.candidates import DEFAULT_KIND

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
UNICP_MODELS = {
    "demo": "the demo model",
    "cogvideox": "the proving ground's CogVideoX",
    "hunyuan": "the proving ground's HunyuanVideo",
    "latte": "the proving ground's Latte",
    "ltx": "the proving ground's LTX",
    "wan-large-frame-256": "the proving ground's large-frame member at 256x256 pixels (1,792 tokens; self-attention is "
    "three fifths of the operations)",
    "wan-large-frame-320": "the proving ground's large-frame member at 320x320 pixels (2,800 tokens; self-attention is "
    "two thirds of the operations)",
}
WIDTH = 120
BEGIN, END = "<!-- results: python -m benchmarks.readme -->", "<!-- end of results -->"


def block() -> str:
    """The README's section between the markers: what the pictures show, and what it was measured on."""
    at_50 = figures.read_comparison(RESULTS / "compare-50.json")
    race = racing.runners(at_50)
    plain, ours, peer = race.runners
    assert ours.psnr is not None and peer.psnr is not None
    count = len(at_50.prompts)
    lines = [
        f"![One caption three ways: unaccelerated in {plain.seconds:.1f} s, {ours.method} in {ours.seconds:.1f} s at "
        f"{ours.psnr:.0f} dB, {peer.method} in {peer.seconds:.1f} s at {peer.psnr:.0f} dB](docs/images/race.gif)",
        "",
        textwrap.fill(
            f"*“{race.caption}” by the small demo model on two CPU cores, {at_50.steps} steps. From left to right: "
            f"unaccelerated; {racing.SPEED:g}× as fast with `{ours.method}`, our default; {racing.SPEED:g}× as fast "
            f"with {peer.method} of diffusers, the best at that speed of the caches by others. Bottom row: the "
            f"difference from the unaccelerated video, amplified {racing.GAIN}×. Times are medians over {count} "
            f"captions; the caption shown is the one with the median lead over {peer.method}.*",
            WIDTH,
        ),
        "",
        *_picture(),
        "",
        textwrap.fill(_on_the_demo(), WIDTH),
        "[Results](docs/results.md) has every table, the worst captions, other schedulers, and the cases that we lose.",
    ]
    return "\n".join([BEGIN, "", *lines, "", END])


def _situations() -> list[dict[str, Any]]:
    """What was measured on the proving ground at 50 steps, the demo model first."""
    return [one for one in figures.read(RESULTS / "zoo.json")["situations"] if one["situation"].endswith(" 50 steps")]


def _on_the_demo() -> str:
    """What the README says in figures."""
    demo = _situations()[0]
    at = []
    for speed in (2.0, 3.0):
        there = [one for one in demo["readings"] if one["speed"] == speed]
        caches = [one for one in there if not one["ours"] and one["method"] != "fewer-steps"]
        named = [zoo.BUDGET, max(caches, key=lambda one: one["psnr"])["method"], "fewer-steps"]
        said = [f"{one['method']} {one['psnr']:.1f} / {one['worst']:.1f}" for one in there if one["method"] in named]
        at.append(f"at {speed:g}×, {', '.join(said)}")
    return (
        f"In dB of PSNR against the unaccelerated videos, mean / worst of {demo['captions']} of these captions, which "
        f"the demo model never saw; `budget`, fewer steps and the best of the other caches: {'; '.join(at)}. In runs "
        "of 20 steps or fewer under UniPC (Wan's scheduler) and DPM-Solver++, and where few are computed under DDIM, "
        "`budget` often only runs fewer steps, and gains nothing over a lower `num_inference_steps`. Under Euler, Heun "
        "and DEIS it gains there, too."
    )


def _captions(situations: list[dict[str, Any]]) -> str:
    """On how many captions models of the proving ground were measured."""
    counts = [one["captions"] for one in situations]
    return " to ".join(dict.fromkeys(str(count) for count in (min(counts), max(counts))))


def _range(margins: list[float]) -> str:
    """From the least of margins in dB to the largest, in words."""
    least, most = min(margins), max(margins)
    return f"{-least:.0f} dB below to {most:.0f} dB above" if least < 0 else f"{least:.0f} to {most:.0f} dB above"


def _picture() -> list[str]:
    """The README's picture of quality against speed, and what it says in a sentence."""
    _, *found = _situations()
    over = [margin for one in found if (margin := zoo.margin(one, 2.0)) is not None]
    behind = [-margin for one in found if (margin := zoo.margin(one, 2.0, "worst")) is not None and margin < 0]
    names = [
        zoo.TITLES[one["situation"].split(",")[0]].removeprefix("tiny ").replace("Wan, ", "Wan for ") for one in found
    ]
    said = (
        "*Quality against speed-up (operations saved, not wall-clock) on the demo model and on tiny models (4 to 8 "
        f"million parameters) that we trained with the architectures of {', '.join(names[:-1])} and {names[-1]}. "
        "Defaults for such runs were chosen on the demo model, with a look at CogVideoX's schedulers, at "
        "HunyuanVideo at a high "
        "shift and at Wan 2.2 at 20 to 50 steps; how many first steps to compute was also tried on HunyuanVideo, LTX "
        "and Open-Sora, how few steps forecasts need on these, CogVideoX and Latte; leaving out any one of the former "
        "three changes nothing. "
        f"At 2×, on the {len(found)} tiny models, `budget` is {_range(over)} the best other method in the mean of "
        f"{_captions(found)} "
        f"captions; in the worst caption it is behind on {len(behind)} of the {len(found)} models, by up to "
        f"{max(behind):.0f} dB.*"
    )
    return [
        "![PSNR over speed-up on each model: our budget, the caches of diffusers and cache-dit, and fewer steps]"
        "(docs/images/zoo-curves.svg)",
        "",
        textwrap.fill(said, WIDTH),
    ]


def _demo() -> list[str]:
    """AdaCache on the demo model, and the demo model itself."""
    ada, overhead = figures.read(RESULTS / "adacache.json"), figures.read(RESULTS / "overhead.json")
    evaluation = figures.read(ROOT / "training" / "evaluation.json")
    lines = [
        "## AdaCache on the demo model",
        "",
        f"{ada['steps']} steps, guidance {ada['guidance']:g}, {len(ada['prompts'])} captions it never saw; against the "
        "unaccelerated video of the same prompt and seed.",
        "Speed-up: wall-clock of the denoising loop on the first caption, of which MoReg computes "
        f"{ada['per_prompt']['adacache + MoReg'][0]['computed_steps']} steps;",
        f"interleaved runs, median of {len(ada['seconds']['none'])} pairs.",
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
    added = overhead["shares"]
    counted = evaluation["right_of_asked"]["all videos"]["colour"][1]
    right = {
        group: ", ".join(
            f"{name} {100 * good / asked:.0f}%" for name, (good, asked) in evaluation["right_of_asked"][group].items()
        )
        for group in ("one object", "two objects")
    }
    return [
        *lines,
        "",
        _provenance(ada),
        "",
        f"The engine's overhead when it computes everything: {max(added['schedule'], added['budget']):.1%} of a "
        f"denoising step where nothing is measured, {max(added['adacache'], added['adacache + MoReg']):.1%} with "
        f"AdaCache's measurements (`{overhead['provenance']['command']}`; a bare pipeline beside another: "
        f"{abs(added['bare']):.1%}).",
        "",
        f"The demo model itself, judged from the pixels of {counted} held-out videos (`{evaluation['command']}`), "
        f"is right with one object in: {right['one object']}; with two, where both have to be right, in: "
        f"{right['two objects']}. A method is measured against the same model's unaccelerated video, which needs no "
        "perfect model.",
        "",
    ]


def _same_speed() -> list[str]:
    """Everybody's curve at the same speed, 50 steps."""
    at_50 = figures.read_comparison(RESULTS / "compare-50.json")
    budget = figures.read(RESULTS / "budget.json")
    chosen = list(budget["chosen"].values())
    unbeaten = (
        f"any of {len(chosen)}" if set(chosen) == {DEFAULT_KIND} else f"{chosen.count(DEFAULT_KIND)} of {len(chosen)}"
    )
    places = [
        "What was measured where: below the table. Speed-ups are over unaccelerated runs of the same hour. Against",
        "fewer steps under many schedulers: [below](#the-default-plan-against-fewer-steps).",
    ]
    return [
        "## At the same speed, 50 steps",
        "",
        "Everybody's curve read at that speed-up, or its slowest point, where that is faster. `budget` is the plan",
        f"without a profile. `unicp.tune`, from {budget['tuning_prompts']} captions of the training side and at "
        f"{budget['steps']} steps, found none that is",
        f"surely better at {unbeaten} speeds; what a profile adds here is that one can ask for a quality. The profile",
        "is made by `python -m benchmarks.budget`; it plays the default plans, so that its curve is left out. The",
        "curves of UniCP are of windows and fills as it had them before: [part by part](#unicp-part-by-part).",
        *(places if "kept" in at_50.provenance else []),
        "",
        "![PSNR over speed-up of every method](images/curves.svg)",
        "",
        compare.table(at_50),
        "",
    ]


def _provenance(results: dict[str, Any]) -> str:
    about = results["provenance"]
    machine, versions = about["machine"], about["versions"]
    return (
        f"`{about['command']}`, {about['date']}, {machine['gpu'] or machine['processor']}, {machine['cores']} cores; "
        f"torch {versions['torch']}, diffusers {versions['diffusers']}."
    )


def _rows(table: list[dict[str, Any]], name: str, timed: bool = True) -> list[str]:
    lines = [
        f"| {name} | arithmetic |{' speed-up |' * timed} PSNR, mean / worst | SSIM | motion ratio |",
        f"|---|---:|{'---:|' * timed}---:|---:|---:|",
    ]
    for row in table:
        speed = f" {row['speedup']:.2f}× |" if timed else ""
        lines.append(
            f"| {row[name]} | {row['computed_fraction']:.0%} |{speed} "
            f"{row['psnr']:.1f} / {row['psnr_worst']:.1f} dB | {row['ssim']:.3f} | {row['motion_ratio']:.2f} |"
        )
    return [*lines, ""]


def _table(results: dict[str, Any], name: str) -> list[str]:
    """A table of methods on the demo model."""
    return [
        f"{len(results['prompts'])} held-out captions, {results['steps']} steps; speed-up: wall-clock of the denoising "
        "loop, median over the captions, each",
        "against the unaccelerated video of the same caption.",
        "",
        *_rows(results["table"], name),
        _provenance(results),
        "",
    ]


def _unicp() -> list[str]:
    """UniCP part by part, on every model that it was measured on."""
    lines = [
        "## UniCP, part by part",
        "",
        "What each part is, and why: [UniCP](methods/unicp.md). Arithmetic: share of operations that ran.",
        "",
    ]
    clock = RESULTS / "unicp-clock.json"
    timed = figures.read(clock) if clock.exists() else {"table": {}}
    for name, model in UNICP_MODELS.items():
        path = RESULTS / f"unicp-{name}.json"
        if not path.exists():
            continue
        made, ratios = figures.read(path), timed["table"].get(name, {})
        lines += [f"On {model}, {len(made['prompts'])} held-out captions, {made['steps']} steps:", ""]
        lines += _unicp_table(made["table"], ratios)
        lines += [f"| {name} | | | {error} |" for name, error in made.get("failures", {}).items()]
        if made.get("parts"):
            lines += ["", f"On {model} again, the first {made['few']} of these captions, part by part:", ""]
            lines += _unicp_table(made["parts"], {})
        lines += ["", _provenance(made), ""]
    if timed["table"]:
        lines += [f"Timed by wall-clock, medians of {timed['repeats']} pairs of runs: {_provenance(timed)}", ""]
    return lines


def _unicp_table(rows: list[dict[str, Any]], ratios: dict[str, float]) -> list[str]:
    lines = ["| | arithmetic | speed-up | PSNR, mean / worst |", "|---|---:|---:|---:|"]
    for row in rows:
        speed = f"{ratios[row['row']]:.2f}x" if row["row"] in ratios else "–"
        quality = f"{row['psnr']:.1f} / {row['psnr_worst']:.1f} dB"
        lines.append(f"| {row['row']} | {row['computed_fraction']:.0%} | {speed} | {quality} |")
    return lines


def _budget(budget: dict[str, Any]) -> list[str]:
    reached = budget["reached_35_db"]
    shares = {row["method"]: row["computed_fraction"] for row in budget["table"]}
    untuned = [name for name, share in reached.items() if share >= 0.8 and name != OURS]
    asked = [budget["steps"] * row["fraction"] for row in budget["per_prompt"][OURS]]
    harder = [steps - min(asked) for steps in asked if steps > min(asked) + 0.5]
    cheapest = min(untuned, key=lambda name: shares[name], default=None)
    missed = max((shares[name] for name, share in reached.items() if share < 0.8 and name != OURS), default=0.0)
    among = f'is "{cheapest}", at {shares[cheapest]:.0%}' if cheapest else "does not exist"
    return [
        "## The budget",
        "",
        *_table(budget, "method"),
        f"`min_psnr=35` was reached by {reached[OURS]:.0%} of the captions, at {shares[OURS]:.0%} of the arithmetic. "
        "Of the plans that nobody tuned",
        f"the cheapest with which four of five reached it {among}; with those at {missed:.0%} and less they did not.",
        f"Where forecasts failed, {len(harder)} of {len(asked)} captions took {min(harder):.0f} to {max(harder):.0f} "
        "steps more than the plan has.",
        f"Tuned on {budget['tuning_prompts']} captions of the training side, by an older `tune`, which searched for "
        "plans.",
        "",
    ]


def _parts() -> list[str]:
    plans, transfer, override = (figures.read(RESULTS / f"{name}.json") for name in ("plans", "transfer", "override"))
    lines = [
        "## The budget, part by part",
        "",
        "Each plan computes as many steps as the others of its speed (25 or 17 of 50), but for what the override adds",
        "and UniCP's windows inside of every step save.",
        "",
        *_table(plans, "method"),
        "## Where plans still hold",
        "",
        "Plans asked for 2× and 3×, used elsewhere than where they were tuned, by an older `tune`, which searched for",
        f"plans and went by two standard errors of the prompts; {len(transfer['prompts'])} held-out "
        "captions. Arithmetic, no wall-clock: equal plans take equal time, and of four captions it varied by more.",
        "",
    ]
    for situation, table in transfer["tables"].items():
        lines += _rows(table, f"plan, {situation}", timed=False)
    reached = {row["plan, 30 steps"]: row["psnr"] for row in transfer["tables"]["30 steps"]}
    ahead = []
    for speed in ("2x", "3x"):
        gained = [reached[f"tuned on {count}, {speed}"] - reached[f"default plan, {speed}"] for count in (4, 8, 16)]
        ahead.append(f"{', '.join(f'{gain:+.1f}' for gain in gained)} dB at {speed}")
    lines += [
        f"Tuned at 30 steps on 4, 8 and 16 captions, against the default plan on these: {'; '.join(ahead)}.",
        "What was ahead in a tuning's real runs need not be on other captions, and here more of them changed nothing.",
        "",
        _provenance(transfer),
        "",
        "## The override's reserve",
        "",
    ]
    counts = [f"{situation} ({len(captions)})" for situation, captions in override["prompts"].items()]
    lines += [
        "One plan for 3×, with more or less to spend where forecasts fail (computed beside the plan's steps only in",
        "runs that need it), and plans with more steps from the start. Held-out captions:",
        f"{'; '.join(counts)}.",
        "",
    ]
    brought, steps, most = [], unicp.demo.STEPS, "reserve of 5 steps"
    for situation, table in override["tables"].items():
        lines += _rows(table, f"plan, {situation}", timed=False)
        named = {row[f"plan, {situation}"]: row for row in table}
        none = named["reserve of 0 steps"]
        for name in (most, "1 more in the plan", "5 more in the plan"):
            more = steps * (named[name]["computed_fraction"] - none["computed_fraction"])
            gained, worst = (named[name][key] - none[key] for key in ("psnr", "psnr_worst"))
            brought.append(f"- {situation}, {name}: {more:.1f} steps more, {gained:+.1f} dB, the worst {worst:+.1f} dB")
        rows = override["per_prompt"][situation]
        pairs = [
            (a, b) for a, b in zip(rows["reserve of 0 steps"], rows[most], strict=True) if b["fraction"] > a["fraction"]
        ]
        if pairs:
            before, after = (mean(row["psnr"] for row in side) for side in zip(*pairs, strict=True))
            brought.append(
                f"- {situation}, the {len(pairs)} captions that spent some of the reserve of 5: {before:.1f} to "
                f"{after:.1f} dB in the mean; {sum(b['psnr'] > a['psnr'] for a, b in pairs)} of them gained"
            )
    lines += ["What that took, and what it brought:", "", *brought, ""]
    return [*lines, _provenance(override), ""]


def page() -> str:
    """docs/results.md."""
    lines = [
        "# Results",
        "",
        "Written by `python -m benchmarks.readme` from `benchmarks/results/`. All of it is small models on a CPU:",
        "how the methods behave, not what a large model on a GPU will show. Quality is against the unaccelerated video",
        "of the same caption and seed. Arithmetic: share of the denoiser's operations that ran; tables that",
        "are older than the counting of operations have that of its parameters, which here is nearly the same.",
        "What follows from tuning was measured with the default plan of before: at 3x and more of 50 steps under UniPC",
        "it began with [two short steps](#first-steps-and-leaps-of-long-runs).",
        "",
    ]
    budget, slicing = (figures.read(RESULTS / f"{name}.json") for name in ("budget", "slicing"))
    lines += [*_same_speed(), *_demo()]
    lines += _unicp()
    lines += ["![Change of the modules' outputs from step to step, and what UniCP does](images/unicp-curves.png)", ""]
    lines += ["![Slicing error by rank](images/unicp-slicing.png)", ""]
    lines += [
        *_promise(),
        *_proving_ground(),
        *_published(),
        *_first_steps(),
        *_few_steps(),
        *_long_runs(),
        *_levers(),
        *_budget(budget),
        *_parts(),
        "## At the same speed, 30 steps",
        "",
        "Here `adacache-forecast` is older than its present forecasts and corrections.",
        "",
    ]
    lines += [
        compare.table(figures.read_comparison(RESULTS / "compare-30.json")),
        "",
        "Of what is taken over, ours were timed up to an hour after the unaccelerated and the peers' runs. Now",
        "whatever is new is timed beside an unaccelerated run of its own.",
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
    lines += ["", _provenance(slicing), "", *_sliced_when_trained(), *_compiled(), *_batch()]
    return "\n".join(lines)


def _sliced_when_trained() -> list[str]:
    found = figures.read(RESULTS / "slicing-trained.json")
    limits, last = list(found["rows"][0]["within"]), found["of_steps"]
    steps = ", ".join(map(str, found["steps"]))
    lines = [
        f"The {found['modules']} self-attention modules of `{found['member']}`, trained, at {found['pixels']}×"
        f"{found['pixels']} pixels: {found['tokens']:,} tokens, head size {found['head_size']}. Bases are from one",
        f"caption, errors of the outputs on another, at steps {steps} of {last}. The columns on the right say in how",
        f"many of these {found['measured']} calls UniCP may slice at that rank, by `delta_prune`.",
        "",
        "| rank | speed-up (least to most) | arithmetic | error, median / worst | of queries and keys alone "
        "| of values alone | " + " | ".join(limits) + " |",
        "|---:|---:|---:|---:|---:|---:|" + "---:|" * len(limits),
    ]
    for row in found["rows"]:
        ratio, within = row["speedup"], " | ".join(str(row["within"][limit]) for limit in limits)
        lines.append(
            f"| {row['rank']} | {ratio['median']:.2f}× ({ratio['min']:.2f} to {ratio['max']:.2f}) "
            f"| {row['arithmetic_speedup']:.2f}× | {row['error']:.3f} / {row['worst_error']:.3f} "
            f"| {row['error_of_queries_and_keys']:.3f} | {row['error_of_values']:.3f} | {within} |"
        )
    width, height = found["size"]
    lines += [
        "",
        f"Whole videos of {found['captions']} captions at {width}×{height} pixels, every self-attention module sliced",
        "at every step, nothing else skipped, beside fewer steps:",
        "",
        "| | PSNR (dB), mean / worst |",
        "|---|---:|",
        *(f"| {each['what']} | {each['psnr']:.1f} / {each['worst']:.1f} |" for each in found["videos"]),
    ]
    return [*lines, "", _provenance(found), ""]


def _promise() -> list[str]:
    measured = figures.read(RESULTS / "promise.json")
    rows = [row for row in measured["results"] if row["method"].startswith("budget")]
    below = [(row, *promise.margins(row)) for row in rows]
    short = [
        f"{row['situation']} at {row['method'].split()[1]} ({over:+.1f} / {worst:+.1f})"
        for row, over, worst in below
        if over < -0.05 or worst < -1
    ]
    of_twenty = [over for row, over, _ in below if promise.steps_of(row) >= 20]
    lines = [
        "## The default plan against fewer steps",
        "",
        f"`BudgetConfig(target_speedup=...)` without a profile, on {len(measured['prompts'])} captions no model saw:",
        "how much nearer its videos are to the unaccelerated ones of the same scheduler than those of fewer steps",
        "that evaluate the denoiser as often; of the mean PSNR over captions / of the worst one of each, in dB.",
        "`ddim` and `cogvideox-dpm` are the proving ground's CogVideoX, members its other models, all others the demo",
        "model. The plans were chosen on the demo model and CogVideoX; those for 8 and 12 steps at 1.5x on",
        "HunyuanVideo, LTX and Latte, too; few even steps under Euler (2.5x and 3x of 8 to 20) on the members; and how",
        "long runs under UniPC begin on HunyuanVideo, LTX and Open-Sora.",
        "",
        *promise.table(measured["results"]),
        "",
        f"Over all cells of 20 steps and more: {mean(of_twenty):+.1f} dB in the mean.",
        f"Below fewer steps in the mean, or by more than 1 dB in the worst caption: {'; '.join(short) or 'none'}.",
        *(["Situations that were not measured are missing here."] if measured["missing"] else []),
        "",
        "![Margins by situation and speed](images/promise.png)",
        "",
    ]
    if any(row["method"] in promise.ADACACHE for row in measured["results"]):
        lines += [
            'The same of `AdaCacheConfig(fill="forecast")`, with the thresholds of the demo\'s codebook and with',
            "larger ones: the share of evaluations that it computed, and its margins at that share. Situations in",
            "which it skipped nothing, as in all short runs, are left out. It decides itself what it saves.",
            "",
            *promise.adacache_table(measured["results"]),
            "",
        ]
    return [*lines, _provenance(measured), ""]


def _published() -> list[str]:
    """AdaCache's published codebooks on a model of the architecture that they were made for."""
    measured = figures.read(RESULTS / "published.json")
    paper = measured["paper"]
    lines = [
        "## AdaCache as published",
        "",
        "Its three codebooks, with its own constants of MoReg, on the proving ground's Open-Sora (STDiT3), the",
        f"architecture that it was published on; {measured['captions']} captions no model saw. It is another model",
        "than the paper's (5 million parameters, 13 frames of 96 x 96 pixels), so the paper's figures beside ours say",
        "what was claimed there, and not what is to be expected here.",
    ]
    for steps, table in measured["tables"].items():
        lines += [
            "",
            f"| {steps} steps | the paper | steps computed | speed-up | PSNR, mean / worst | SSIM | motion ratio |",
            "|---|---|---:|---:|---:|---:|---:|",
        ]
        for row in table:
            lines.append(
                f"| {row['method']} | {paper.get(row['method'], '')} | {row['computed_fraction']:.0%} "
                f"| {row['speedup']:.2f}× | {row['psnr']:.1f} / {row['psnr_worst']:.1f} dB | {row['ssim']:.3f} "
                f"| {row['motion_ratio']:.2f} |"
            )
    return [*lines, "", _provenance(measured), ""]


def _proving_ground() -> list[str]:
    measured = figures.read(RESULTS / "zoo.json")
    found = measured["situations"]
    words: dict[tuple[str, str], list[str]] = {}
    for one in found:
        for name, error in one["broken"].items():
            words.setdefault((name, error), []).append(one["situation"])
    lines = [
        "## The proving ground",
        "",
        "Small trained models of other families ([zoo/README.md](../zoo/README.md)), each with its own scheduler:",
        f"the budget by its defaults, on {_captions(found)} captions no model saw. The defaults were chosen on",
        "the demo model; of the others, CogVideoX under its two schedulers and Latte in short runs, HunyuanVideo at",
        "high shifts, Wan 2.2 at 20 to 50 steps, HunyuanVideo, LTX and Latte at 8 and 12 steps, and HunyuanVideo, LTX",
        "and Open-Sora under Euler at 8 to 50 steps ([leaving one",
        "out](#how-many-first-steps-leaving-one-family-out); [again](#how-few-computed-steps-forecasts-need)) were",
        "looked at.",
        "How much nearer its videos are to the unaccelerated ones than those of the best cache of diffusers or",
        "cache-dit, or of fewer steps, whichever is nearest, at the same share of the operations; of the mean PSNR",
        "over captions / of the worst one of each, in dB. A dash: no method of the others is as fast, or ours is not.",
        "",
        *zoo.table(found),
        "",
        "Over all models, in dB, and how many of them are behind the best method of others: in the mean / in the",
        "worst caption:",
        "",
        *zoo.over_all(found),
        "",
        "![Quality against speed on each model](images/zoo-curves.svg)",
        "",
        "![Margins by model and speed](images/zoo.png)",
        "",
        "What did not run, in its own words:",
        "",
    ]
    for (name, error), where in words.items():
        on = "every model" if len(where) == len(found) else "; ".join(where)
        lines.append(f"- {name}: `{' '.join(error.split())[:160]}` ({on})")
    return [*lines, "", _provenance(measured), ""]


def _section(title: str, measured: dict[str, Any], tables: list[str], *said: str) -> list[str]:
    """A section of the results: what is said, the tables, and where they come from."""
    return [f"## {title}", "", *said, "", *tables, "", _provenance(measured), ""]


def _first_steps() -> list[str]:
    measured = figures.read(RESULTS / "first-steps.json")
    return _section(
        "How many first steps, leaving one family out",
        measured,
        first_steps.table(measured["results"]),
        "Two rules for how many first and last steps to compute where the solver takes each step: what",
        f"*{first_steps.ROOT}* has over *{first_steps.SHARE}*, for `K` computed steps of `N`, in dB of the mean and of",
        f"the worst of {measured['prompts']} training captions; {measured['steps']} steps. In brackets what it has in "
        "the mean over the other models",
        "under that solver, by which the rule would be chosen if this family were left out. By default the former rule",
        "is taken under Euler's method where less than three fifths of the steps are computed, and else the latter.",
    )


def _few_steps() -> list[str]:
    measured = figures.read(RESULTS / "few-steps.json")
    return _section(
        "How few computed steps forecasts need",
        measured,
        few_steps.tables(measured["results"]),
        "Few steps are computed evenly, as fewer steps would be; more of them over growing gaps, with forecasts",
        "between them. What the latter has over the former at so many computed steps, in dB of the mean and of the",
        f"worst of {measured['prompts']} training captions, and in brackets what it has in the mean over the other "
        "models under that",
        "solver. By default there are forecasts from seven computed steps on, under DDIM from nine, and with two",
        "denoisers from sixteen on. The last table is about even steps under Euler's method that lie between two steps",
        "of the run: what the earlier one of these, which is the default, has over the nearest one. (The demo model's",
        "last step is too short to count. Even steps over the others fall on the same ones here.)",
    )


def _long_runs() -> list[str]:
    measured = figures.read(RESULTS / "long-runs.json")
    return _section(
        "First steps and leaps of long runs",
        measured,
        long_runs.tables(measured["results"]),
        "Under UniPC: what the default plan has over one that begins with two short steps at any flow shift, and over",
        "the default without leaps, which forecasts all skipped steps and has other first and last ones, in dB of the",
        f"mean and of the worst of {measured['prompts']} training captions. In brackets what it has in the mean over",
        "the other models.",
    )


def _levers() -> list[str]:
    measured = figures.read(RESULTS / "levers.json")
    return [
        "## Levers and tuning on the proving ground",
        "",
        f"What the default budget loses without one of its levers, or gains with another, at twice and three times the "
        f"speed by steps; {measured['steps']} steps,",
        f"{measured['prompts']} held-out captions, mean PSNR in dB. The share of the operations stands beside a figure "
        "where it is not that of the default.",
        "",
        *levers.lever_table(measured["table"]),
        "",
        "What `unicp.tune` finds at low effort, from four captions of the training side (for image to video, with one",
        "picture), beside the default plan and a dozen plain shapes, by first and last steps: the one that is best on",
        "the other models, as if this family had been left out, and the one that is best on these very captions; mean",
        "/ worst in dB:",
        "",
        *levers.tuning_table(measured["table"]),
        "",
        _provenance(measured),
        "",
    ]


def _compiled() -> list[str]:
    compiled = figures.read(RESULTS / "compiled.json")
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
    batch = figures.read(RESULTS / "batch.json")
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
