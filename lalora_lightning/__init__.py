"""La-LoRA for PyTorch Lightning: layer-wise adaptive low-rank fine-tuning."""

from lalora_lightning.adapters import AdapterSummary, add_lora, lora_layers, merge_lora, trim_lora, unmerge_lora
from lalora_lightning.allocator import RankAllocator
from lalora_lightning.callback import LaLoraCallback
from lalora_lightning.checkpoint import load_lora_state_dict, lora_state_dict
from lalora_lightning.layers import TruncatedLoRALinear
from lalora_lightning.peft_adapter import load_peft_adapter, push_peft_adapter, save_peft_adapter

__version__ = "0.1.0"

__all__ = [
    "AdapterSummary",
    "LaLoraCallback",
    "RankAllocator",
    "TruncatedLoRALinear",
    "add_lora",
    "load_lora_state_dict",
    "load_peft_adapter",
    "lora_layers",
    "lora_state_dict",
    "merge_lora",
    "push_peft_adapter",
    "save_peft_adapter",
    "trim_lora",
    "unmerge_lora",
]
