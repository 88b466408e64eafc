"""Parameters that are sharded over processes by FSDP2 (``fully_shard``)."""

from typing import Any

from torch import Tensor

__all__ = ["gathered", "scatter_into"]


def gathered(tensor: Tensor) -> Tensor:
    """Return the full tensor of a sharded tensor (a ``DTensor``); return any other tensor unchanged.

    Gathering is a collective operation: every process has to call it.
    """
    # A proxy of torch.fx has every attribute.
    return tensor.full_tensor() if isinstance(tensor, Tensor) and hasattr(tensor, "full_tensor") else tensor


def scatter_into(tensor: Any, value: Tensor) -> None:
    """Write a full tensor into one that may be sharded, each process into its own shard.

    Args:
        tensor: The tensor to change in place.
        value: The same full tensor on all processes.
    """
    if hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(tensor.dtype), tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(value)
