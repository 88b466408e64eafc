"""Exporting adapters to PEFT's format and importing adapters from it."""

import math
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lalora_lightning.adapters import (
    insert_layers,
    lora_layers,
    named_modules,
    named_parameters,
    require_lora_layers,
)
from lalora_lightning.layers import TruncatedLoRALinear, is_conv1d, is_linear, linear_shape, lora_scaling
from lalora_lightning.names import parent_name, state_name
from lalora_lightning.saving.full_modules import (
    CONTAINERS,
    base_modules,
    has_moving_buffers,
    outermost,
    owners_of_buffers,
    trained_modules,
)
from lalora_lightning.saving.model_card import model_card
from lalora_lightning.saving.peft_folder import local_folder, read_folder, write_folder
from lalora_lightning.saving.peft_names import (
    exact_pattern,
    pattern_value,
    require_saved_apart,
    saved_with,
    target_modules,
)
from lalora_lightning.saving.state import load_by_name
from lalora_lightning.saving.wrappers import unwrapped
from lalora_lightning.sharding import gathered

__all__ = ["load_peft_adapter", "push_peft_adapter", "save_peft_adapter"]

# PEFT wraps a model in two modules of these names.
_PREFIX = "base_model.model."


def save_peft_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    uniform: bool = False,
    overwrite: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write the adapters, at their current ranks, and the trained head in PEFT's format.

    ``PeftModel.from_pretrained(base_model, folder)`` and transformers' ``model.load_adapter(folder)`` read the folder.
    ``README.md`` is the model card, with base model, ranks, and the given facts. The exported ``lora_B`` includes the
    scaling. If slices of a fused projection are adapted, they become one adapter of the whole projection: its rank is
    the sum of the ranks of the slices, and the rows of ``lora_B`` outside of the slices are zero. If initial factors
    are subtracted, the exported rank is twice as high. Modules whose buffers training may have changed, such as
    BatchNorm, are saved in full like the head, and tied parameters under all of their names.

    Args:
        model: The adapted model itself, not the LightningModule around it, because names have to be those of the base
            model. Wrappers of ``torch.compile``, DDP and Fabric are removed.
        folder: A new or empty folder.
        uniform: Pad all adapters with zero components to the highest rank, for engines that support one rank only.
        overwrite: Replace an adapter in the folder and its model card. A ``README.md`` that is no model card is kept.
        facts: Further rows of the model card, such as ``{"accuracy": 0.87, "gamma": 2.0}``.

    Raises:
        ValueError: The model has no LoRA layers, a layer is merged, sharded by FSDP1, used in several places or part of
            an ``nn.MultiheadAttention``; or PEFT cannot save a trained module in full, because it contains an adapted
            layer or its name does not single it out.
        FileExistsError: The folder is not empty.
    """
    model = unwrapped(model)
    _require_model_itself(model)
    layers = require_lora_layers(model)
    _require_exportable(model, layers)
    modules = base_modules(model)
    trained = trained_modules(modules)
    if "" in trained:
        raise ValueError("Expected trained parameters to be in submodules but the model has some of its own.")
    saved = list(outermost([*trained, *_separate_owners_of_buffers(modules, layers)]))
    matched = saved_with(saved, modules)
    require_saved_apart(saved, matched, layers, [n for n in matched if isinstance(modules[n], CONTAINERS)])
    folder = Path(folder)
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"Expected {folder} to be new or empty; set overwrite=True to replace an adapter in it.")

    factors = {name: layer.folded() for name, layer in layers.items()}
    ranks = {name: A.shape[0] for name, (A, _) in factors.items()}
    highest = max(ranks.values())
    if uniform:
        factors = {name: _padded(A, B, highest) for name, (A, B) in factors.items()}
        ranks = dict.fromkeys(ranks, highest)
    tensors = {
        f"{_PREFIX}{name}.lora_{side}.weight": factor.contiguous()
        for name, pair in factors.items()
        for side, factor in zip("AB", pair, strict=True)
    }
    for name in matched:
        for key, value in modules[name].state_dict().items():
            # A copy, because safetensors refuses tensors that share memory.
            tensors[f"{_PREFIX}{name}.{state_name(key)}"] = gathered(value).detach().clone().contiguous()
    pattern = {exact_pattern(name, ranks): rank for name, rank in ranks.items() if rank != highest}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "target_modules": target_modules(layers, modules),
        "modules_to_save": saved or None,
        "r": highest,
        "lora_alpha": highest,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "fan_in_fan_out": all(is_conv1d(layer.base_layer) for layer in layers.values()),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    current_ranks = {name: int(layer.rank) for name, layer in layers.items()}
    write_folder(folder, config, tensors, model_card(current_ranks, list(outermost(trained)), config, facts or {}))


def push_peft_adapter(
    model: nn.Module,
    repo_id: str,
    uniform: bool = False,
    facts: Mapping[str, Any] | None = None,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Upload what :func:`save_peft_adapter` writes to the Hub, as one commit; a missing repository is created.

    Existing files of the same names are replaced, ``README.md`` included.

    Args:
        model: As in :func:`save_peft_adapter`, like ``uniform`` and ``facts``.
        repo_id: ``"user/name"``.
        uniform: Pad all adapters to the highest rank.
        facts: Further rows of the model card.
        private: Whether a new repository is private; by default the organization's setting applies.
        token: Access token; by default the one that ``hf auth login`` stored.

    Returns:
        The URL of the commit.

    Raises:
        ValueError: As in :func:`save_peft_adapter`. Nothing is uploaded.
        huggingface_hub.errors.HfHubHTTPError: The Hub rejects the upload.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        save_peft_adapter(model, folder, uniform, facts=facts)
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload adapter"))


def load_peft_adapter(
    model: nn.Module, folder: str | os.PathLike[str], revision: str | None = None, token: str | None = None
) -> None:
    """Adapt a model with a LoRA adapter that PEFT trained, for inference or further training.

    The maximum rank of all layers is the highest rank of the adapter. Layers of a lower rank are padded with new
    components beyond the current rank. A :class:`RankAllocator` first sets all ranks to 1, unless it has
    ``gradual_budget=False``.

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
    model = unwrapped(model)
    _require_model_itself(model)
    if lora_layers(model):
        raise ValueError("Expected a model without LoRA layers but it has some already.")
    config, tensors = read_folder(local_folder(folder, revision, token))
    factors: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, value in tensors.items():
        key = state_name(key.removeprefix(_PREFIX))
        name, match, side = key.rpartition(".lora_")
        if match and side in ("A.weight", "B.weight"):
            factors.setdefault(name, {})[side[0]] = value
        else:
            saved[key] = value
    modules = named_modules(model)
    own = {state_name(key): value for key, value in model.state_dict().items()}
    problems = [f"{key} does not fit the model" for key, value in saved.items() if not _fits(value, own.get(key))]
    # Earlier versions of this package wrote a tied parameter under one name. PEFT writes many more settings.
    one_name_is_enough = "auto_mapping" not in config or config.get("ensure_weight_tying") is True
    if not problems:
        problems = _tied_problems(model, saved, one_name_is_enough)
    highest = max((len(pair["A"]) for pair in factors.values() if "A" in pair and pair["A"].ndim == 2), default=0)
    layers = {}
    for name, pair in factors.items():
        try:
            if not is_linear(modules.get(name, nn.Identity())):
                raise ValueError("the model has no linear layer of this name")
            missing = [f"lora_{side}" for side in "AB" if side not in pair]
            if missing:
                raise ValueError(f"{missing[0]} is missing")
            layers[name] = _layer(modules[name], pair, _scaling(config, name, pair), highest)
        except (ValueError, RuntimeError, TypeError, ArithmeticError, re.error) as error:
            problems.append(f"{name}: {str(error).rstrip('.')}")
    if not factors:
        problems.append("it contains no LoRA adapter of a linear layer")
    if problems:
        raise ValueError(f"Cannot adapt the model with {folder}: {'; '.join(problems)}.")
    frozen = _unchanged_owners_of_buffers(modules, own, saved)
    trained = [p for name, p in named_parameters(model) if name in saved and parent_name(name) not in frozen]
    insert_layers(model, layers, trained)
    load_by_name(model, saved)


