"""Adapter-only state dicts: everything that fine-tuning changed, without the frozen backbone."""

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lalora_lightning.adapters import (
    find_head,
    insert_layers,
    lora_layers,
    named_modules,
    named_parameters,
    remove_layers,
    require_lora_layers,
)
from lalora_lightning.files import load_file
from lalora_lightning.layers import TruncatedLoRALinear, is_quantized, mask_problem, replace_ranks
from lalora_lightning.names import common_prefix, state_name
from lalora_lightning.saving.pretrained_folder import read_pretrained_weights
from lalora_lightning.saving.wrappers import unwrapped

__all__ = [
    "frozen_names",
    "load_by_name",
    "load_lora_state_dict",
    "lora_state_dict",
    "read_state",
    "require_matching_state",
    "without_frozen",
]

_CANNOT_LOAD = "Cannot load the adapter state"


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return ``model.state_dict()`` without the backbone: adapters, rank masks, other trainable parameters and buffers.

    All frozen parameters count as backbone, unless they belong to an adapter. If you want to freeze the head, get the
    state first. Wrappers of ``torch.compile``, DDP and Fabric do not show in the keys, so that
    :func:`load_lora_state_dict` can load the state into a model with or without them.

    Raises:
        ValueError: The model has no LoRA layers.
    """
    model = unwrapped(model)
    require_lora_layers(model)
    return _by_name(without_frozen(model, model.state_dict()))


def load_lora_state_dict(model: nn.Module, state: Mapping[str, Any] | str | os.PathLike[str]) -> None:
    """Load a state from :func:`lora_state_dict`, or the state of an adapted module from a Trainer's checkpoint.

    A model without LoRA layers is adapted first, as the state describes, so the settings of the run are not needed.
    Only the backbone has to be the same: ``load_lora_state_dict(Classifier(), "best.ckpt")``. The adapters are then
    trainable, and so are all other parameters in an adapter-only state. With the state of a whole model, the task head
    is trainable. A head that an adapter-only state lacks was frozen in the run. It stays frozen with the values of the
    model, and a warning names it. Dropout is not part of a state. The state of a LightningModule can also be loaded
    into the model that it contains.

    Args:
        model: A model with the same LoRA layers as the state, or without LoRA layers.
        state: The state dict, a file that ``torch.save`` or a Trainer wrote, or a ``.safetensors`` file or folder that
            ``save_pretrained`` wrote.

    Raises:
        ValueError: Keys are missing or unknown, or a value does not fit; the message lists all of them.
            Or the file is damaged. Nothing is loaded.
        FileNotFoundError: There is no such file, or the folder has no ``.safetensors`` file.
    """
    if not isinstance(state, Mapping):
        state = read_state(state)
    model = unwrapped(model)
    state = _without_root(model, replace_ranks(_by_name(state)))
    _require_finite_factors(state)
    if lora_layers(model):
        require_matching_state(model, state)
    else:
        _adapt_as_described(model, state)
    load_by_name(model, state)


def require_matching_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Check that a state, whole or adapter-only, fits an adapted model.

    Raises:
        ValueError: Keys are missing or unknown, or a value does not fit; the message lists all of them.
    """
    own, state, layers = _by_name(model.state_dict()), replace_ranks(_by_name(state)), lora_layers(model)
    missing = [key for key in without_frozen(model, own) if key not in state]
    problems = [f"missing keys: {', '.join(missing)}"] if missing else []
    unknown = [str(key) for key in state if key not in own]
    if unknown:
        problems.append(f"unknown keys: {', '.join(unknown)}")
    # Other modules check their own extra state, and the code books of quantized layers vary in length.
    unchecked = _quantization_keys(model, own)
    for key, value in own.items():
        if key in state and not key.endswith("_extra_state") and key not in unchecked:
            problems += _misfits(key, state[key], value)
    for name, layer in layers.items():
        key = f"{name}._extra_state".lstrip(".")
        if key in state and not layer.is_own_extra_state(state[key]):
            problems.append(
                f"expected scaling and output slices of {key} to be {layer.get_extra_state().tolist()} but got "
                f"{state[key].tolist() if isinstance(state[key], Tensor) else state[key]!r}"
            )
    if not problems:
        masks = [f"{name}.rank_mask".lstrip(".") for name in layers]
        problems = [problem for key in masks if (problem := mask_problem(key, state[key]))]
    if problems:
        raise ValueError(f"{_CANNOT_LOAD}: {'; '.join(problems)}.")


