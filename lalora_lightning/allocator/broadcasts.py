"""DistributedDataParallel sends the buffers of process 0 to the others, but rank masks are the same everywhere."""

from typing import Any

from torch import nn

from lalora_lightning.layers import TruncatedLoRALinear

__all__ = ["leave_masks_out_of_broadcasts"]


def leave_masks_out_of_broadcasts(root: nn.Module) -> None:
    """Let ``DistributedDataParallel`` not send the rank masks of a module.

    Every process has to compute the same ranks, as a rank allocator does, and to load the same state: the masks of
    process 0 are not sent when the module is wrapped, either. LaLoraCallback sends them once when training starts.

    Args:
        root: The module that will be wrapped.
    """
    named = root.named_modules(remove_duplicate=False)
    masks = [f"{name}.rank_mask" for name, layer in named if isinstance(layer, TruncatedLoRALinear)]
    # The attribute that DistributedDataParallel reads.
    ignored = list(getattr(root, "_ddp_params_and_buffers_to_ignore", []))
    names: Any = ignored + [mask for mask in masks if mask not in ignored]
    root._ddp_params_and_buffers_to_ignore = names
