"""Finding the task head, which is trained in full along with the adapters."""

from collections.abc import Iterable, Mapping

from torch import nn

from lalora_lightning.adapters.inspection import is_metric, linear_layers_seen, named_modules, named_parameters
from lalora_lightning.layers import is_linear
from lalora_lightning.names import common_prefix, parent_name

__all__ = ["LANGUAGE_MODEL_HEADS", "find_head", "head_parameters", "named_head_parameters"]

LANGUAGE_MODEL_HEADS = ("lm_head", "embed_out", "output_projection")
"""Names of output layers that are pretrained with a language model and are therefore not a task head."""


def find_head(model: nn.Module, targets: Iterable[str]) -> set[str]:
    """Return the names of the task head's parameters; an empty set if the model has no head.

    Args:
        model: The model, adapted or not.
        targets: Names of the adapted modules.
    """
    try:
        return set(head_parameters(named_modules(model), targets))
    except ValueError:
        return set()


def head_parameters(modules: Mapping[str, nn.Module], targets: Iterable[str]) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained in full by default: those of the task head.

    Parameters that are already frozen or belong to an embedding are left out.

    Raises:
        ValueError: No head was found.
    """
    # The output layer of a language model is often its embedding, as in Whisper and BERT.
    embeddings = {id(p) for m in modules.values() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return {
        f"{name}.{key}": p
        for name in _find_head_modules(modules, targets)
        for key, p in named_parameters(modules[name])
        if p.requires_grad and id(p) not in embeddings
    }


def named_head_parameters(
    modules: Mapping[str, nn.Module], head: Iterable[str], targets: Iterable[str]
) -> dict[str, nn.Parameter]:
    """Return the parameters of the modules that ``modules_to_save`` names.

    Raises:
        ValueError: A target is inside one of these modules.
    """
    head = list(head)
    for target in targets:
        for name in head:
            if f"{target}.".startswith(f"{name}."):
                raise ValueError(
                    f"Expected targets outside of modules_to_save but {target} is inside {name}, which is trained in "
                    "full; leave it out of one of them."
                )
    return {f"{name}.{key}": p for name in head for key, p in named_parameters(modules[name])}


def _find_head_modules(modules: Mapping[str, nn.Module], targets: Iterable[str]) -> list[str]:
    """Find the modules next to the adapted backbone that contain a linear layer.

    The search starts at the root and descends through the modules that contain all targets. It stops at the first one
    with a trainable child that has a linear layer but no target. Frozen children, such as a teacher, are skipped. If
    all of them are frozen, nothing is trained in full.
    """
    any_frozen = False
    paths = [name.split(".") for name in targets]
    for depth in range(len(common_prefix(map(parent_name, targets))) + 1):
        here = ".".join(paths[0][:depth])
        prefix = here + "." if here else ""
        # A second name of a module that is found elsewhere is not among the modules.
        beside = [
            name
            for name, module in modules[here].named_children()
            if prefix + name in modules
            and name not in {path[depth] for path in paths}
            and any(map(is_linear, module.modules()))
            and not is_metric(module)
        ]
        trainable = [name for name in beside if any(p.requires_grad for p in modules[prefix + name].parameters())]
        if trainable:
            return [prefix + name for name in trainable if name not in LANGUAGE_MODEL_HEADS]
        any_frozen |= bool(beside)
    if any_frozen:
        return []
    raise ValueError(
        "Expected to find a task head next to the adapted layers but found none (a head that contains a target does "
        "not count); name the modules to train in full with modules_to_save, or pass an empty list to train only the "
        f"adapters. {linear_layers_seen(modules)}"
    )
