"""The numbers in the README and in docs/results.md are those of the committed results."""

from __future__ import annotations

from benchmarks import readme


def test_the_figures_of_the_readme_are_the_committed_ones() -> None:
    text = (readme.ROOT / "README.md").read_text()
    assert readme.BEGIN in text and readme.END in text
    assert readme.block() in text, "run: python -m benchmarks.readme"


def test_the_results_page_is_made_of_the_committed_ones() -> None:
    assert (readme.ROOT / "docs" / "results.md").read_text() == readme.page(), "run: python -m benchmarks.readme"
