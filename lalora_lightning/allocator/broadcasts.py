"""What is sent from process 0 to the others, and what is not: rank masks, which are computed everywhere alike."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lalora_lightning.layers import TruncatedLoRALinear

__all__ = ["broadcast_from_first", "broadcast_masks", "leave_masks_out_of_broadcasts"]


def broadcast_from_first(tensor: Tensor) -> None:
    """Replace a tensor with that of the first process. Rounding may differ between kinds of devices."""
    torch.distributed.broadcast(tensor, 0)


def broadcast_masks(layers: Iterable[TruncatedLoRALinear]) -> None:
    """Replace the rank masks with those of the first process, in a way that a rank allocator notices."""
    for layer in layers:
        mask = layer.rank_mask.clone()
        broadcast_from_first(mask)
        layer.rank_mask.copy_(mask)


def leave_masks_out_of_broadcasts(root: nn.Module) -> None:
    """Let ``DistributedDataParallel`` not send the rank masks of a module.

    Every process has to compute the same ranks, as a rank allocator does, and to load the same state: the masks of
    process 0 are not sent when the module is wrapped, either. LaLoraCallback sends them once when training starts, by
    :func:`broadcast_masks`.

    Args:
        root: The module that will be wrapped.
    """
    named = root.named_modules(remove_duplicate=False)
    masks = [f"{name}.rank_mask" for name, layer in named if isinstance(layer, TruncatedLoRALinear)]
    # The attribute that DistributedDataParallel reads.
    ignored = list(getattr(root, "_ddp_params_and_buffers_to_ignore", []))
    names: Any = ignored + [mask for mask in masks if mask not in ignored]
    root._ddp_params_and_buffers_to_ignore = names