def without_frozen(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state of the model without its frozen parameters; frozen adapters are kept."""
    frozen = frozen_names(model) | _quantization_keys(model, state)
    return {key: value for key, value in state.items() if state_name(key) not in frozen}


def load_by_name(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load a state whose keys are the names in the unwrapped model; other keys may be missing."""
    keys = {state_name(key): key for key in model.state_dict()}
    model.load_state_dict({keys[name]: value for name, value in state.items()}, strict=False)


def frozen_names(model: nn.Module) -> set[str]:
    """Return the names of the frozen parameters, except for adapters."""
    factors = {f"{name}.{factor}".lstrip(".") for name in lora_layers(model) for factor in ("lora_A", "lora_B")}
    return {name for name, p in named_parameters(model, remove_duplicate=False) if not p.requires_grad} - factors


def _without_root(model: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Remove leading parts that all keys share, until the names of the layers exist in the model."""
    modules = named_modules(model)
    layers = [str(key).removesuffix(".lora_B") for key in state if str(key).endswith(".lora_B")]
    prefix = ""
    for part in common_prefix(map(str, state)):
        if any(name in modules for name in layers):
            break
        prefix += f"{part}."
        layers = [name.removeprefix(f"{part}.") for name in layers]
    if not prefix or not any(name in modules for name in layers):
        return state
    return {str(key).removeprefix(prefix): value for key, value in state.items()}


def _require_finite_factors(state: Mapping[str, Any]) -> None:
    """Check the factors, also beyond the rank: infinity times the mask's zero is NaN, so every output would be NaN."""
    factors = {key: value for key, value in state.items() if key.rpartition(".")[2] in ("lora_A", "lora_B")}
    wrong = [key for key, value in factors.items() if isinstance(value, Tensor) and not torch.isfinite(value).all()]
    if wrong:
        raise ValueError(
            f"{_CANNOT_LOAD}: expected finite factors but {', '.join(wrong)} contain NaN or Inf; take a checkpoint "
            "from before the run diverged."
        )


def _quantization_keys(model: nn.Module, state: Mapping[str, Any]) -> set[str]:
    """Return the keys of scales and code books, which the state of a quantized layer contains."""
    prefixes = tuple(f"{name}." for name, module in named_modules(model).items() if is_quantized(module))
    parameters = {name for name, _ in named_parameters(model, remove_duplicate=False)}
    names = {state_name(key) for key in state}
    return {name for name in names if prefixes and name.startswith(prefixes) and name not in parameters}


def _by_name(state: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a state with the names of the unwrapped model as its keys."""
    return {state_name(str(key)): value for key, value in state.items()}


def read_state(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Read a state from a file of ``torch.save`` or a Trainer, a ``.safetensors`` file or a folder with such files.

    Raises:
        ValueError: The file is damaged or contains something else.
        FileNotFoundError: There is no such file.
    """
    if Path(path).is_dir() or Path(path).suffix == ".safetensors":
        return read_pretrained_weights(Path(path))
    loaded = load_file(path, "a file of torch.save or of a Trainer")
    if isinstance(loaded, Mapping) and "pytorch-lightning_version" in loaded:
        loaded = loaded.get("state_dict")
    if not isinstance(loaded, Mapping):
        raise ValueError(f"Expected {path} to hold a state dict but it holds a {type(loaded).__name__}.")
    return loaded


def _adapt_as_described(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Insert the layers of a state into a plain model, and remove them if the state does not fit.

    An adapter-only state holds what the run trained. A module of the task head without any parameter in it was frozen
    in the run, and stays so. If the state has some of a module's parameters, the others are missing.
    """
    layers = _described_layers(model, state)
    was_trainable = [(p, p.requires_grad) for p in model.parameters()]
    trained, frozen_heads = find_head(model, layers), []
    if not _is_whole(state, layers):
        head = _by_module(trained, layers)
        frozen_heads = [module for module, names in head.items() if names.isdisjoint(state)]
        trained = trained.difference(*(head[module] for module in frozen_heads)).union(state)
    insert_layers(model, layers, [])
    for name, parameter in named_parameters(model):
        if name in trained:
            parameter.requires_grad_(True)
    try:
        require_matching_state(model, state)
    except ValueError as error:
        remove_layers(model, layers)
        for parameter, trainable in was_trainable:
            parameter.requires_grad_(trainable)
        raise ValueError(
            f"{error} If the run trained modules in full that differ from the task head, call add_lora "
            "with its settings (modules_to_save) first."
        ) from error
    if frozen_heads:
        warnings.warn(
            f"La-LoRA: the state has no parameters of {', '.join(frozen_heads)} (task head), which stay frozen with "
            "the values of this model; if the run trained them, the state is incomplete.",
            stacklevel=3,
        )


def _is_whole(state: Mapping[str, Any], layers: Mapping[str, TruncatedLoRALinear]) -> bool:
    """Return whether a state is that of the whole model: it has the parameters of all adapted base layers."""
    bases = {f"{name}.base_layer.".lstrip("."): layer.base_layer for name, layer in layers.items()}
    return all(f"{prefix}{key}" in state for prefix, base in bases.items() for key, _ in named_parameters(base))


def _by_module(head: Iterable[str], layers: Iterable[str]) -> dict[str, set[str]]:
    """Group parameters of the task head by the outermost modules without an adapted layer."""
    layers = list(layers)
    modules: dict[str, set[str]] = {}
    for name in sorted(head):
        shared = max(len(common_prefix([name, layer])) for layer in layers)
        modules.setdefault(".".join(name.split(".")[: shared + 1]), set()).add(name)
    return modules


def _described_layers(model: nn.Module, state: Mapping[str, Any]) -> dict[str, TruncatedLoRALinear]:
    """Return new layers around modules of the model, by name, as a state describes them."""
    layers, problems = {}, []
    # Also the further names of a module, which is adapted once.
    modules = {state_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    modules |= named_modules(model)
    adapted: set[nn.Module] = set()
    for name in [key.removesuffix(".lora_B") for key in state if str(key).endswith(".lora_B")]:
        factor, extra = state[f"{name}.lora_B"], state.get(f"{name}._extra_state")
        try:
            if name not in modules:
                raise ValueError("the model has no such module")
            if modules[name] in adapted:
                continue
            adapted.add(modules[name])
            if not isinstance(factor, Tensor) or not isinstance(extra, Tensor) or extra.ndim != 1 or len(extra) < 3:
                raise ValueError("lora_B or _extra_state do not describe an adapter")
            scaling, *edges = extra.tolist()
            slices = [(int(start), int(stop)) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
            # Adapters are trained in float32 even if the file holds half precision.
            dtype = torch.promote_types(factor.dtype, torch.float32)
            layers[name] = TruncatedLoRALinear.with_scaling(
                modules[name], factor.shape[-1], scaling, out_slices=slices, dtype=dtype
            )
            if f"{name}.start_B" in state:
                layers[name].keep_initial_factors()
        except (ValueError, TypeError, OverflowError, RuntimeError, IndexError) as error:
            problems.append(f"cannot adapt {name}: {str(error).rstrip('.')}")
    if problems:
        raise ValueError(f"{_CANNOT_LOAD}: {'; '.join(problems)}.")
    if not layers:
        raise ValueError(
            "Expected a state of LoRA layers, as lora_state_dict returns it, but it holds "
            f"{', '.join(map(str, list(state)[:5])) or 'nothing'}."
        )
    return layers


def _misfits(key: str, given: Any, own: Tensor) -> list[str]:
    if not isinstance(given, Tensor):
        return [f"expected {key} to be a tensor but got {type(given).__name__}"]
    if given.shape != own.shape:
        return [f"expected {key} to have the shape {tuple(own.shape)} but got {tuple(given.shape)}"]
    if (given.is_floating_point(), given.is_complex()) != (own.is_floating_point(), own.is_complex()):
        return [f"expected {key} to hold numbers like {own.dtype} but got {given.dtype}"]
    return []
