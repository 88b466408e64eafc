"""Adapter-only state: what fine-tuning changed, without the backbone."""

import zipfile
from collections.abc import Mapping
from os import PathLike
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
    shared_parts,
)
from lalora_lightning.base_linear import is_quantized
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

    A model without LoRA layers gets those that the state describes. They and the head are trainable then, and whatever
    else an adapter-only state holds; dropout, a setting of training, is none. ``load_lora_state_dict(Classifier(),
    "best.ckpt")`` needs to know nothing of the run, only the backbone has to be the same. A state of a module that held
    the model in one of its attributes, as a LightningModule does, goes into the model itself, too.

    Args:
        model: With the layers the state was taken from, or without any.
        state: The state itself, or a file that ``torch.save`` or a Trainer wrote.

    Raises:
        ValueError: Keys are missing or unknown, or a value does not fit; the message lists them all, and nothing has
            been loaded. Or the file is damaged.
    """
    if not isinstance(state, Mapping):
        state = _read(state)
    state = _from_root(model, state)
    if lora_layers(model):
        check_state(model, state)
    else:
        _adapt_as_described(model, state)
    model.load_state_dict(state, strict=False)


def check_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Compare a state, whole or adapter-only, with an adapted model.

    Raises:
        ValueError: Keys are missing or unknown, or a value does not fit; the message lists them all.
    """
    own, layers = model.state_dict(), lora_layers(model)
    missing = [key for key in without_frozen(model, own) if key not in state]
    problems = [f"missing keys: {', '.join(missing)}"] if missing else []
    unknown = [str(key) for key in state if key not in own]
    if unknown:
        problems.append(f"unknown keys: {', '.join(unknown)}")
    # Extra state, if not of a LoRA layer, is its module's to check.
    # Nor do quantised layers write code books of one length.
    own_alone = _quantization_keys(model, own)
    for key, value in own.items():
        if key in state and not key.endswith("_extra_state") and key not in own_alone:
            problems += _misfits(key, state[key], value)
    for name, layer in layers.items():
        key = f"{name}._extra_state".lstrip(".")
        if key in state and not layer.is_own_extra_state(state[key]):
            problems.append(
                f"expected scaling and output slices of {key} to be {layer.get_extra_state().tolist()} but got "
                f"{state[key].tolist() if isinstance(state[key], Tensor) else state[key]!r}"
            )
    if not problems:
        ranks = {f"{name}.rank".lstrip("."): layer.max_rank for name, layer in layers.items()}
        problems = [
            f"expected {key} to be in [1, {max_rank}] but got {int(state[key])}"
            for key, max_rank in ranks.items()
            if not 1 <= int(state[key]) <= max_rank
        ]
    if problems:
        raise ValueError(f"{_CANNOT_LOAD}: {'; '.join(problems)}.")


def check_file(path: str | PathLike[str]) -> None:
    """Compare a file's contents with the checksums in it, at which ``torch.load`` does not look.

    Raises:
        ValueError: They differ. A file that is no zip archive is left to ``torch.load``.
    """
    if not Path(path).is_file():
        return
    try:
        # May raise, too, where the damage is in the archive's end.
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            # torch reads nothing of an entry that is marked as a directory, and leaves its tensor uninitialized.
            folders = (entry.filename for entry in archive.infolist() if entry.external_attr & 0x10)
            damaged = archive.testzip() or next(folders, None)
    except Exception as error:
        # BadZipFile, and what other damage leads to.
        damaged = str(error)
    if damaged is not None:
        raise ValueError(f"Expected {path} to be as it was written but it is damaged: {damaged}. Take another copy.")


