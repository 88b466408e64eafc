"""Dotted names of modules and parameters: what they share, and which projections form a layer. Loads no torch."""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

__all__ = [
    "CHECKPOINT_WRAPPER",
    "GroupBy",
    "common_prefix",
    "group_names",
    "parent_name",
    "split_common_prefix",
    "state_name",
]

GroupBy = Literal["block", "parent", "module"] | Callable[[str], str]

CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module"
"""Attribute in which torch's ``checkpoint_wrapper`` holds the module it wraps; absent from names in a state dict."""


def state_name(name: str) -> str:
    """Return a module's or parameter's name as a state dict has it, without activation checkpointing wrappers.

    >>> state_name("blocks.0._checkpoint_wrapped_module.query.weight")
    'blocks.0.query.weight'
    """
    return ".".join(part for part in name.split(".") if part != CHECKPOINT_WRAPPER)


def parent_name(name: str) -> str:
    """Return the name of the module that holds a module; empty for a child of the root.

    >>> parent_name("encoder.layer.0")
    'encoder.layer'
    """
    return name.rpartition(".")[0]


def common_prefix(names: Iterable[str]) -> list[str]:
    """Return the leading parts that all dotted names have in common.

    >>> common_prefix(["encoder.layer.0.query", "encoder.layer.1.query"])
    ['encoder', 'layer']
    """
    columns = zip(*(name.split(".") for name in names), strict=False)
    return [column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns)]


def split_common_prefix(names: Sequence[str]) -> tuple[str, list[str]]:
    """Split the common prefix off the names, so that tables and axes can show it once.

    A single name, and a name that is itself the prefix, are kept whole.

    Returns:
        The prefix, without a trailing dot, and the rest of each name.

    >>> split_common_prefix(["encoder.layer.0", "encoder.layer.1"])
    ('encoder.layer', ['0', '1'])
    """
    prefix = common_prefix(names) if len(names) > 1 else []
    return ".".join(prefix), [".".join(name.split(".")[len(prefix) :]) or name for name in names]


def group_names(names: Iterable[str], group_by: GroupBy = "block") -> dict[str, list[str]]:
    """Group projections into layers, which share a rank.

    Args:
        names: Names of the projections.
        group_by: ``"block"``: the name up to its first index, so that a transformer block is a layer; an index that
            all names share is skipped. ``"parent"``: the module that holds the projection, so that an attention is a
            layer. ``"module"``: every projection is a layer of its own. Or a function from a projection's name to its
            layer's name.

    Returns:
        The names of each layer's projections, by the name of the layer.

    Raises:
        ValueError: ``group_by`` is none of these.

    >>> list(group_names(["encoder.layer.0.attention.query", "encoder.layer.1.attention.query"]))
    ['encoder.layer.0', 'encoder.layer.1']
    """
    names = list(names)
    key: Callable[[str], str]
    if callable(group_by):
        key = group_by
    elif group_by == "block":
        key = functools.partial(_block_name, shared=len(common_prefix(names)))
    elif group_by == "parent":
        key = parent_name
    elif group_by == "module":
        key = str
    else:
        raise ValueError(f'Expected group_by to be "block", "parent", "module" or a function but got {group_by!r}.')
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(str(key(name)), []).append(name)
    return groups


def _block_name(name: str, shared: int) -> str:
    """Return the name up to its first index behind the ``shared`` leading parts."""
    parts = name.split(".")
    indices = [i for i, part in enumerate(parts) if part.isdigit()]
    first = next((i for i in indices if i >= shared), indices[0] if indices else len(parts) - 1)
    return ".".join(parts[: first + 1])
