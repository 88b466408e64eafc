"""Adapters in PEFT's format: what is trained here is used there, and the other way round."""

import json
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
from lalora_lightning.base_linear import is_conv1d, is_linear, linear_shape
from lalora_lightning.layers import TruncatedLoRALinear, lora_scaling
from lalora_lightning.model_card import is_model_card, model_card

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "adapter_config.json", "adapter_model.safetensors", "README.md"
# PEFT wraps a model twice.
_PREFIX = "base_model.model."
# What changes the function of a PEFT adapter, and has no counterpart here.
_UNKNOWN_SETTINGS = (
    "use_dora",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "lora_ga_config",
    "monteclora_config",
    "velora_config",
)
# Starts that leave the base weights as they are; the others take something off them.
_KNOWN_STARTS = ("True", "False", "gaussian", "eva", "orthogonal")


def save_peft_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    uniform: bool = False,
    overwrite: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write the adapters, at their ranks in force, and what else is trained, so that PEFT can load them.

    ``PeftModel.from_pretrained(base_model, folder)`` and transformers' ``model.load_adapter(folder)`` read it. A
    ``README.md`` beside them is the model card: base model, ranks, and the facts given. The scaling is folded into
    ``lora_B``. Adapters of the slices of a fused projection become one of the whole projection, with as many times the
    rank and rows of zeros where nothing is adapted. A start that is taken off makes an adapter of twice the rank.

    Args:
        model: The adapted model itself, not the LightningModule around it: names have to be those of the base model.
        folder: New or empty.
        uniform: Pad all adapters with zero components to the highest rank, for readers that know one rank only.
        overwrite: Replace an adapter that is there, with its model card; another ``README.md`` stays.
        facts: What else the model card shall say, such as ``{"accuracy": 0.87, "gamma": 2.0}``.

    Raises:
        ValueError: The model has no LoRA layers, layers are merged, or parameters of the model itself are trained,
            which PEFT cannot save.
        FileExistsError: The folder is not empty.
    """
    _require_model_itself(model)
    layers = require_lora_layers(model)
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(f"Expected unmerged adapters but {merged[0]} is merged; call unmerge_lora(model) first.")
    for name in layers:
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
            raise ValueError(
                f"Expected projections that PEFT can adapt one by one but {name} is part of an nn.MultiheadAttention, "
                "of which PEFT adapts all or nothing; use lora_state_dict(model), or merge_lora(model, remove=True)."
            )
    head = summarize(model).head
    if "" in head:
        raise ValueError("Expected trained parameters to lie in modules but the model has some of its own.")
    folder = Path(folder)
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"Expected {folder} to be new or empty; give overwrite=True to replace an adapter in it.")

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
    in_force = {name: int(layer.rank) for name, layer in layers.items()}
    _write(folder, config, tensors, model_card(in_force, config, facts or {}))


def push_peft_adapter(
    model: nn.Module,
    repo_id: str,
    uniform: bool = False,
    facts: Mapping[str, Any] | None = None,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Upload what :func:`save_peft_adapter` writes to the Hub, as one commit; the repository is made if there is none.

    Files of these names that are there are replaced, ``README.md`` among them.

    Args:
        model: As of :func:`save_peft_adapter`, like ``uniform`` and ``facts``.
        repo_id: ``"user/name"``.
        private: Whether a new repository is private; by default as the organisation has it.
        token: By default the one that ``hf auth login`` stored.

    Returns:
        The commit's address.

    Raises:
        ValueError: As of :func:`save_peft_adapter`; nothing has been uploaded then.
        huggingface_hub.errors.HfHubHTTPError: The Hub refuses.
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
    """Adapt a model by a LoRA adapter that PEFT trained, as a starting point.

    The layers get the highest of its ranks as maximum rank; those of a lower rank are filled up with fresh components
    that are not in force. A :class:`RankAllocator` starts at rank 1 unless it is told ``gradual_budget=False``.

    Args:
        model: The base model, without LoRA layers.
        folder: With ``adapter_config.json`` and ``adapter_model.safetensors``; or ``"user/name"`` of a repository on
            the Hub, where there is no such folder.
        revision: Branch, tag or commit of the repository.
        token: For a private repository; by default the one that ``hf auth login`` stored.

    Raises:
        FileNotFoundError: The folder lacks one of the files, or there is no such repository, or no network.
        ValueError: The adapter is of another kind, is damaged, or does not fit the model; nothing has changed then.
    """
    _require_model_itself(model)
    if lora_layers(model):
        raise ValueError("Expected a model without LoRA layers but it has some already.")
    config, tensors = _read(_local(folder, revision, token))
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
        problems.append("it holds no LoRA of a linear layer")
    if problems:
        raise ValueError(f"Cannot adapt the model by {folder}: {'; '.join(problems)}.")
    insert_layers(model, layers, [p for name, p in named_parameters(model) if name in saved])
    model.load_state_dict(saved, strict=False)


def _require_model_itself(model: nn.Module) -> None:
    # By name: the core knows no Lightning.
    if any(kind.__name__ == "LightningModule" for kind in type(model).__mro__):
        raise ValueError(
            f"Expected the model itself but got the LightningModule {type(model).__name__}, whose names of layers no "
            "base model has; give the attribute that holds the model, such as module.model."
        )


def _padded(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - A.shape[0]
    return nn.functional.pad(A, (0, 0, 0, missing)), nn.functional.pad(B, (0, missing))


def _pattern(name: str, names: Mapping[str, Any]) -> str:
    """A module's name for PEFT, which looks for it at the end of names: anchored where another one ends alike."""
    return f"^{name}" if any(other.endswith(f".{name}") for other in names) else name


