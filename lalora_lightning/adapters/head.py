"""Finding the task head, which is trained in full along with the adapters."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lalora_lightning.adapters.inspection import is_metric, linear_layers_seen, named_modules, named_parameters
from lalora_lightning.layers import is_linear
from lalora_lightning.names import common_prefix, parent_name

__all__ = ["find_head", "head_modules", "head_parameters", "named_head_parameters", "output_layers"]


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


def output_layers(modules: Mapping[str, nn.Module]) -> set[str]:
    """Return the names of the output layers of language models, which are pretrained or tied to an embedding.

    These are the linear layers that share the weight of an embedding, those that a transformers model names with
    ``get_output_embeddings()``, and, outside of transformers models, those without bias that have the shape of an
    embedding. The new output layer of a CTC model is none of them, because the model has no embedding of its symbols.

    Args:
        modules: All modules of the model by name, see :func:`lalora_lightning.adapters.named_modules`.
    """
    embeddings = [m.weight for m in modules.values() if isinstance(m, nn.Embedding)]
    tied, shapes = {id(weight) for weight in embeddings}, {tuple(weight.shape) for weight in embeddings}
    transformers_models = [name for name, module in modules.items() if hasattr(module, "get_output_embeddings")]
    inside = tuple(f"{name}.".lstrip(".") for name in transformers_models)
    named = {id(_output_embeddings(modules[name])) for name in transformers_models}
    found = set()
    for name, module in modules.items():
        if is_linear(module):
            # The weight of an output layer is never quantized.
            weight: Any = module.weight
            unbiased = module.bias is None and not name.startswith(inside)
            if id(weight) in tied or id(module) in named or (unbiased and tuple(weight.shape) in shapes):
                found.add(name)
    return found


def head_parameters(modules: Mapping[str, nn.Module], targets: Iterable[str]) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained in full by default: those of the task head.

    Parameters that are already frozen, belong to an embedding, or are the weight of a language model's output layer are
    left out.

    Raises:
        ValueError: No head was found.
    """
    # The output layer of a language model is often its embedding, as in Whisper and BERT.
    pretrained = {id(p) for m in modules.values() if isinstance(m, nn.Embedding) for p in m.parameters()}
    outputs = output_layers(modules)
    pretrained |= {id(modules[name].weight) for name in outputs}
    return {
        f"{name}.{key}": p
        for name in head_modules(modules, targets, outputs)
        for key, p in named_parameters(modules[name])
        if p.requires_grad and id(p) not in pretrained
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


def head_modules(modules: Mapping[str, nn.Module], targets: Iterable[str], outputs: set[str]) -> list[str]:
    """Return the names of the modules next to the adapted backbone that contain a linear layer.

    The search starts at the root and descends through the modules that contain all targets. It stops at the first one
    with a trainable child that has a linear layer but no target. Frozen children, such as a teacher, are skipped. If
    all of them are frozen, or if the model ends in the output layer of a language model, nothing is trained in full.
    A pooler of a text classifier that was never trained belongs to the head, too.

    Args:
        modules: All modules of the model by name.
        targets: Names of the adapted modules.
        outputs: Names of the output layers of language models.

    Raises:
        ValueError: No head was found.
    """
    targets = list(targets)
    paths = [name.split(".") for name in targets]
    depths = range(len(common_prefix(map(parent_name, targets))) + 1)
    levels = {".".join(paths[0][:depth]): _beside(modules, paths, depth) for depth in depths}
    for depth, (here, beside) in enumerate(levels.items()):
        trainable = [name for name in beside if any(p.requires_grad for p in modules[name].parameters())]
        if trainable:
            inner = [name for beside in list(levels.values())[depth + 1 :] for name in beside]
            poolers = _untrained_poolers(modules, here, inner, targets)
            return poolers + [name for name in trainable if name not in outputs]
    if outputs or any(levels.values()):
        return []
    raise ValueError(
        "Expected to find a task head next to the adapted layers but found none (a head that contains a target does "
        "not count); name the modules to train in full with modules_to_save, or pass an empty list to train only the "
        f"adapters. {linear_layers_seen(modules)}"
    )


def _beside(modules: Mapping[str, nn.Module], paths: list[list[str]], depth: int) -> list[str]:
    """Return the modules at this depth that contain a linear layer but no target."""
    here = ".".join(paths[0][:depth])
    prefix = here + "." if here else ""
    # A second name of a module that is found elsewhere is not among the modules.
    return [
        prefix + name
        for name, module in modules[here].named_children()
        if prefix + name in modules
        and name not in {path[depth] for path in paths}
        and any(map(is_linear, module.modules()))
        and not is_metric(module)
    ]


def _untrained_poolers(
    modules: Mapping[str, nn.Module], here: str, inner: Iterable[str], targets: Iterable[str]
) -> list[str]:
    """Return the modules after the adapted layers of a text classifier's backbone that have never been trained.

    All their biases are zero, as initialized, and those of the targets are not. Sentence encoders have such poolers,
    and checkpoints without a pooler.
    """
    # These classes use the pooler of their backbone. In other models it may be there without being used.
    if not type(modules[here]).__name__.endswith(("ForSequenceClassification", "ForMultipleChoice")):
        return []
    if not any(_has_bias(modules[target]) for target in targets):
        return []
    order = {name: i for i, name in enumerate(modules)}
    last = max(order[target] for target in targets)
    layers = {name: [m for m in modules[name].modules() if is_linear(m)] for name in inner if order[name] > last}
    return [name for name, linear in layers.items() if all(m.bias is not None and not _has_bias(m) for m in linear)]


def _has_bias(layer: Any) -> bool:
    """Return whether a linear layer has a bias other than zero; True if the values are unknown on the meta device."""
    return layer.bias is not None and (layer.bias.is_meta or bool(layer.bias.any()))


def _output_embeddings(model: Any) -> object:
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
