"""Parameters that are sharded over processes by FSDP2 (``fully_shard``)."""

from torch import Tensor

__all__ = ["gathered"]


def gathered(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that is sharded (a ``DTensor``), and any other tensor as it is.

    Gathering is a collective operation: every process has to call it.
    """
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
