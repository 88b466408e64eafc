"""Importing adapters from PEFT's format."""

import math
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lalora_lightning.adapters import insert_layers, lora_layers, named_modules, named_parameters
from lalora_lightning.layers import TruncatedLoRALinear, is_linear, linear_shape, lora_scaling
from lalora_lightning.names import parent_name, state_name
from lalora_lightning.saving.full_modules import has_moving_buffers
from lalora_lightning.saving.peft_folder import KEY_PREFIX, local_folder, read_folder
from lalora_lightning.saving.peft_names import pattern_value
from lalora_lightning.saving.state import load_by_name
from lalora_lightning.saving.wrappers import model_itself

__all__ = ["adapt_as_in_peft", "load_peft_adapter"]


def load_peft_adapter(
    model: nn.Module, folder: str | os.PathLike[str], revision: str | None = None, token: str | None = None
) -> None:
    """Adapt a model with a LoRA adapter that PEFT trained, for inference or further training.

    Trailing components that are zero in ``lora_A`` and in ``lora_B`` are padding and do not count as rank. An adapter
    that is zero has rank 0. The maximum rank of all layers is the highest rank of the adapter. Layers of a lower rank
    are padded with new components beyond the current rank. A :class:`RankAllocator` first sets all ranks to 1, unless
    it has ``gradual_budget=False``.

    Args:
        model: The base model, without LoRA layers.
        folder: A folder with ``adapter_config.json`` and ``adapter_model.safetensors``; or the name ``"user/name"`` of
            a repository on the Hub, if there is no such folder.
        revision: Branch, tag or commit of the repository.
        token: Access token for a private repository; by default the one that ``hf auth login`` stored.

    Raises:
        FileNotFoundError: The folder lacks one of the files, or the repository cannot be found or downloaded.
        ValueError: The adapter is not a plain LoRA adapter, is damaged, or does not fit the model; or it trained a
            parameter apart from those that are tied to it. The model is left unchanged.
    """
    model = model_itself(model)
    if lora_layers(model):
        raise ValueError("Expected a model without LoRA layers but it has some already.")
    adapt_as_in_peft(model, *read_folder(local_folder(folder, revision, token)), folder)


def adapt_as_in_peft(
    model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: str | os.PathLike[str]
) -> None:
    """Adapt a plain model with what a folder of PEFT contains; see :func:`load_peft_adapter`.

    Args:
        model: The base model.
        config: ``adapter_config.json``.
        tensors: ``adapter_model.safetensors``.
        folder: The folder, for error messages.

    Raises:
        ValueError: As in :func:`load_peft_adapter`. The model is left unchanged.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, value in tensors.items():
        key = state_name(key.removeprefix(KEY_PREFIX))
        name, match, side = key.rpartition(".lora_")
        if match and side in ("A.weight", "B.weight"):
            factors.setdefault(name, {})[side[0]] = value
        else:
            saved[key] = value
    modules = named_modules(model)
    own = {state_name(key): value for key, value in model.state_dict().items()}
    problems = [f"{key} does not fit the model" for key, value in saved.items() if not _fits(value, own.get(key))]
    # Version 0.1.0 wrote a tied parameter under one name, and no auto_mapping. PEFT always writes this setting.
    one_name_is_enough = "auto_mapping" not in config or config.get("ensure_weight_tying") is True
    if not problems:
        problems = _tied_problems(model, saved, one_name_is_enough)
    adapters: dict[str, tuple[Tensor, Tensor, float]] = {}
    for name, pair in factors.items():
        try:
            if not is_linear(modules.get(name, nn.Identity())):
                raise ValueError("the model has no linear layer of this name")
            missing = [f"lora_{side}" for side in "AB" if side not in pair]
            if missing:
                raise ValueError(f"{missing[0]} is missing")
            A, B = _without_padding(pair["A"], pair["B"], *linear_shape(modules[name]))
            adapters[name] = A, B, _scaling(config, name, len(pair["A"]))
        except (ValueError, RuntimeError, TypeError, ArithmeticError, re.error) as error:
            problems.append(f"{name}: {str(error).rstrip('.')}")
    if not factors:
        problems.append("it contains no LoRA adapter of a linear layer")
    if problems:
        raise ValueError(f"Cannot adapt the model with {folder}: {'; '.join(problems)}.")
    frozen = _unchanged_owners_of_buffers(modules, own, saved)
    trained = [p for name, p in named_parameters(model) if name in saved and parent_name(name) not in frozen]
    highest = max(1, *(len(A) for A, _, _ in adapters.values()))
    layers = {name: _layer(modules[name], *adapter, highest) for name, adapter in adapters.items()}
    insert_layers(model, layers, trained)
    load_by_name(model, saved)


def _unchanged_owners_of_buffers(
    modules: Mapping[str, nn.Module], own: Mapping[str, Tensor], saved: Mapping[str, Tensor]
) -> set[str]:
    """Return the modules that an adapter contains only because of their buffers, such as a frozen BatchNorm."""
    return {
        name
        for name, module in modules.items()
        if has_moving_buffers(module)
        and all(
            torch.equal(saved[key].to(own[key]), own[key])
            for key in (f"{name}.{parameter}".lstrip(".") for parameter in module._parameters)
            if key in saved
        )
    }


def _fits(value: Tensor, own: Tensor | None) -> bool:
    return (
        own is not None
        and value.shape == own.shape
        and (value.is_floating_point(), value.is_complex()) == (own.is_floating_point(), own.is_complex())
        and not (value.is_floating_point() and value.float().isnan().any())
    )


def _tied_problems(model: nn.Module, saved: Mapping[str, Tensor], one_name_is_enough: bool) -> list[str]:
    """Return the tied parameters of the model that an adapter contains with several values, or in part."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in named_parameters(model, remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    problems = []
    for parameter, tied in names.items():
        values = [saved[name] for name in tied if name in saved]
        apart = any(not torch.equal(value, values[0]) for value in values[1:])
        in_part = 0 < len(values) < len(tied) and not one_name_is_enough
        if apart or (in_part and not torch.equal(values[0].to(parameter), parameter)):
            problems.append(f"{' and '.join(tied)} are tied in the model but not in the adapter; untie them first")
    return problems


