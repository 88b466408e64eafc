"""Parameters that are sharded over processes by FSDP2 (``fully_shard``)."""

from torch import Tensor

__all__ = ["gathered"]


def gathered(tensor: Tensor) -> Tensor:
    """Return the full tensor of a sharded tensor (a ``DTensor``); return any other tensor unchanged.

    Gathering is a collective operation: every process has to call it.
    """
    # A proxy of torch.fx has every attribute.
    return tensor.full_tensor() if isinstance(tensor, Tensor) and hasattr(tensor, "full_tensor") else tensor
