"""What a user should know about the chosen targets: one line each, for a warning."""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from lalora_lightning.adapters.fused import interleaved_projections
from lalora_lightning.adapters.inspection import expert_parameters
from lalora_lightning.adapters.targets import ALL_LINEAR, Targets
from lalora_lightning.names import parent_name

__all__ = ["remarks", "weight_readers"]


def remarks(
    modules: Mapping[str, nn.Module], targets: Targets, target_modules: Sequence[str] | str | None, dropout: float
) -> Iterator[str]:
    """Yield what a user should know about the chosen targets.

    Args:
        modules: All modules of the model by name, before they are adapted.
        targets: The modules to adapt.
        target_modules: As in :func:`lalora_lightning.add_lora`.
        dropout: Dropout on the adapters' input.
    """
    sliced = [name for name, slices in targets.items() if slices is not None]
    unknown = [name for name, found in interleaved_projections(modules, sliced).items() if found is None]
    if unknown:
        yield (
            f"Query, key and value are assumed to be one after the other in {_listed(unknown)}. If "
            f"{_kind(modules, unknown)} orders them head by head, pass target_modules to adapt the whole projection."
        )
    if dropout and (readers := weight_readers(modules, targets)):
        yield (
            f"The adapters' dropout has no effect in {_listed(readers)}: {_kind(modules, readers)} reads the weight of "
            "its projection and does not call it."
        )
    wanted = ".*" if target_modules == ALL_LINEAR else target_modules
    if wanted is not None and (experts := expert_parameters(modules, wanted)):
        yield (
            f"Not adapted, because only linear modules can be: {_listed(experts)}. target_modules matches these "
            "weights too, but they are 3-D parameters, as in mixtures of experts."
        )


def weight_readers(modules: Mapping[str, nn.Module], names: Iterable[str]) -> list[str]:
    """Return the linear modules whose parent reads their weight in its forward pass instead of calling them.

    Args:
        modules: All modules of the model by name.
        names: Names of linear modules.
    """
    return [name for name in names if _is_read(modules, name)]


def _is_read(modules: Mapping[str, nn.Module], name: str) -> bool:
    reads = calls = False
    prefix, _, path = name.rpartition(".")
    # Some blocks read the weights of their attention.
    for _ in range(2):
        parent = modules.get(prefix)
        # nn.MultiheadAttention is refused.
        if parent is None or isinstance(parent, nn.MultiheadAttention):
            break
        kind: Any = type(parent)
        read, called = _uses(kind, f"self.{path}")
        # timm's BEiT, EVA and Swin v2 do both: they read the weight if the biases are parameters of the attention.
        if kind.__module__.startswith("timm.") and getattr(parent, "q_bias", None) is not None:
            called = called and (not read or getattr(parent, "qkv_bias_separate", False))
        reads, calls = reads or read, calls or called
        prefix, _, child = prefix.rpartition(".")
        path = f"{child}.{path}"
    return reads and not calls


@functools.cache
def _uses(kind: type, layer: str) -> tuple[bool, bool]:
    """Return whether the forward pass of a class reads the weight of a layer, and whether it calls the layer."""
    nodes = list(_forward_nodes(kind))
    layers = {layer} | {
        target.id
        for n in nodes
        if isinstance(n, ast.Assign) and ast.unparse(n.value) == layer
        for target in n.targets
        if isinstance(target, ast.Name)
    }
    # T5 reads the data type of a weight, which does no harm.
    inspected = {id(n.value) for n in nodes if isinstance(n, ast.Attribute) and n.attr in ("dtype", "device", "shape")}
    read = any(
        isinstance(n, ast.Attribute) and n.attr == "weight" and ast.unparse(n.value) in layers
        for n in nodes
        if id(n) not in inspected
    )
    return read, any(isinstance(n, ast.Call) and ast.unparse(n.func) in layers for n in nodes)


def _forward_nodes(kind: type) -> Iterator[ast.AST]:
    """Yield the syntax nodes of a class's ``forward`` and of the methods that it calls; none without source code."""
    pending, seen = ["forward"], {"forward"}
    while pending:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(getattr(kind, pending.pop()))))
        except (OSError, TypeError, SyntaxError):
            continue
        nodes = list(ast.walk(tree))
        own_name = next((node.arg for node in nodes if isinstance(node, ast.arg)), "self")
        for node in nodes:
            if isinstance(node, ast.Name) and node.id == own_name:
                node.id = "self"
        for node in nodes:
            yield node
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self" and node.attr not in seen:
                seen.add(node.attr)
                if inspect.isfunction(getattr(kind, node.attr, None)):
                    pending.append(node.attr)


def _kind(modules: Mapping[str, nn.Module], names: Sequence[str]) -> str:
    return type(modules[parent_name(names[0])]).__name__


def _listed(names: Sequence[str]) -> str:
    """Return the first name and how many there are besides."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