def _scaling(config: Mapping[str, Any], name: str, pair: Mapping[str, Tensor]) -> float:
    rank = len(pair["A"])
    if rank == 0:
        raise ValueError("its rank is 0")
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    # As PEFT does: the first pattern that matches the end of the name.
    alpha = next((a for key, a in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), config.get("lora_alpha", 8))
    return lora_scaling(alpha, rank, bool(config.get("use_rslora")))


@torch.no_grad()
def _layer(module: nn.Module, pair: Mapping[str, Tensor], scaling: float, highest: int) -> TruncatedLoRALinear:
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
    # Trained in float32 also where the file holds less.
    dtype = torch.promote_types(A.dtype, torch.float32)
    layer = TruncatedLoRALinear.with_scaling(module, min(highest, m, d), scaling, dtype=dtype)
    layer.lora_A[:rank], layer.lora_B[:, :rank] = A, B
    layer.set_rank(rank)
    return layer


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], card: str) -> None:
    """All files, each complete under its name or not there."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    half_written = folder / f".{WEIGHTS_FILE}.{os.getpid()}"
    save_file(tensors, half_written, metadata={"format": "pt"})
    half_written.replace(folder / WEIGHTS_FILE)
    texts = {CONFIG_FILE: json.dumps(config, indent=2) + "\n"}
    if not (folder / CARD_FILE).exists() or is_model_card((folder / CARD_FILE).read_text()):
        texts[CARD_FILE] = card
    for name, text in texts.items():
        half_written.write_text(text)
        half_written.replace(folder / name)


def _local(folder: str | os.PathLike[str], revision: str | None, token: str | None) -> Path:
    """The folder, or that of a downloaded repository."""
    if not isinstance(folder, str) or Path(folder).is_dir() or folder.count("/") != 1:
        return Path(folder)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        files = [CONFIG_FILE, WEIGHTS_FILE]
        return Path(snapshot_download(folder, revision=revision, token=token, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"Expected {folder!r} to be a folder or a repository on the Hub but it is no folder, and the Hub says: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"Expected an adapter of PEFT in {folder} but it has no {file}.")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        tensors = load_file(folder / WEIGHTS_FILE)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise ValueError(f"Expected an adapter of PEFT in {folder} but it cannot be read ({error}).") from error
    if not isinstance(config, dict):
        raise ValueError(f"Expected {CONFIG_FILE} in {folder} to hold a dict but got {type(config).__name__}.")
    unknown = [key for key in _UNKNOWN_SETTINGS if config.get(key)]
    start = str(config.get("init_lora_weights", True))
    if start not in _KNOWN_STARTS:
        unknown.append(f"init_lora_weights={start}")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or unknown:
        kind = ", ".join([str(config.get("peft_type")), f"bias={config.get('bias')}", *unknown])
        raise ValueError(f"Expected a plain LoRA adapter without biases in {folder} but got {kind}.")
    return config, tensors
