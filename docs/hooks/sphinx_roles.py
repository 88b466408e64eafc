"""Links from the Sphinx roles in docstrings, such as ``:func:`add_lora` ``, to the API pages.

This is an extension of griffe, which reads the package for mkdocstrings. A name is looked up in the class, in the
module, among the package's public names and then in the whole package, where it must be unique. A name from outside
the package becomes plain code. A name that is not found, or is on no API page, stays a reference without a target
and fails ``mkdocs build --strict``.
"""

import logging
import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod|obj):`(?:(?P<title>[^`<]+?)\s*<)?(?P<name>[^`>]+)>?`")
# A line that ends with "::" and the indented lines below it.
LITERAL_BLOCK = re.compile(
    r"^(?P<indent> *)(?P<text>\S.*)?::\n(?P<code>(?:[ \t]*\n|(?P=indent)[ ]+\S.*(?:\n|\Z))+)", re.MULTILINE
)

# A doctest outside an "Examples" section, with what it prints.
DOCTEST = re.compile(r"^>>> .*\n?(?:\S.*\n?)*", re.MULTILINE)

log = logging.getLogger("mkdocs.hooks.sphinx_roles")


class SphinxRoles(griffe.Extension):
    """Rewrites the docstrings of a package once all of it has been read."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Rewrite every docstring of the package, and warn of modules that hide a function of their name."""
        for obj in _objects(pkg):
            for name in getattr(obj, "exports", None) or ():
                member = obj.members.get(str(name))
                if isinstance(member, griffe.Module) and name in member.members:
                    log.warning("%s hides the object of the same name that %s exports", member.path, obj.path)
            if obj.docstring:
                obj.docstring.value = ROLE.sub(
                    lambda match, obj=obj: _link(match, obj, pkg), fence_code(obj.docstring.value)
                )


def fence_code(text: str) -> str:
    """Return the text with reStructuredText's literal blocks and doctests as fenced blocks of Python."""

    def fenced(match: re.Match[str]) -> str:
        indent, code = match["indent"], match["code"].strip("\n").split("\n")
        margin = min(len(line) - len(line.lstrip()) for line in code if line.strip())
        text = [f"{indent}{match['text']}:", ""] if match["text"] else [""]
        lines = ["```python", *(line[margin:] for line in code), "```"]
        return "\n".join([*text, *((indent + line).rstrip() for line in lines), "", ""])

    text = LITERAL_BLOCK.sub(fenced, text)
    return DOCTEST.sub(lambda match: f"```pycon\n{match[0].rstrip()}\n```\n", text)


def _link(match: re.Match[str], obj: griffe.Object, pkg: griffe.Module) -> str:
    name = match["name"].strip()
    title = match["title"] or (name.rpartition(".")[2] if name.startswith("~") else name).removeprefix("~")
    path = _path(name.removeprefix("~").removesuffix("()"), obj, pkg)
    return f"[`{title}`][{path}]" if path else f"`{title}`"


def _path(name: str, obj: griffe.Object, pkg: griffe.Module) -> str | None:
    """Return the path that the API pages know the object by, None if it is not the package's."""
    first, _, rest = name.partition(".")
    if first != pkg.name:
        if isinstance(obj, griffe.Class) and first in obj.all_members:
            first = obj.all_members[first].path
        else:
            try:
                first = obj.resolve(first)
            except griffe.NameResolutionError:
                first = pkg.members[first].path if first in pkg.members else _unique(first, pkg)
        name = f"{first}.{rest}" if rest else first
    if "." in name and not name.startswith(f"{pkg.name}."):
        return None
    try:
        return pkg.modules_collection[name].canonical_path
    except griffe.AliasResolutionError:  # imported from elsewhere
        return None
    except KeyError:
        return name


def _unique(name: str, pkg: griffe.Module) -> str:
    """Return the path of the only object of the package with this name, the name itself if there is not just one."""
    paths = {obj.path for obj in _objects(pkg) if obj.name == name and isinstance(obj.parent, griffe.Module)}
    return paths.pop() if len(paths) == 1 else name


def _objects(obj: griffe.Object) -> list[griffe.Object]:
    members = [member for member in obj.members.values() if isinstance(member, griffe.Object)]
    return [obj, *(inner for member in members for inner in _objects(member))]
