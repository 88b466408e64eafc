"""Adapter-only state: what fine-tuning changed, without the backbone."""

import zipfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lalora_lightning.adapters import lora_layers, require_lora_layers
from lalora_lightning.layers import TruncatedLoRALinear

_CANNOT_LOAD = "Cannot load the adapter state"


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters, their ranks, everything else that is trained, and buffers: ``model.state_dict()`` without the rest.

    What is frozen now is taken for backbone, unless it is an adapter: freeze a head after taking the state.

    Raises:
        ValueError: The model has no LoRA layers.
    """
    require_lora_layers(model)
    return without_frozen(model, model.state_dict())


def load_lora_state_dict(model: nn.Module, state: Mapping[str, Any] | str | PathLike[str]) -> None:
    """Load what :func:`lora_state_dict` gave, or what a Trainer's checkpoint holds of an adapted module.

    A model without LoRA layers gets those that the state describes; whatever the state does not hold is the backbone
    then, and frozen. ``load_lora_state_dict(Classifier(), "best.ckpt")`` needs to know nothing of the run.

    Args:
        model: With the layers the state was taken from, or without any.
        state: The state itself, or a file that ``torch.save`` or a Trainer wrote.

    Raises:
        ValueError: Keys are missing or unknown, or a value does not fit; the message lists them all, and nothing has
            been loaded. Or the file is damaged.
    """
    if not isinstance(state, Mapping):
        state = _read(state)
    added = {} if lora_layers(model) else _described_layers(model, state)
    for name, layer in added.items():
        model.set_submodule(name, layer)
    frozen = [p for name, p in model.named_parameters() if added and p.requires_grad and name not in state]
    for parameter in frozen:
        parameter.requires_grad_(False)
    problems = _problems(model, state)
    if problems:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for name, layer in added.items():
            model.set_submodule(name, layer.base_layer)
        raise ValueError(f"{_CANNOT_LOAD}: {'; '.join(problems)}.")
    model.load_state_dict(state, strict=False)


def check_file(path: str | PathLike[str]) -> None:
    """Compare a file's contents with the checksums in it, at which ``torch.load`` does not look.

    Raises:
        ValueError: They differ. A file that is no zip archive is left to ``torch.load``.
    """
    if not Path(path).is_file() or not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:
        # BadZipFile, and what other damage leads to.
        damaged = str(error)
    if damaged is not None:
        raise ValueError(f"Expected {path} to be as it was written but it is damaged: {damaged}. Take another copy.")


def without_frozen(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state of the model without its frozen parameters; adapters stay in, also where they are frozen."""
    factors = {f"{name}.{factor}".lstrip(".") for name in lora_layers(model) for factor in ("lora_A", "lora_B")}
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad} - factors
    return {key: value for key, value in state.items() if key not in frozen}


def missing_keys(model: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """A line that names all keys an adapter state of the model lacks, or nothing."""
    missing = [key for key in without_frozen(model, model.state_dict()) if key not in state]
    return [f"missing keys: {', '.join(missing)}"] if missing else []


def _read(path: str | PathLike[str]) -> Mapping[str, Any]:
    check_file(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:
        # Of what a file can be instead, torch makes errors of many kinds.
        raise ValueError(
            f"Expected {path} to be a file of torch.save or of a Trainer but it cannot be read "
            f"({type(error).__name__}: {str(error).split(chr(10))[0]})."
        ) from error
    if isinstance(loaded, Mapping) and "pytorch-lightning_version" in loaded:
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping):
        raise ValueError(f"Expected {path} to hold a state dict but it holds a {type(loaded).__name__}.")
    return loaded


def _described_layers(model: nn.Module, state: Mapping[str, Any]) -> dict[str, TruncatedLoRALinear]:
    """New layers over the model's own, by name, as a state describes them."""
    layers, problems = {}, []
    modules = dict(model.named_modules())
    for name in [key.removesuffix(".lora_B") for key in state if str(key).endswith(".lora_B")]:
        factor, extra = state[f"{name}.lora_B"], state.get(f"{name}._extra_state")
        try:
            if name not in modules:
                raise ValueError("the model has no such module")
            if not isinstance(factor, Tensor) or not isinstance(extra, Tensor) or extra.ndim != 1 or len(extra) < 3:
                raise ValueError("lora_B or _extra_state do not describe an adapter")
            scaling, *edges = extra.tolist()
            slices = [(int(start), int(stop)) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
            rank = factor.shape[-1]
            layers[name] = TruncatedLoRALinear(
                modules[name], rank, scaling * rank, out_slices=slices, dtype=factor.dtype
            )
            # Not by way of alpha, which would round it.
            layers[name].scaling = scaling
        except (ValueError, TypeError, OverflowError, RuntimeError, IndexError) as error:
            problems.append(f"cannot adapt {name}: {str(error).rstrip('.')}")
    if problems:
        raise ValueError(f"{_CANNOT_LOAD}: {'; '.join(problems)}.")
    if not layers:
        raise ValueError(
            "Expected a state of LoRA layers, as lora_state_dict gives it, but it holds "
            f"{', '.join(map(str, list(state)[:5])) or 'nothing'}."
        )
    return layers


def _problems(model: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """A line for everything that keeps a state from being loaded into an adapted model."""
    own = model.state_dict()
    problems = missing_keys(model, state)
    unknown = [str(key) for key in state if key not in own]
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
    return problems


def _misfits(key: str, given: Any, own: Any) -> list[str]:
    if not isinstance(own, Tensor):
        # Extra state of a module of the user's.
        return []
    if not isinstance(given, Tensor):
        return [f"expected {key} to be a tensor but got {type(given).__name__}"]
    if given.shape != own.shape:
        return [f"expected {key} to have the shape {tuple(own.shape)} but got {tuple(given.shape)}"]
    if (given.is_floating_point(), given.is_complex()) != (own.is_floating_point(), own.is_complex()):
        return [f"expected {key} to hold numbers like {own.dtype} but got {given.dtype}"]
    if key.endswith("._extra_state") and not torch.equal(given.cpu(), own.cpu()):
        return [f"expected scaling and output slices of {key} to be {own.tolist()} but got {given.tolist()}"]
    return []
