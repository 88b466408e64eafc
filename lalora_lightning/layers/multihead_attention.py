"""``nn.MultiheadAttention``, whose query, key and value projections are one parameter and not a module.

To adapt them, the parameter has to become a module. :func:`set_in_proj` therefore changes the class of an adapted
attention to ``_AttentionWithInProj``, and back to ``nn.MultiheadAttention`` when the adapter is removed. The class is
changed in place, so that every reference to the attention stays valid. No other file changes the class of a user's
module.
"""

from typing import Any

from torch import Tensor, nn

from lalora_lightning.layers.fx_leaf import traced_call

__all__ = ["IN_PROJ", "in_proj_of", "set_in_proj"]

IN_PROJ = "in_proj"
"""Name of the fused projection as a module."""


class _AttentionWithInProj(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with its fused projection as a module ``in_proj``.

    The attention reads ``in_proj_weight`` as before but gets the adapted weight. Masks, ``batch_first`` and the fast
    path of ``nn.TransformerEncoder`` therefore work as in torch's own class.
    """

    in_proj: Any
    # Caches the adapted weight during a forward pass, which reads it several times.
    _adapted_weight: Tensor | None = None

    # nn.Module only looks up a parameter if the class has no attribute of that name.
    @property
    def in_proj_weight(self) -> Tensor:  # type: ignore[override]
        return self.in_proj.weight if self._adapted_weight is None else self._adapted_weight

    @property
    def in_proj_bias(self) -> Tensor | None:  # type: ignore[override]
        return self.in_proj.bias

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Apply the attention with the adapted weight; arguments as in ``nn.MultiheadAttention``."""
        traced = traced_call(self, args, kwargs)
        if traced is not None:
            return traced
        # nn.Module.__setattr__ would register the weight of a merged layer as a parameter.
        object.__setattr__(self, "_adapted_weight", self.in_proj.weight)
        try:
            return super().forward(*args, **kwargs)
        finally:
            object.__setattr__(self, "_adapted_weight", None)


def in_proj_of(attention: nn.Module) -> nn.Linear | None:
    """Return the fused projection of an attention as a linear layer over the same parameters.

    Returns:
        None if the module is not an ``nn.MultiheadAttention``, or if query, key and value have inputs of different
        widths, so that there is no fused projection.
    """
    if type(attention) is not nn.MultiheadAttention or not attention._qkv_same_embed_dim:
        return None
    in_proj = nn.Linear(attention.embed_dim, 3 * attention.embed_dim, bias=False, device="meta")
    in_proj.weight, in_proj.bias = attention.in_proj_weight, attention.in_proj_bias
    return in_proj


def set_in_proj(attention: Any, in_proj: nn.Module) -> None:
    """Replace the fused parameters with an adapted projection, or an adapted projection with plain parameters."""
    if isinstance(in_proj, nn.Linear):
        del attention.in_proj
        attention.__class__ = nn.MultiheadAttention
        attention.register_parameter("in_proj_weight", in_proj.weight)
        attention.register_parameter("in_proj_bias", in_proj.bias)
    else:
        del attention.in_proj_weight, attention.in_proj_bias
        attention.__class__ = _AttentionWithInProj
        attention.in_proj = in_proj
