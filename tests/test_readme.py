"""The numbers in the README are those of the committed results."""

from __future__ import annotations

from benchmarks import readme


def test_the_figures_are_the_committed_ones() -> None:
    text = (readme.ROOT / "README.md").read_text()
    assert readme.BEGIN in text and readme.END in text
    assert readme.block() in text, "run: python -m benchmarks.readme"
