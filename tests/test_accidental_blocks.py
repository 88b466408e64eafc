"""The check of the documentation for lines that Markdown reads as a list, a heading or a quotation."""

import runpy
from pathlib import Path

import pytest

HOOKS = Path(__file__).parents[1] / "docs" / "hooks"
accidental_blocks = runpy.run_path(str(HOOKS / "accidental_blocks.py"))["accidental_blocks"]


@pytest.mark.parametrize(
    "markdown",
    [
        "varied at 188 steps and at\n804. Short runs need it",
        "- varied at 188 steps and at\n  804. Short runs need it",
        "1. one\n2. varied at 188 steps and at\n   804. Short runs",
        "804. Short runs need it",
        "the budget ends at\n- 5 of them",
        "- a\n- b\n+ c",
        "as in\n# 5 runs",
        "#5 runs",
        "more than\n> 5",
        "a heading by accident\n---",
    ],
)
def test_a_line_that_starts_a_block_inside_a_paragraph_is_found(markdown):
    assert len(accidental_blocks(markdown)) == 1


@pytest.mark.parametrize(
    "markdown",
    [
        "804 steps",
        "# heading\n\ntext\n\n---\n\nmore",
        "- a\n  goes on\n- b\n    - c\n    - d\n- e",
        "1. a\n\n   more of it\n\n2. b\n\n```sh\ncommand\n```\n\n3. c",
        "```python\n# comment\ntext\n- 1\n```",
        "    code\n    # comment\n    - 1",
        "| a | b |\n|---|---|\n| 1 | 2 |",
        "> a\n> b",
    ],
)
def test_lists_headings_code_and_tables_are_left_alone(markdown):
    assert accidental_blocks(markdown) == []
