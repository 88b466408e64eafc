"""Dotted names of modules and parameters: common prefixes, and grouping of projections into layers.

Does not import torch.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

__all__ = [
    "WRAPPERS",
    "BlocksByKind",
    "GroupBy",
    "blocks_by_kind",
    "common_prefix",
    "endings",
    "group_names",
    "parent_name",
    "short_names",
    "split_common_prefix",
    "state_name",
]

GroupBy = Literal["block", "parent", "module", "kind"] | Callable[[str], str]

WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module")
"""Attributes that hold the wrapped module: of ``checkpoint_wrapper``, ``torch.compile`` and FSDP."""


def state_name(name: str) -> str:
    """Return the name of a module or parameter in the unwrapped model.

    Wrappers of activation checkpointing, ``torch.compile`` and FSDP do not show.

    >>> state_name("blocks.0._checkpoint_wrapped_module.query.weight")
    'blocks.0.query.weight'
    >>> state_name("_orig_mod.head.weight")
    'head.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def parent_name(name: str) -> str:
    """Return the name of a module's parent; empty for a child of the root.

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

    A single name is not split. A name that is equal to the prefix is kept as it is.

    Returns:
        The prefix, without a trailing dot, and the rest of each name.

    >>> split_common_prefix(["encoder.layer.0", "encoder.layer.1"])
    ('encoder.layer', ['0', '1'])
    """
    prefix = common_prefix(names) if len(names) > 1 else []
    return ".".join(prefix), [".".join(name.split(".")[len(prefix) :]) or name for name in names]


def endings(name: str) -> list[str]:
    """Return the endings of a dotted name, the shortest first.

    >>> endings("0.attn.q")
    ['q', 'attn.q', '0.attn.q']
    """
    parts = name.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]


def short_names(names: Sequence[str]) -> list[str]:
    """Return the shortest endings of dotted names that tell them apart.

    >>> short_names(["attn.proj", "mlp.fc1", "mlp.fc2"])
    ['proj', 'fc1', 'fc2']
    >>> short_names(["layer.0.SelfAttention.q", "layer.1.EncDecAttention.q"])
    ['SelfAttention.q', 'EncDecAttention.q']
    """

    def short(name: str) -> str:
        taken = {ending for other in names if other != name for ending in endings(other)}
        return next((ending for ending in endings(name) if ending not in taken), name)

    return [short(name) for name in names]


class BlocksByKind(NamedTuple):
    """Projections as a table with a row for each block and a column for each kind of projection.

    Attributes:
        blocks: Labels of the rows.
        kinds: Labels of the columns.
        cells: ``(row, column)`` of each projection.
    """

    blocks: list[str]
    kinds: list[str]
    cells: list[tuple[int, int]]


def blocks_by_kind(names: Sequence[str]) -> BlocksByKind | None:
    """Arrange projections as a table, or return None if they are not of several blocks and several kinds.

    >>> blocks_by_kind(["layer.0.attn.q", "layer.0.mlp.up", "layer.1.attn.q", "layer.1.mlp.up"])
    BlocksByKind(blocks=['0', '1'], kinds=['q', 'up'], cells=[(0, 0), (0, 1), (1, 0), (1, 1)])
    >>> blocks_by_kind(["layer.0", "layer.1"])
    """
    groups = group_names(names, "block")
    block_of = {name: block for block, members in groups.items() for name in members}
    kind_of = {name: name.removeprefix(block).lstrip(".") for name, block in block_of.items()}
    blocks, kinds = list(groups), list(dict.fromkeys(kind_of.values()))
    if len(blocks) < 2 or len(kinds) < 2 or "" in kinds:
        return None
    cells = [(blocks.index(block_of[name]), kinds.index(kind_of[name])) for name in names]
    return BlocksByKind(split_common_prefix(blocks)[1], short_names(kinds), cells)