def _require_model_itself(model: nn.Module) -> None:
    # The class is compared by name, so that this file does not import Lightning.
    if any(kind.__name__ == "LightningModule" for kind in type(model).__mro__):
        raise ValueError(
            f"Expected the model itself but got the LightningModule {type(model).__name__}, whose layers have "
            "other names than those of the base model; pass the attribute with the model, such as module.model."
        )


def _require_exportable(model: nn.Module, layers: Mapping[str, TruncatedLoRALinear]) -> None:
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(f"Expected unmerged adapters but {merged[0]} is merged; call unmerge_lora(model) first.")
    modules = named_modules(model)
    places = [id(child) for parent in modules.values() for child in parent._modules.values()]
    for name, layer in layers.items():
        if layer.lora_A.ndim != 2 or layer.lora_B.ndim != 2:
            raise ValueError(
                f"Expected whole adapters but FSDP1 flattened those of {name}; export inside of "
                "FullyShardedDataParallel.summon_full_params(model)."
            )
        if places.count(id(layer)) > 1:
            raise ValueError(
                f"Expected layers that are used in one place but {name} is an attribute of several modules, and PEFT "
                "adapts only the first; use lora_state_dict(model), or merge_lora(model, remove=True)."
            )
        if isinstance(modules[parent_name(name)], nn.MultiheadAttention):
            raise ValueError(
                f"Expected projections that PEFT can adapt one by one but {name} is part of an nn.MultiheadAttention, "
                "which PEFT adapts as a whole or not at all; use lora_state_dict(model), or "
                "merge_lora(model, remove=True)."
            )


