"""AdapterSettings: the settings of the adapters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lalora_lightning.initialization import Init
from lalora_lightning.layers import require_adapter_settings

__all__ = ["AdapterSettings"]


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Arguments of :func:`lalora_lightning.add_lora` that describe a method.

    Values are checked as far as this does not need a model. ``add_lora(model, **vars(settings))`` adapts a model.

    Attributes:
        rank: Maximum rank of a projection.
        alpha: The adapters are scaled by ``alpha / rank``.
        dropout: Dropout on the adapters' input.
        target_modules: Which linear layers are adapted.
        modules_to_save: Which modules are trained in full.
        rank_pattern: Maximum ranks for some projections.
        init: Initialization of the factors.
        use_rslora: Scale by ``alpha / sqrt(rank)``.
        freeze_A: Train ``lora_B`` only.

    Raises:
        ValueError: rank, alpha, dropout or init is out of range.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: Sequence[str] | str | None = None
    modules_to_save: Sequence[str] | None = None
    rank_pattern: Mapping[str, int] | None = None
    init: Init = "kaiming"
    use_rslora: bool = False
    freeze_A: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        require_adapter_settings(self.rank, self.alpha, self.dropout, self.init)
