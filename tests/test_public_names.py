"""What is public is declared: every name without an underscore is in ``__all__``, and every name in it exists."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    str(path.relative_to(ROOT)) for folder in ("lalora_lightning", "recipes") for path in (ROOT / folder).rglob("*.py")
)


def defined(tree: ast.Module) -> set[str]:
    """Names that a module defines, not those that it imports."""
    names = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_declared(module: str):
    tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
    declared: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            declared = ast.literal_eval(node.value)
    names = defined(tree)
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert {name for name in names if not name.startswith("_")} <= set(declared)
    assert set(declared) <= names | imported
    assert len(declared) == len(set(declared))
