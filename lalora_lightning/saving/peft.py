"""Exporting adapters to PEFT's format."""

import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lalora_lightning.adapters import named_modules, require_lora_layers
from lalora_lightning.layers import TruncatedLoRALinear, is_conv1d
from lalora_lightning.names import parent_name, state_name
from lalora_lightning.saving.full_modules import (
    CONTAINERS,
    base_modules,
    outermost,
    owners_of_buffers,
    trained_modules,
)
from lalora_lightning.saving.model_card import model_card
from lalora_lightning.saving.peft_config import adapter_config
from lalora_lightning.saving.peft_folder import KEY_PREFIX, write_folder
from lalora_lightning.saving.peft_names import require_saved_apart, saved_with, target_modules, with_namesakes
from lalora_lightning.saving.wrappers import model_itself
from lalora_lightning.sharding import gathered

__all__ = ["push_peft_adapter", "save_peft_adapter"]


def save_peft_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    uniform: bool | int = True,
    overwrite: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write the adapters, at their current ranks, and the trained head in PEFT's format.

    ``PeftModel.from_pretrained(base_model, folder)``, ``AutoPeftModelFor...`` and transformers'
    ``model.load_adapter(folder)`` read the folder. ``README.md`` is the model card, with base model, ranks, and the
    given facts. The exported ``lora_B`` includes the scaling. If slices of a fused projection are adapted, they become
    one adapter of the whole projection: its rank is the sum of the ranks of the slices, and the rows of ``lora_B``
    outside of the slices are zero. If initial factors are subtracted, the exported rank is twice as high. Modules whose
    buffers training may have changed, such as BatchNorm, are saved in full like the head, and tied parameters under all
    of their names.

    In the uniform form, all adapters have the same rank, and alpha equals it. All formulas by which engines scale an
    adapter are then 1. The price is a larger file. In the mixed form, each adapter keeps its own rank. ``rank_pattern``
    and ``alpha_pattern`` hold the ranks that are not the highest, so that ``alpha / rank`` is 1 everywhere. PEFT,
    transformers' ``load_adapter`` and vLLM from 0.32 scale the mixed form correctly. llama.cpp, Ollama and TensorRT-LLM
    know one alpha for all layers: without a warning, they scale layers of a lower rank up. SGLang and transformers'
    hotswap refuse different ranks.

    ``target_modules`` has the shortest names that select exactly the exported layers, such as ``["q_proj", "v_proj"]``.
    Layers of rank 0 are left out, with one exception: in the uniform form, those that share such a name with an
    exported layer are padded like it, because the name stays short, and some engines know no other names. Export before
    ``trim_lora``, which removes layers of rank 0.

    Args:
        model: The adapted model itself, not the LightningModule around it, because names have to be those of the base
            model. Wrappers of ``torch.compile``, DDP and Fabric are removed.
        folder: A new or empty folder.
        uniform: Pad all adapters with zero components to the highest rank; a number pads them to this rank, for engines
            that accept certain ranks only, and to exchange adapters in a running engine. False writes the mixed form.
        overwrite: Replace an adapter in the folder and its model card. A ``README.md`` that is no model card is kept.
        facts: Further rows of the model card, such as ``{"accuracy": 0.87, "gamma": 2.0}``.

    Raises:
        ValueError: The model has no LoRA layers, a layer is merged, sharded by FSDP1, used in several places or part of
            an ``nn.MultiheadAttention``; ``uniform`` is lower than the highest rank; or PEFT cannot save a trained
            module in full, because it contains an adapted layer or its name does not single it out.
        FileExistsError: The folder is not empty.
    """
    model = model_itself(model)
    adapted, modules = require_lora_layers(model), base_modules(model)
    names = [name for name, layer in adapted.items() if layer.rank > 0]
    if not names:
        raise ValueError("Expected adapters to export but all of them have rank 0.")
    if uniform is not False:
        names = with_namesakes(names, adapted, modules)
    layers = {name: adapted[name] for name in names}
    _require_exportable(model, layers)
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
    if uniform is not False:
        highest = _common_rank(uniform, highest)
        factors = {name: _padded(A, B, highest) for name, (A, B) in factors.items()}
        ranks = dict.fromkeys(ranks, highest)
    tensors = {
        f"{KEY_PREFIX}{name}.lora_{side}.weight": factor.contiguous()
        for name, pair in factors.items()
        for side, factor in zip("AB", pair, strict=True)
    }
    for name in matched:
        for key, value in modules[name].state_dict().items():
            # A copy, because safetensors refuses tensors that share memory.
            tensors[f"{KEY_PREFIX}{name}.{state_name(key)}"] = gathered(value).detach().clone().contiguous()
    config = adapter_config(
        model,
        target_modules=target_modules(layers, modules),
        modules_to_save=saved,
        ranks=ranks,
        fan_in_fan_out=all(is_conv1d(layer.base_layer) for layer in layers.values()),
    )
    current_ranks = {name: int(layer.rank) for name, layer in layers.items()}
    write_folder(folder, config, tensors, model_card(current_ranks, list(outermost(trained)), config, facts or {}))


def push_peft_adapter(
    model: nn.Module,
    repo_id: str,
    uniform: bool | int = True,
    facts: Mapping[str, Any] | None = None,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Upload what :func:`save_peft_adapter` writes to the Hub, as one commit; a missing repository is created.

    Existing files of the same names are replaced, ``README.md`` included.

    Args:
        model: As in :func:`save_peft_adapter`, like ``uniform`` and ``facts``.
        repo_id: ``"user/name"``.
        uniform: Pad all adapters to the highest rank, or to this one. False writes the mixed form.
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


def _require_exportable(model: nn.Module, layers: Mapping[str, TruncatedLoRALinear]) -> None:
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(f"Expected unmerged adapters but {merged[0]} is merged; call unmerge_lora(model) first.")
    modules = named_modules(model)
    places = Counter(id(child) for parent in modules.values() for child in parent._modules.values())
    for name, layer in layers.items():
        if layer.lora_A.ndim != 2 or layer.lora_B.ndim != 2:
            raise ValueError(
                f"Expected whole adapters but FSDP1 flattened those of {name}; export inside of "
                "FullyShardedDataParallel.summon_full_params(model)."
            )
        if places[id(layer)] > 1:
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


def _common_rank(uniform: bool | int, highest: int) -> int:
    """Return the rank that all adapters are padded to."""
    if uniform is True:
        return highest
    if not isinstance(uniform, int) or uniform < highest:
        raise ValueError(
            f"Expected uniform to be a rank of at least {highest}, the highest of the adapters, but got {uniform!r}; "
            "lower the ranks first, for example with condense_lora, or leave uniform out."
        )
    return uniform


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
