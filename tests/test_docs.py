"""The documentation names what there is."""

import inspect
import re
from pathlib import Path

from lalora_lightning import LaLoraCallback, plotting

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
