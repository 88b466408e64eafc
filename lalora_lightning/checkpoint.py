"""Adapter-only state: what fine-tuning changed, without the backbone."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lalora_lightning.adapters import lora_layers, require_lora_layers


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters, their ranks, everything else that is trained, and buffers: ``model.state_dict()`` without the rest.

    What is frozen now is taken for backbone, unless it is an adapter: freeze a head after taking the state.

    Raises:
        ValueError: The model has no LoRA layers.
    """
    require_lora_layers(model)
    return without_frozen(model, model.state_dict())


def load_lora_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load what :func:`lora_state_dict` gave into a model that was adapted with the same settings.

    Raises:
        ValueError: Keys are missing or unknown, or a shape or a rank does not fit; the message lists them all, and
            nothing has been loaded.
    """
    own = lora_state_dict(model)
    problems = missing_keys(model, state)
    unknown = sorted(state.keys() - own.keys())
    if unknown:
        problems.append(f"unknown keys: {', '.join(unknown)}")
    for key, value in own.items():
        if key in state:
            problems += _misfits(key, state[key], value)
    if not problems:
        ranks = {f"{name}.rank".lstrip("."): layer.max_rank for name, layer in lora_layers(model).items()}
        problems = [
            f"expected {key} to be in [1, {max_rank}] but got {int(state[key])}"
            for key, max_rank in ranks.items()
            if not 1 <= int(state[key]) <= max_rank
        ]
    if problems:
        raise ValueError(
            "Cannot load the adapter state; add_lora has to be called with the settings it was trained with. "
            f"{'; '.join(problems)}."
        )
    model.load_state_dict(state, strict=False)


def without_frozen(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state of the model without its frozen parameters; adapters stay in, also where they are frozen."""
    factors = {f"{name}.{factor}".lstrip(".") for name in lora_layers(model) for factor in ("lora_A", "lora_B")}
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad} - factors
    return {key: value for key, value in state.items() if key not in frozen}


def missing_keys(model: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """A line that names all keys an adapter state of the model lacks, or nothing."""
    missing = [key for key in without_frozen(model, model.state_dict()) if key not in state]
    return [f"missing keys: {', '.join(missing)}"] if missing else []


def _misfits(key: str, given: Any, own: Tensor) -> list[str]:
    if not isinstance(given, Tensor):
        return [f"expected {key} to be a tensor but got {type(given).__name__}"]
    if given.shape != own.shape:
        return [f"expected {key} to have the shape {tuple(own.shape)} but got {tuple(given.shape)}"]
    return []
