"""What the contract is run for, written for ``unicp models``: ``python -m tests.coverage``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.contract import cases_of
from tests.family import Loop
from tests.tiny import FAMILIES, denoisers
from tests.tiny_modular import MODULAR

PATH = Path(__file__).resolve().parent.parent / "src" / "unicp" / "specs" / "tested.json"


def covered() -> dict[str, dict[str, Any]]:
    """By transformer class: pipelines, cases of the contract, whether any attention was sliced."""
    found: dict[str, dict[str, Any]] = {}
    for name, family in FAMILIES.items():
        pipe = family.build()
        entry = found.setdefault(type(denoisers(family, pipe)[0]).__name__, {"pipelines": [], "cases": []})
        how = "its transformer alone" if isinstance(pipe, Loop) else type(pipe).__name__
        entry["pipelines"] = sorted({*entry["pipelines"], how})
        entry["cases"] = sorted({*entry["cases"], *cases_of(name)})
        entry["sliced"] = family.slices
    for kind in MODULAR.values():
        pipe = kind.build()
        entry = found[type(pipe.transformer).__name__]
        entry["pipelines"] = sorted({*entry["pipelines"], type(pipe).__name__})
    return dict(sorted(found.items()))


if __name__ == "__main__":
    PATH.write_text(json.dumps(covered(), indent=1) + "\n", encoding="utf-8")