def group_names(names: Iterable[str], group_by: GroupBy = "block") -> dict[str, list[str]]:
    """Group projections into layers, which share a rank.

    Args:
        names: Names of the projections.
        group_by: ``"block"`` groups by the name up to the first index, so that a transformer block is a layer; an index
            that all names share is skipped. In hierarchical models, where the first index is that of a stage, it groups
            by the name up to the index of the block in the stage. ``"parent"`` groups by the parent module, so that an
            attention module is a layer. With ``"module"``, every projection is a layer of its own. With ``"kind"``,
            the projections of one name in all blocks are a layer. A function maps the name of a projection to the name
            of its layer.

    Returns:
        The names of each layer's projections, by the name of the layer.

    Raises:
        ValueError: ``group_by`` is none of these.

    >>> list(group_names(["encoder.layer.0.attention.query", "encoder.layer.1.attention.query"]))
    ['encoder.layer.0', 'encoder.layer.1']
    >>> list(group_names([f"stages.{stage}.blocks.{block}.attn.qkv" for stage in (0, 1) for block in (0, 1)]))
    ['stages.0.blocks.0', 'stages.0.blocks.1', 'stages.1.blocks.0', 'stages.1.blocks.1']
    >>> group_names(["layer.0.query", "layer.0.value", "layer.1.query", "layer.1.value"], "kind")
    {'layer.*.query': ['layer.0.query', 'layer.1.query'], 'layer.*.value': ['layer.0.value', 'layer.1.value']}
    """
    names = list(names)
    key: Callable[[str], str]
    if callable(group_by):
        key = group_by
    elif group_by == "block":
        key = functools.partial(_block_name, shared=len(common_prefix(names)), lists=_lists_of_blocks(names))
    elif group_by == "parent":
        key = parent_name
    elif group_by == "module":
        key = str
    elif group_by == "kind":
        key = _kind_name
    else:
        raise ValueError(
            f'Expected group_by to be "block", "parent", "module", "kind" or a function but got {group_by!r}.'
        )
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(str(key(name)), []).append(name)
    return groups


def _block_name(name: str, shared: int, lists: set[tuple[str, ...]]) -> str:
    """Return the name up to its first index after the ``shared`` leading parts, or a later one in a list of blocks."""
    parts = name.split(".")
    indices = [i for i, part in enumerate(parts) if part.isdigit()]
    first = next((i for i in indices if i >= shared), indices[0] if indices else len(parts) - 1)
    block = max([first, *(i for i in indices if i > first and _without_indices(parts[:i]) in lists)])
    return ".".join(parts[: block + 1])


def _lists_of_blocks(names: Iterable[str]) -> set[tuple[str, ...]]:
    """Return the lists that contain transformer blocks rather than parts of one, by name without indices.

    Blocks are alike: several of them contain the same projection under the same name, such as ``attn.qkv``. Sub-layers
    differ (T5's ``SelfAttention.q`` and ``EncDecAttention.q``). Experts and heads are alike, too, but the projections
    are their own children (``gate_proj``).
    """
    indices: dict[tuple[tuple[str, ...], tuple[str, ...]], set[str]] = {}
    for name in names:
        parts = tuple(name.split("."))
        for i, part in enumerate(parts):
            if part.isdigit() and sum(not inner.isdigit() for inner in parts[i + 1 :]) > 1:
                indices.setdefault((parts[:i], parts[i + 1 :]), set()).add(part)
    return {_without_indices(prefix) for (prefix, _), found in indices.items() if len(found) > 1}


def _kind_name(name: str) -> str:
    """Return the name without the indices of blocks, also those of torchvision (``encoder_layer_0``).

    An index at the end is that of a layer in a Sequential.
    """
    *parts, last = name.split(".")
    return ".".join([*(re.sub(r"(^|_)\d+$", r"\1*", part) for part in parts), last])


def _without_indices(parts: Iterable[str]) -> tuple[str, ...]:
    return tuple("*" if part.isdigit() else part for part in parts)
