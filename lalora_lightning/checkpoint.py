"""Adapter-only state: what fine-tuning changed, without the backbone."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lalora_lightning.adapters import require_lora_layers
from lalora_lightning.layers import TruncatedLoRALinear


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters, their ranks and everything else that is trained: a subset of ``model.state_dict()``.

    Raises:
        ValueError: The model has no LoRA layers.
    """
    require_lora_layers(model)
    state = model.state_dict()
    return {key: state[key] for key in adapter_keys(model)}


def load_lora_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load what :func:`lora_state_dict` gave into a model that was adapted with the same settings.

    Raises:
        ValueError: Keys are missing or unknown, or a shape or a rank does not fit; the message lists them all, and
            nothing has been loaded.
    """
    require_lora_layers(model)
    keys = list(adapter_keys(model))
    problems = missing_keys(keys, state)
    unknown = sorted(state.keys() - set(keys))
    if unknown:
        problems.append(f"unknown keys: {', '.join(unknown)}")
    own = model.state_dict()
    for key in keys:
        if key in state:
            problems += _misfits(key, state[key], own[key])
    problems += [
        f"{name}.rank is {int(state[f'{name}.rank'])} of at most {layer.max_rank}"
        for name, layer in require_lora_layers(model).items()
        if not problems and not 1 <= int(state[f"{name}.rank"]) <= layer.max_rank
    ]
    if problems:
        raise ValueError(
            "Cannot load the adapter state; add_lora has to be called with the settings it was trained with. "
            + "; ".join(problems)
            + "."
        )
    model.load_state_dict(state, strict=False)


def adapter_keys(model: nn.Module) -> Iterator[str]:
    """Keys of ``model.state_dict()`` that training changes: trained parameters and the buffers beside them."""
    for prefix, module in model.named_modules():
        trained = {name for name, p in module.named_parameters(recurse=False) if p.requires_grad}
        if isinstance(module, TruncatedLoRALinear):
            trained |= {"lora_A", "lora_B"}
        if trained:
            buffers = dict(module.named_buffers(recurse=False)).keys() - module._non_persistent_buffers_set
            yield from (f"{prefix}.{name}" if prefix else name for name in sorted(trained | buffers))


def missing_keys(keys: Iterable[str], state: Mapping[str, Any]) -> list[str]:
    """A line that names all keys the state lacks, or nothing."""
    missing = [key for key in keys if key not in state]
    return [f"missing keys: {', '.join(missing)}"] if missing else []


def _misfits(key: str, given: Any, own: Tensor) -> list[str]:
    if not isinstance(given, Tensor):
        return [f"expected {key} to be a tensor but got {type(given).__name__}"]
    if given.shape != own.shape:
        return [f"expected {key} to have the shape {tuple(own.shape)} but got {tuple(given.shape)}"]
    return []