def _scaling(config: Mapping[str, Any], name: str, rank: int) -> float:
    patterns, rslora = config.get("alpha_pattern") or {}, config.get("use_rslora") or False
    if not isinstance(patterns, Mapping) or not isinstance(rslora, bool):
        raise ValueError(f"expected alpha_pattern to be an object and use_rslora a bool but got {patterns}, {rslora}")
    alpha = pattern_value(patterns, name, config.get("lora_alpha", 8))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise ValueError(f"expected its lora_alpha to be positive and finite but got {alpha!r}")
    return lora_scaling(alpha, rank, rslora)


def _without_padding(A: Tensor, B: Tensor, m: int, d: int) -> tuple[Tensor, Tensor]:
    """Return the factors of an adapter without the trailing components that are zero in A and in B.

    An adapter of which nothing is left has rank 0.

    Raises:
        ValueError: The factors do not fit a weight of shape ``(m, d)``, or are not finite.
    """
    rank = len(A)
    if rank == 0:
        raise ValueError("its rank is 0")
    if A.shape != (rank, d) or B.shape != (m, rank):
        raise ValueError(
            f"expected lora_A and lora_B of shapes ({rank}, {d}) and ({m}, {rank}) but got {tuple(A.shape)} and "
            f"{tuple(B.shape)}"
        )
    for side, factor in (("A", A), ("B", B)):
        if not factor.is_floating_point() or not factor.float().isfinite().all():
            raise ValueError(f"expected lora_{side} to hold finite floating-point numbers")
    used = ((A != 0).any(dim=1) | (B != 0).any(dim=0)).nonzero()
    rank = int(used[-1]) + 1 if len(used) else 0
    if rank > min(m, d):
        raise ValueError(f"its rank of {rank} is more than the weight's smaller side of {min(m, d)}")
    # Adapters are trained in float32 even if the file holds half precision.
    dtype = torch.promote_types(A.dtype, torch.float32)
    return A[:rank].to(dtype), B[:, :rank].to(dtype)


@torch.no_grad()
def _layer(module: nn.Module, A: Tensor, B: Tensor, scaling: float, highest: int) -> TruncatedLoRALinear:
    """Return a layer around a module, with the factors of an adapter padded to the highest rank."""
    rank = len(A)
    layer = TruncatedLoRALinear.with_scaling(module, min(highest, *linear_shape(module)), scaling, dtype=A.dtype)
    layer.lora_A[:rank], layer.lora_B[:, :rank] = A, B
    layer.set_rank(rank)
    return layer
