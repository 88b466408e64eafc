"""A check for lines of a paragraph that Markdown reads as a list, a heading or a quotation.

A wrapped sentence that continues with "804. Short runs" becomes a list item, one with "# 5" a heading. Each such
line is a warning, which fails ``mkdocs build --strict``. So is a list that directly follows a paragraph: GitHub
shows a list there, the site does not.
"""

import logging
import re
from typing import Any

FENCE = re.compile(r"\s*(```+|~~~+)")
MARKER = re.compile(r"(?P<indent>\s*)(?:(?P<number>\d+)[.)]|(?P<bullet>[-+*]))\s+\S")
HEADING = re.compile(r" {0,3}#")
QUOTATION = re.compile(r" {0,3}>")
UNDERLINE = re.compile(r" {0,3}(=+|-+)\s*$")

log = logging.getLogger("mkdocs.hooks.accidental_blocks")


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> None:
    """Warn of each such line of a page."""
    for _, line in accidental_blocks(markdown):
        log.warning("%s: the line %r starts a list, heading or quotation inside a paragraph", page.file.src_uri, line)


def accidental_blocks(markdown: str) -> list[tuple[int, str]]:
    """Return number and text of the lines that begin a block in the middle of a paragraph."""
    found = []
    fence = ""
    previous = ""
    # The lists that are open, by their indentation: their bullet or their last number.
    lists: dict[int, str | int] = {}
    for number, line in enumerate(markdown.splitlines(), start=1):
        if match := FENCE.match(line):
            fence = "" if fence and match[1].startswith(fence) else fence or match[1]
            previous = ""
            continue
        if fence:
            continue
        if not line.strip():
            previous = ""
            continue
        indent = len(line) - len(line.lstrip())
        if not previous:
            lists = {column: mark for column, mark in lists.items() if column <= indent}
            if indent >= 4 and not lists:  # a block of code
                continue
        if match := MARKER.match(line):
            mark: str | int = match["bullet"] or int(match["number"])
            follows = lists.get(indent) == (mark - 1 if isinstance(mark, int) else mark)
            above = MARKER.match(previous)
            is_nested = above is not None and indent > len(above["indent"])
            begins = (not previous or is_nested) and mark in (0, 1, "-", "+", "*")
            if follows or begins:
                lists = {column: other for column, other in lists.items() if column < indent} | {indent: mark}
            else:
                found.append((number, line.strip()))
        elif previous and (HEADING.match(line) or QUOTATION.match(line) or UNDERLINE.match(line)):
            if not (QUOTATION.match(line) and QUOTATION.match(previous)):
                found.append((number, line.strip()))
        elif not previous and re.match(r" {0,3}#+[^#\s]", line):
            found.append((number, line.strip()))
        elif not previous and indent == 0:
            lists = {}
        previous = "" if HEADING.match(line) else line
    return found
