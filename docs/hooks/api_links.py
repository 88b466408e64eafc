"""Links from the package's public names in the text of a page, written as code, to the API pages."""

import ast
import re
from pathlib import Path
from typing import Any

PACKAGE = "lalora_lightning"
LINK = re.compile(r"\[[^\[\]]*\]\([^()]*\)")
FENCED = re.compile(r"(^ *(?:```+|~~~+).*?^ *(?:```+|~~~+) *$)", re.MULTILINE | re.DOTALL)


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Turn `add_lora` into a reference that mkdocstrings resolves; code blocks, headings and links stay."""
    names = "|".join(_public_names())
    name = re.compile(rf"(?<![\[`])`(?P<name>(?:{PACKAGE}\.)?(?:{names}))`(?!`)")
    parts = FENCED.split(markdown)
    parts[::2] = ["\n".join(_linked(line, name) for line in part.split("\n")) for part in parts[::2]]
    return "".join(parts)


def _linked(line: str, name: re.Pattern[str]) -> str:
    if line.startswith(("#", "    ", ":::")):
        return line
    links = [match.span() for match in LINK.finditer(line)]

    def reference(match: re.Match[str]) -> str:
        if any(start < match.start() < end for start, end in links):
            return match[0]
        return f"[`{match['name']}`][{PACKAGE}.{match['name'].rpartition('.')[2]}]"

    return name.sub(reference, line)


def _public_names() -> list[str]:
    """Return ``__all__`` of the package, without importing it."""
    source = (Path(__file__).parents[2] / PACKAGE / "__init__.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return ast.literal_eval(node.value)  # type: ignore[attr-defined]
    raise ValueError(f"Expected {PACKAGE} to list its public names in __all__.")
