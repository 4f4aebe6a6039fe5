"""Batches of the demo model: the same bits on every engine, the gain of a second worker, and what a batch costs.

    python -m benchmarks.batch [--prompts 60] [--steps 50] [--no-save]

Every worker has one CPU thread, so that two can be compared with one. *Writing* is what a clip takes beyond the call of
the pipeline until its video is encoded; *overhead* what comes on top of both: hashing, flushing to the disk, the
thumbnail, the manifest, handing over. Read it off one worker: of two, one waits for the other's last clip. Needs the
`ray` extra.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import unicp
from benchmarks import common
from unicp import cli
from unicp.batch.manifest import Manifest

RUNS = {"local, 1 worker": ("local", 1), "local, 2 workers": ("local", 2), "ray, 1": ("ray", 1), "ray, 2": ("ray", 2)}


def batch(prompts: Path, folder: Path, engine: str, workers: int, steps: int) -> dict[str, Any]:
    """One batch: wall-clock in seconds, and what of it was work."""
    began = time.time()
    options = ["--engine", engine, "--workers", str(workers), "--threads", "1", "--device", "cpu"]
    if cli.main(["batch", str(prompts), "-o", str(folder), "--steps", str(steps), *options]):
        raise SystemExit(f"the batch on {engine} failed")
    manifest = Manifest(folder, readonly=True)
    entries = manifest.entries()
    manifest.close()
    records = {entry.name: json.loads((folder / entry.name).with_suffix(".json").read_text()) for entry in entries}
    # The first clip began when a worker had its model.
    first = min(entry.updated - (entry.seconds or 0.0) for entry in entries)
    last = max(entry.updated for entry in entries)
    pipeline = sum(record["timings"]["total_seconds"] for record in records.values())
    work = sum(entry.seconds or 0.0 for entry in entries)
    return {
        "clips": len(entries),
        "seconds": last - first,
        "start_seconds": first - began,
        "clips_per_minute": 60 * len(entries) / (last - first),
        "pipeline_seconds": pipeline,
        "writing_fraction": work / pipeline - 1,
        "overhead_fraction": workers * (last - first) / work - 1,
        "sha256": {name: record["video"]["sha256"] for name, record in records.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--steps", type=int, default=unicp.demo.STEPS)
    parser.add_argument("--no-save", action="store_true", help="only print")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        prompts = Path(place) / "prompts.txt"
        prompts.write_text("\n".join(unicp.demo.prompts(args.prompts)))
        figures = {
            name: batch(prompts, Path(place) / f"{engine}-{workers}", engine, workers, args.steps)
            for name, (engine, workers) in RUNS.items()
        }
    first = figures["local, 1 worker"]["sha256"]
    same = {name: each.pop("sha256") == first for name, each in figures.items()}
    digest = hashlib.sha256(json.dumps(first, sort_keys=True).encode()).hexdigest()
    for name, each in figures.items():
        print(
            f"{name:<18} {each['clips_per_minute']:6.1f} clips a minute, writing {each['writing_fraction']:.1%}, "
            f"overhead {each['overhead_fraction']:.1%}, same bits: {'yes' if same[name] else 'NO'}"
        )
    gains = {
        engine: figures[many]["clips_per_minute"] / figures[one]["clips_per_minute"]
        for engine, one, many in (("local", "local, 1 worker", "local, 2 workers"), ("ray", "ray, 1", "ray, 2"))
    }
    for engine, gain in gains.items():
        print(f"two workers of {engine} are {gain:.2f} times as fast as one")
    if not args.no_save:
        about = {"prompts": args.prompts, "steps": args.steps, "files_sha256": digest}
        common.save("batch", {**about, "runs": figures, "same": same, "gains": gains})
    if not all(same.values()):
        raise SystemExit("the engines made different videos")


if __name__ == "__main__":
    main()
