"""La-LoRA for PyTorch Lightning: layer-wise adaptive low-rank fine-tuning.

Public names are loaded on first use. Only :class:`LaLoraCallback` loads Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lalora_lightning.adapters import (
        AdapterSummary,
        Condensation,
        add_lora,
        condense_lora,
        disable_adapters,
        lora_layers,
        merge_lora,
        trim_lora,
        unmerge_lora,
    )
    from lalora_lightning.allocator import RankAllocator
    from lalora_lightning.callback import LaLoraCallback
    from lalora_lightning.layers import TruncatedLoRALinear
    from lalora_lightning.saving import (
        combine_lora,
        load_lora_state_dict,
        load_peft_adapter,
        lora_state_dict,
        push_peft_adapter,
        save_peft_adapter,
    )

__version__ = "0.2.0.dev0"

__all__ = [
    "AdapterSummary",
    "Condensation",
    "LaLoraCallback",
    "RankAllocator",
    "TruncatedLoRALinear",
    "add_lora",
    "combine_lora",
    "condense_lora",
    "disable_adapters",
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

# Searched in this order. The last one loads Lightning, which is the slowest import.
_MODULES = ("functional", "initialization", "layers", "adapters", "sparsity", "allocator", "saving", "callback")


def __getattr__(name: str) -> Any:
    """Load a public name or a module (PEP 562)."""
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name in __all__:
        for module in map(__getattr__, _MODULES):
            if name in module.__all__:
                globals()[name] = getattr(module, name)
                return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names and modules, whether they are loaded or not."""
    return sorted({"__doc__", "__version__", *__all__, *_MODULES})
