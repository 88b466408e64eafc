"""Exporting adapters to PEFT's format and importing adapters from it."""

import os
import re
import tempfile
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
    summarize,
)
from lalora_lightning.layers import TruncatedLoRALinear, is_conv1d, is_linear, linear_shape, lora_scaling
from lalora_lightning.names import parent_name
from lalora_lightning.saving.model_card import model_card
from lalora_lightning.saving.peft_folder import local_folder, read_folder, write_folder

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
    are subtracted, the exported rank is twice as high.

    Args:
        model: The adapted model itself, not the LightningModule around it, because names have to be those of the base
            model.
        folder: A new or empty folder.
        uniform: Pad all adapters with zero components to the highest rank, for engines that support one rank only.
        overwrite: Replace an adapter in the folder and its model card. A ``README.md`` that is no model card is kept.
        facts: Further rows of the model card, such as ``{"accuracy": 0.87, "gamma": 2.0}``.

    Raises:
        ValueError: The model has no LoRA layers, a layer is merged, a layer is part of an ``nn.MultiheadAttention``, or
            a trained parameter is a direct attribute of the model, which PEFT cannot save.
        FileExistsError: The folder is not empty.
    """
    _require_model_itself(model)
    layers = require_lora_layers(model)
    _require_exportable(model, layers)
    head = summarize(model).head
    if "" in head:
        raise ValueError("Expected trained parameters to be in submodules but the model has some of its own.")
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
    for name in head:
        for key, value in model.get_submodule(name).state_dict().items():
            tensors[f"{_PREFIX}{name}.{key}"] = value.detach().contiguous()
    pattern = {_pattern(name, ranks): rank for name, rank in ranks.items() if rank != highest}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "target_modules": list(layers),
        "modules_to_save": list(head) or None,
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
    write_folder(folder, config, tensors, model_card(current_ranks, config, facts or {}))


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
        ValueError: The adapter is not a plain LoRA adapter, is damaged, or does not fit the model. The model is left
            unchanged.
    """
    _require_model_itself(model)
    if lora_layers(model):
        raise ValueError("Expected a model without LoRA layers but it has some already.")
    config, tensors = read_folder(local_folder(folder, revision, token))
    factors: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name, match, side = key.removeprefix(_PREFIX).rpartition(".lora_")
        if match and side in ("A.weight", "B.weight"):
            factors.setdefault(name, {})[side[0]] = value
        else:
            saved[key.removeprefix(_PREFIX)] = value
    modules, own = named_modules(model), model.state_dict()
    problems = [
        f"{key} does not fit the model"
        for key, value in saved.items()
        if key not in own or own[key].shape != value.shape
    ]
    highest = max((len(pair["A"]) for pair in factors.values() if "A" in pair and pair["A"].ndim == 2), default=0)
    layers = {}
    for name, pair in factors.items():
        try:
            if not is_linear(modules.get(name, nn.Identity())):
                raise ValueError("the model has no linear layer of this name")
            layers[name] = _layer(modules[name], pair, _scaling(config, name, pair), highest)
        except (ValueError, KeyError, RuntimeError, TypeError, AttributeError, re.error) as error:
            problems.append(f"{name}: {str(error).rstrip('.')}")
    if not factors:
        problems.append("it contains no LoRA adapter of a linear layer")
    if problems:
        raise ValueError(f"Cannot adapt the model with {folder}: {'; '.join(problems)}.")
    insert_layers(model, layers, [p for name, p in named_parameters(model) if name in saved])
    model.load_state_dict(saved, strict=False)


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
    for name in layers:
        if isinstance(model.get_submodule(parent_name(name)), nn.MultiheadAttention):
            raise ValueError(
                f"Expected projections that PEFT can adapt one by one but {name} is part of an nn.MultiheadAttention, "
                "which PEFT adapts as a whole or not at all; use lora_state_dict(model), or "
                "merge_lora(model, remove=True)."
            )


def _padded(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - A.shape[0]
    return nn.functional.pad(A, (0, 0, 0, missing)), nn.functional.pad(B, (0, missing))


def _pattern(name: str, names: Mapping[str, Any]) -> str:
    """Return a module's name as a pattern for PEFT, anchored if another name ends with it."""
    return f"^{name}" if any(other.endswith(f".{name}") for other in names) else name


def _scaling(config: Mapping[str, Any], name: str, pair: Mapping[str, Tensor]) -> float:
    rank = len(pair["A"])
    if rank == 0:
        raise ValueError("its rank is 0")
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    # As in PEFT, the first pattern that matches the end of the name is used.
    alpha = next((a for key, a in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), config.get("lora_alpha", 8))
    return lora_scaling(alpha, rank, bool(config.get("use_rslora")))


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
    # Adapters are trained in float32 even if the file holds half precision.
    dtype = torch.promote_types(A.dtype, torch.float32)
    layer = TruncatedLoRALinear.with_scaling(module, min(highest, m, d), scaling, dtype=dtype)
    layer.lora_A[:rank], layer.lora_B[:, :rank] = A, B
    layer.set_rank(rank)
    return layer
