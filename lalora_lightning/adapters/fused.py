"""How a fused query, key and value projection is laid out: one after the other, or head by head."""

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lalora_lightning.layers import linear_shape

__all__ = ["interleaved_projections"]

_KNOWN_PACKAGES = ("timm", "torch", "torchvision", "transformers")


def interleaved_projections(modules: Mapping[str, nn.Module], names: Iterable[str]) -> dict[str, bool | None]:
    """Return whether fused projections have the query, key and value of the first head, then of the second, and so on.

    The attentions of timm, torch, torchvision and transformers are known. Others are tried out, once for each class.

    Args:
        modules: All modules of the model by name.
        names: Names of fused projections.

    Returns:
        For each name, False for query, key and value one after the other, True for any other order, and None if the
        order is unknown.
    """
    tried: dict[tuple[type, str], bool | None] = {}
    interleaved = {}
    for name in names:
        prefix, _, child = name.rpartition(".")
        attention: Any = modules[prefix]
        kind = (type(attention), child)
        if type(attention).forward.__module__.partition(".")[0] in _KNOWN_PACKAGES:
            # timm's MaxViT and CoAtNet; timm's TinyViT, EfficientFormer and LeViT; GPTBigCode with multi_query=False.
            # With multi_query=True, its projection has other proportions.
            interleaved[name] = (
                getattr(attention, "head_first", False)
                or hasattr(attention, "key_dim")
                or hasattr(attention, "multi_query")
            )
            continue
        if kind not in tried:
            tried[kind] = _try_out(attention, child)
        interleaved[name] = tried[kind]
    return interleaved


def _try_out(attention: nn.Module, child: str) -> bool | None:
    """Find the order of the outputs of a fused projection by gradients.

    The query of a token affects the output at this token only. Its key and value also affect the output elsewhere.
    """
    # A copy, because trying out may change buffers and the mode.
    attention = copy.deepcopy(attention).float().eval()
    m, d = linear_shape(getattr(attention, child))
    generator = torch.Generator().manual_seed(0)
    for shape in _SHAPES:
        try:
            is_query = ~_outputs_that_affect_other_tokens(attention, child, (*shape, d), generator)
            if is_query.sum() * 3 == m:
                return not bool(is_query[: m // 3].all())
        except Exception:
            # It expects other arguments, or an input of another shape.
            continue
    return None


_SHAPES = ((4,), (16,), (49,), (64,), (4, 4), (8, 8))
"""Shapes of the inputs to try: sequences, windows of 4 x 4, 7 x 7 and 8 x 8 tokens, images."""


def _outputs_that_affect_other_tokens(
    attention: nn.Module, child: str, shape: tuple[int, ...], generator: torch.Generator
) -> Tensor:
    """Return which outputs of the projection at the first token affect the attention's output at other tokens, (m,)."""
    projected: list[Tensor] = []

    def project(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        # Random values instead of the actual ones, which may be zero.
        projected.append(torch.randn(output.shape, generator=generator).to(output.device).requires_grad_())
        return projected[-1]

    layer = getattr(attention, child)
    with layer.register_forward_hook(project), torch.enable_grad():
        out = attention(torch.randn(1, *shape, generator=generator).to(layer.weight.device))
        out = (out if isinstance(out, Tensor) else out[0]).reshape(math.prod(shape[:-1]), -1)
        weights = torch.randn(out.shape[1], generator=generator).to(out.device)
        (gradient,) = torch.autograd.grad((out[1:] @ weights).sum(), projected)
    return gradient.reshape(-1, gradient.shape[-1])[0] != 0
