"""The ``adapter_config.json`` of an exported adapter."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lalora_lightning.saving.peft_names import exact_pattern

__all__ = ["adapter_config"]


def adapter_config(
    model: nn.Module,
    target_modules: list[str] | str,
    modules_to_save: Sequence[str],
    ranks: Mapping[str, int],
    fan_in_fan_out: bool,
) -> dict[str, Any]:
    """Return the settings of an adapter whose ``lora_B`` includes the scaling: alpha equals the rank everywhere.

    These are the settings of :class:`peft.LoraConfig` that versions of PEFT from 2024 on know. Settings that came later
    have defaults that fit.

    Args:
        model: The base model, whose class ``AutoPeftModel`` loads.
        target_modules: Names that select the adapted modules.
        modules_to_save: Names of the modules that are saved in full.
        ranks: Rank of each adapter.
        fan_in_fan_out: Whether the adapted weights are transposed, as in transformers' ``Conv1D``.
    """
    highest = max(ranks.values())
    pattern = {exact_pattern(name, ranks): rank for name, rank in ranks.items() if rank != highest}
    return {
        "peft_type": "LORA",
        "task_type": None,
        # PEFT writes this if there is no task type. A task type would add the names of usual heads to modules_to_save.
        "auto_mapping": {"base_model_class": type(model).__name__, "parent_library": type(model).__module__},
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "revision": None,
        "target_modules": target_modules,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": list(modules_to_save) or None,
        "r": highest,
        "lora_alpha": highest,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
