"""The modules of an adapted model that leave it whole: trained in full, or with buffers that training moves."""

from collections.abc import Collection, Iterator, Mapping

from torch import nn

from lalora_lightning.layers import TruncatedLoRALinear, is_quantized
from lalora_lightning.names import parent_name, state_name
from lalora_lightning.saving.peft_names import saved_with

__all__ = ["CONTAINERS", "base_modules", "has_moving_buffers", "outermost", "owners_of_buffers", "trained_modules"]

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""Modules that PEFT cannot save in full, because code reads them by index or name."""


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of the base model by all of their names, with each LoRA layer in place of its base layer."""
    modules: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        name = state_name(name)
        if not name.startswith(inside or "\0"):
            modules[name] = module
            if isinstance(module, TruncatedLoRALinear):
                inside = (*inside, f"{name}.")
    return modules


def trained_modules(modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the names of the modules with trainable parameters of their own that belong to no adapter.

    A parameter that several modules share counts for all of them.

    Raises:
        ValueError: A parameter of an adapted base layer is trainable.
    """
    names = []
    for name, module in modules.items():
        if isinstance(module, TruncatedLoRALinear):
            trained = [key for key, p in module.base_layer.named_parameters() if p.requires_grad]
            if trained:
                raise ValueError(
                    f"Expected adapted layers to be frozen but the {trained[0]} of {name} is trained, which a PEFT "
                    "adapter cannot contain; use lora_state_dict(model), or merge_lora(model, remove=True)."
                )
        elif any(p.requires_grad for p in module._parameters.values() if p is not None):
            names.append(_trained_as(_saved_as(name, modules), modules))
    return names


def owners_of_buffers(modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the names of the modules with buffers that training may move, such as BatchNorm's statistics."""
    return [
        _saved_as(name, modules)
        for name, module in modules.items()
        if not isinstance(module, TruncatedLoRALinear) and has_moving_buffers(module)
    ]


def has_moving_buffers(module: nn.Module) -> bool:
    """Return whether a module has persistent floating-point buffers of its own."""
    return not is_quantized(module) and any(
        buffer.is_floating_point()
        for key, buffer in module._buffers.items()
        if buffer is not None and key not in module._non_persistent_buffers_set
    )


def _saved_as(name: str, modules: Mapping[str, nn.Module]) -> str:
    """Return the name of the module that PEFT has to save so that it saves a module."""
    # The parameters of a parametrization belong to the module that it parametrizes.
    name = name.partition(".parametrizations.")[0]
    while isinstance(modules[name], CONTAINERS):
        name = parent_name(name)
    return name


def _trained_as(name: str, modules: Mapping[str, nn.Module]) -> str:
    """Return the largest module around a trained one that is trained as a whole and that its name singles out.

    PEFT's configurations and its classes for tasks name whole heads: ``classifier``, not ``classifier.out_proj``.
    """
    parent = parent_name(name)
    if (
        parent
        and not isinstance(modules[parent], CONTAINERS)
        and all(p.requires_grad for p in modules[parent].parameters())
        and saved_with([parent], modules) == [parent]
    ):
        return _trained_as(parent, modules)
    return name


def outermost(names: Collection[str]) -> Iterator[str]:
    """Yield the names that are not inside of another one, without duplicates."""
    for name in dict.fromkeys(names):
        if not any(name != other and name.startswith(f"{other}.") for other in names):
            yield name
