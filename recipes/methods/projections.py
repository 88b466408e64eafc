"""The projections and blocks that methods adapt; they are the same as for La-LoRA."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lalora_lightning.adapters import find_targets
from lalora_lightning.names import group_names

__all__ = ["NotApplicableError", "Projections", "find_projections"]


class NotApplicableError(ValueError):
    """A method cannot adapt a model; the message is the reason, a clause without a full stop."""


@dataclass(frozen=True)
class Projections:
    """The projections of a model that LoRA adapts.

    Attributes:
        names: Names of the linear modules.
        fused: Names of the fused projections of query, key and value among them.
        blocks: Names of the transformer blocks that contain them.
    """

    names: list[str]
    fused: list[str]
    blocks: list[str]


def find_projections(model: nn.Module, target_modules: Sequence[str] | str | None = None) -> Projections:
    """Find the projections in the same way as :func:`lalora_lightning.add_lora`; by default query and value.

    Raises:
        ValueError: Nothing was found.
        TypeError: A target is not a linear module.
    """
    targets = find_targets(dict(model.named_modules()), target_modules)
    return Projections(
        names=list(targets),
        fused=[name for name, out_slices in targets.items() if out_slices is not None],
        blocks=list(group_names(targets)),
    )