def _padded(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - A.shape[0]
    return nn.functional.pad(A, (0, 0, 0, missing)), nn.functional.pad(B, (0, missing))


def _separate_owners_of_buffers(modules: Mapping[str, nn.Module], targets: Mapping[str, nn.Module]) -> list[str]:
    """Return the modules with buffers to save, and warn about those that contain adapted layers."""
    owners = owners_of_buffers(modules)
    around = [name for name in owners if not name or any(target.startswith(f"{name}.") for target in targets)]
    if around:
        names = ", ".join(name or "the model itself" for name in around)
        warnings.warn(
            f"La-LoRA: the PEFT adapter lacks the buffers of {names}, "
            "because PEFT cannot save a module in full that contains adapted layers; if training changed the buffers, "
            "use lora_state_dict(model).",
            stacklevel=3,
        )
    return [name for name in owners if name not in around]


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
    names: dict[int, list[str]] = {}
    for name, parameter in named_parameters(model, remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    problems = []
    for tied in names.values():
        values = [saved[name] for name in tied if name in saved]
        apart = any(not torch.equal(value, values[0]) for value in values[1:])
        if apart or (values and len(values) < len(tied) and not one_name_is_enough):
            problems.append(f"{' and '.join(tied)} are tied in the model but not in the adapter; untie them first")
    return problems


def _scaling(config: Mapping[str, Any], name: str, pair: Mapping[str, Tensor]) -> float:
    rank = len(pair["A"])
    if rank == 0:
        raise ValueError("its rank is 0")
    patterns, rslora = config.get("alpha_pattern") or {}, config.get("use_rslora") or False
    if not isinstance(patterns, Mapping) or not isinstance(rslora, bool):
        raise ValueError(f"expected alpha_pattern to be an object and use_rslora a bool but got {patterns}, {rslora}")
    alpha = pattern_value(patterns, name, config.get("lora_alpha", 8))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise ValueError(f"expected its lora_alpha to be positive and finite but got {alpha!r}")
    return lora_scaling(alpha, rank, rslora)


@torch.no_grad()
def _layer(module: nn.Module, pair: Mapping[str, Tensor], scaling: float, highest: int) -> TruncatedLoRALinear:
    """Return a layer around a module, with the factors of an adapter padded to the highest rank."""
    A, B = pair["A"], pair["B"]
    m, d = linear_shape(module)
    rank = len(A)
    if rank > min(m, d):
        raise ValueError(f"its rank of {rank} is more than the weight's smaller side of {min(m, d)}")
    if A.shape != (rank, d) or B.shape != (m, rank):
        raise ValueError(
            f"expected lora_A and lora_B of shapes ({rank}, {d}) and ({m}, {rank}) but got {tuple(A.shape)} and "
            f"{tuple(B.shape)}"
        )
    for side, factor in pair.items():
        if not factor.is_floating_point() or not factor.float().isfinite().all():
            raise ValueError(f"expected lora_{side} to hold finite floating-point numbers")
    # Adapters are trained in float32 even if the file holds half precision.
    dtype = torch.promote_types(A.dtype, torch.float32)
    layer = TruncatedLoRALinear.with_scaling(module, min(highest, m, d), scaling, dtype=dtype)
    layer.lora_A[:rank], layer.lora_B[:, :rank] = A, B
    layer.set_rank(rank)
    return layer