def without_frozen(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state of the model without its frozen parameters; adapters stay in, also where they are frozen."""
    frozen = frozen_names(model) | _quantization_keys(model, state)
    return {key: value for key, value in state.items() if key not in frozen}


def frozen_names(model: nn.Module) -> set[str]:
    """Names of the frozen parameters, without adapters."""
    factors = {f"{name}.{factor}".lstrip(".") for name in lora_layers(model) for factor in ("lora_A", "lora_B")}
    return {name for name, p in named_parameters(model, remove_duplicate=False) if not p.requires_grad} - factors


def _from_root(model: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state without what all its keys have in front, where the model has the layers by their names after that."""
    modules = named_modules(model)
    layers = [str(key).removesuffix(".lora_B") for key in state if str(key).endswith(".lora_B")]
    prefix = ""
    for part in shared_parts(map(str, state)):
        if any(name in modules for name in layers):
            break
        prefix += f"{part}."
        layers = [name.removeprefix(f"{part}.") for name in layers]
    if not prefix or not any(name in modules for name in layers):
        return state
    return {str(key).removeprefix(prefix): value for key, value in state.items()}


def _quantization_keys(model: nn.Module, state: Mapping[str, Any]) -> set[str]:
    """What a state holds of quantised layers beside their parameters: scales and code books of the frozen weights."""
    prefixes = tuple(f"{name}." for name, module in named_modules(model).items() if is_quantized(module))
    parameters = {name for name, _ in named_parameters(model, remove_duplicate=False)}
    return {key for key in state if prefixes and key.startswith(prefixes) and key not in parameters}


def load_file(path: str | PathLike[str], kind: str) -> Any:
    """What ``torch.load`` reads of plain types and tensors, after a look at the checksums.

    Args:
        path: The file.
        kind: What it is expected to be, for the message.

    Raises:
        ValueError: It is damaged, or something else.
    """
    check_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:
        # Of what a file can be instead, torch makes errors of many kinds.
        raise ValueError(
            f"Expected {path} to be {kind} but it cannot be read "
            f"({type(error).__name__}: {str(error).split(chr(10))[0]})."
        ) from error


def _read(path: str | PathLike[str]) -> Mapping[str, Any]:
    loaded = load_file(path, "a file of torch.save or of a Trainer")
    if isinstance(loaded, Mapping) and "pytorch-lightning_version" in loaded:
        loaded = loaded.get("state_dict")
    if not isinstance(loaded, Mapping):
        raise ValueError(f"Expected {path} to hold a state dict but it holds a {type(loaded).__name__}.")
    return loaded


def _adapt_as_described(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Put the layers of a state into a plain model, unless the state does not fit then."""
    layers = _described_layers(model, state)
    trainable = [p for p in model.parameters() if p.requires_grad]
    trained = find_head(model, layers)
    if not any(str(key).endswith(".base_layer.weight") for key in state):
        trained |= {name for name, _ in named_parameters(model) if name in state}
    insert_layers(model, layers, [p for name, p in named_parameters(model) if name in trained])
    try:
        check_state(model, state)
    except ValueError as error:
        remove_layers(model, layers)
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise ValueError(
            f"{error} If the run trained other modules in full than the head found, such as none, call add_lora with "
            "its settings (modules_to_save) first."
        ) from error


def _described_layers(model: nn.Module, state: Mapping[str, Any]) -> dict[str, TruncatedLoRALinear]:
    """New layers over the model's own, by name, as a state describes them."""
    layers, problems = {}, []
    modules = named_modules(model)
    for name in [key.removesuffix(".lora_B") for key in state if str(key).endswith(".lora_B")]:
        factor, extra = state[f"{name}.lora_B"], state.get(f"{name}._extra_state")
        try:
            if name not in modules:
                raise ValueError("the model has no such module")
            if not isinstance(factor, Tensor) or not isinstance(extra, Tensor) or extra.ndim != 1 or len(extra) < 3:
                raise ValueError("lora_B or _extra_state do not describe an adapter")
            scaling, *edges = extra.tolist()
            slices = [(int(start), int(stop)) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
            # Trained in float32 also where the file holds less.
            dtype = torch.promote_types(factor.dtype, torch.float32)
            layers[name] = TruncatedLoRALinear.with_scaling(
                modules[name], factor.shape[-1], scaling, out_slices=slices, dtype=dtype
            )
            if f"{name}.start_B" in state:
                layers[name].keep_start()
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


def _misfits(key: str, given: Any, own: Tensor) -> list[str]:
    if not isinstance(given, Tensor):
        return [f"expected {key} to be a tensor but got {type(given).__name__}"]
    if given.shape != own.shape:
        return [f"expected {key} to have the shape {tuple(own.shape)} but got {tuple(given.shape)}"]
    if (given.is_floating_point(), given.is_complex()) != (own.is_floating_point(), own.is_complex()):
        return [f"expected {key} to hold numbers like {own.dtype} but got {given.dtype}"]
    return []
