"""The documentation names what there is."""

import inspect
import re
from pathlib import Path

import pytest

from lalora_lightning import LaLoraCallback, plotting
from recipes.comparison import read_records, summarize

DOCS = Path(__file__).parents[1] / "docs"


def test_every_argument_of_the_callback_is_explained_and_no_other():
    explained = re.findall(r"^\| `(\w+)` \|", (DOCS / "callback.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(explained) == sorted(inspect.signature(LaLoraCallback).parameters)


def test_every_plot_is_shown_or_named():
    named = set(re.findall(r"\bplot_\w+", (DOCS / "plots.md").read_text(encoding="utf-8")))
    assert named == {name for name in vars(plotting) if name.startswith("plot_")}


def test_rows_of_tables_stand_in_one():
    for page in [*DOCS.glob("*.md"), *DOCS.parent.glob("*.md"), *DOCS.parent.glob("recipes/*.md")]:
        for table in re.findall(r"(?:^\|[ :-].*\n)+", page.read_text(encoding="utf-8"), re.MULTILINE):
            header, line, *_ = [*table.splitlines(), "a lone row"]
            assert set(line) <= set("|-: "), f"{page.name}: {header}"


def test_pictures_and_pages_linked_to_exist():
    for page in DOCS.glob("*.md"):
        for target in re.findall(r"\]\(([^):#]+)[^):]*\)", page.read_text(encoding="utf-8")):
            assert (DOCS / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_scores_and_differences_are_those_of_the_records(page: str):
    """Every ``mean +- deviation`` of a table, and every ``difference (low to high)``."""
    scores: set[str] = set()
    differences: set[tuple[float, ...]] = set()
    records = [r for file in (DOCS / "results").glob("comparison-*.jsonl") for r in read_records(file)]
    for baseline in ("lora:rank=2,target_modules=all-linear", "lora:target_modules=all-linear", "lora", "lalora"):
        for row in summarize(records, baseline):
            scores.add(f"{row.score:.1f} +- {row.spread or 0:.1f}")
            if row.low is not None:
                difference = [round(number, 1) for number in (row.difference, row.low, row.high)]
                differences |= {tuple(difference), tuple(-number for number in (difference[0], *difference[:0:-1]))}
    text = (DOCS.parent / page).read_text(encoding="utf-8").split("## The planted test")[0]
    tables = "".join(re.findall(r"^\|.*\n", text, re.MULTILINE))
    assert set(re.findall(r"\d+\.\d \+- \d+\.\d", tables)) <= scores
    number = r"([+-]?\d+\.\d)"
    found = re.findall(rf"{number}(?: points)? \({number} to {number}\)", " ".join(text.split()))
    assert len(found) > 10
    assert {tuple(map(float, numbers)) for numbers in found} <= differences
