"""torch's ``nn.MultiheadAttention``, whose query, key and value projections are one parameter and no module."""

from typing import Any

from torch import Tensor, nn

# The name that the fused projection gets as a module.
IN_PROJ = "in_proj"


class _AttentionWithInProj(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with its fused projection as a module ``in_proj``.

    Attention reads ``in_proj_weight`` as before and gets the weight in effect, so that everything works that works on
    torch's own: masks, a batch in either layout, the fast path of ``nn.TransformerEncoder``.
    """

    in_proj: Any
    # The weight in effect while the forward pass runs, which asks for it several times.
    _weight_in_effect: Tensor | None = None

    # nn.Module looks for a parameter only where the class has nothing of the name.
    @property
    def in_proj_weight(self) -> Tensor:  # type: ignore[override]
        return self.in_proj.weight if self._weight_in_effect is None else self._weight_in_effect

    @property
    def in_proj_bias(self) -> Tensor | None:  # type: ignore[override]
        return self.in_proj.bias

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As of ``nn.MultiheadAttention``."""
        # Past nn.Module, which would take the weight of a merged layer for a parameter of its own.
        object.__setattr__(self, "_weight_in_effect", self.in_proj.weight)
        try:
            return super().forward(*args, **kwargs)
        finally:
            object.__setattr__(self, "_weight_in_effect", None)


def in_proj_of(attention: nn.Module) -> nn.Linear | None:
    """The fused projection as a linear layer over the same parameters; None where there is none to be had.

    That is where the module is no ``nn.MultiheadAttention``, or one with inputs of several widths.
    """
    if type(attention) is not nn.MultiheadAttention or not attention._qkv_same_embed_dim:
        return None
    in_proj = nn.Linear(attention.embed_dim, 3 * attention.embed_dim, bias=False, device="meta")
    in_proj.weight, in_proj.bias = attention.in_proj_weight, attention.in_proj_bias
    return in_proj


def set_in_proj(attention: Any, in_proj: nn.Module) -> None:
    """Let an adapted projection take the place of the fused parameters, or a plain one become them again."""
    if isinstance(in_proj, nn.Linear):
        del attention.in_proj
        attention.__class__ = nn.MultiheadAttention
        attention.register_parameter("in_proj_weight", in_proj.weight)
        attention.register_parameter("in_proj_bias", in_proj.bias)
    else:
        del attention.in_proj_weight, attention.in_proj_bias
        attention.__class__ = _AttentionWithInProj
        attention.in_proj = in_proj
