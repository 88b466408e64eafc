"""Saving and loading what training changed: as a state dict, or as an adapter in PEFT's format."""

from lalora_lightning.saving.combining import combine_lora
from lalora_lightning.saving.peft import push_peft_adapter, save_peft_adapter
from lalora_lightning.saving.peft_import import load_peft_adapter
from lalora_lightning.saving.state import (
    frozen_names,
    load_lora_state_dict,
    lora_state_dict,
    require_matching_state,
    without_frozen,
)

__all__ = [
    "combine_lora",
    "frozen_names",
    "load_lora_state_dict",
    "load_peft_adapter",
    "lora_state_dict",
    "push_peft_adapter",
    "require_matching_state",
    "save_peft_adapter",
    "without_frozen",
]
