"""Inserting layers into a model and removing them."""

from collections.abc import Iterable, Mapping

from torch import nn

from lalora_lightning.layers import IN_PROJ, TruncatedLoRALinear, keep_plain_format, set_in_proj
from lalora_lightning.names import WRAPPERS

__all__ = ["insert_layers", "remove_layers"]


def insert_layers(model: nn.Module, layers: Mapping[str, TruncatedLoRALinear], trained: Iterable[nn.Parameter]) -> None:
    """Replace base layers with the layers that wrap them, and freeze everything else.

    Args:
        model: The model, changed in place.
        layers: The new layers by the names of their base layers.
        trained: Parameters of the model that stay trainable.
    """
    trained = list(trained)
    # Layers without an adapter, too: gradients have to pass through them.
    for module in model.modules():
        keep_plain_format(module)
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    _replace(model, layers)


def remove_layers(model: nn.Module, layers: Mapping[str, TruncatedLoRALinear]) -> None:
    """Replace the layers with their base layers, without the adapters."""
    _replace(model, {name: layer.base_layer for name, layer in layers.items()})


def _replace(model: nn.Module, replacements: Mapping[str, nn.Module]) -> None:
    """Replace modules by name, in every place that they have in the model."""
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for child, module in parent._modules.items():
            if module is not None:
                places.setdefault(module, []).append((parent, child))
    for name, replacement in replacements.items():
        prefix, _, child = name.rpartition(".")
        parent = _unwrapped(model.get_submodule(prefix))
        if child == IN_PROJ and isinstance(parent, nn.MultiheadAttention):
            set_in_proj(parent, replacement)
            continue
        for place, attribute in places[getattr(parent, child)]:
            setattr(place, attribute, replacement)


def _unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside of wrappers such as ``checkpoint_wrapper`` and ``torch.compile``."""
    inner = next((module._modules[name] for name in WRAPPERS if name in module._modules), None)
    return module if inner is None else _unwrapped(inner)
