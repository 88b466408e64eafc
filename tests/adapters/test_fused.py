"""Fused projections whose query, key and value come head by head."""

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lalora_lightning import add_lora
from lalora_lightning.adapters.fused import interleaved_projections
from tests.helpers.models import TinyTransformer


class Attention(nn.Module):
    """Two heads of width 4; ``order`` is "stacked", "heads" or "kqv"."""

    def __init__(self, order: str, arguments: int = 0) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 8)
        self.order, self.arguments = order, arguments

    def forward(self, x: Tensor, *arguments: Tensor) -> Tensor:
        if len(arguments) != self.arguments:
            raise TypeError("missing arguments")
        qkv = self.qkv(x)
        if self.order == "heads":
            q, k, v = qkv.unflatten(-1, (2, 12)).transpose(1, 2).chunk(3, -1)
        else:
            q, k, v = (part.transpose(1, 2) for part in qkv.unflatten(-1, (3, 2, 4)).unbind(-3))
        if self.order == "kqv":
            q, k = k, q
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def model(*arguments: object) -> nn.Module:
    blocks = nn.ModuleList(nn.ModuleDict({"attn": Attention(*arguments)}) for _ in range(2))
    return nn.ModuleDict({"blocks": blocks, "head": nn.Linear(8, 2)})


def slices(model: nn.Module) -> tuple:
    add_lora(model, rank=2)
    return model["blocks"][1].attn.qkv.out_slices


def test_an_unknown_attention_is_tried_out(recwarn):
    assert slices(model("stacked")) == ((0, 8), (16, 24))
    assert slices(model("heads")) == ((0, 24),)
    assert slices(model("kqv")) == ((0, 24),)
    assert not recwarn


def test_trying_out_leaves_no_trace():
    attention = model("heads")["blocks"][0].attn
    generator_state = torch.get_rng_state()
    assert interleaved_projections({"": attention, "qkv": attention.qkv}, ["qkv"]) == {"qkv": True}
    assert torch.equal(torch.get_rng_state(), generator_state)
    assert attention.training
    assert not attention.qkv._forward_hooks
    assert all(p.grad is None for p in attention.parameters())


def test_an_order_that_cannot_be_found_out_is_said_once(recwarn):
    assert slices(model("heads", 1)) == ((0, 8), (16, 24))
    (warning,) = recwarn
    assert str(warning.message) == (
        "La-LoRA: Query, key and value are assumed to be one after the other in blocks.0.attn.qkv and 1 more. If "
        "Attention orders them head by head, pass target_modules to adapt the whole projection."
    )


def test_tinyvit_is_adapted_whole():
    attention = timm.models.tiny_vit.Attention(64, 32, num_heads=2, attn_ratio=1, resolution=(4, 4))
    net = nn.ModuleDict({"attention": attention, "head": nn.Linear(64, 2)})
    add_lora(net, rank=2)
    assert attention.qkv.out_slices == ((0, 192),)


def test_a_projection_that_widens_the_model_has_query_and_value_too():
    attention = timm.models.hiera.MaskUnitAttention(8, 16, heads=2, q_stride=4, window_size=4)
    net = nn.ModuleDict({"attention": attention, "head": nn.Linear(16, 2)})
    add_lora(net, rank=2)
    assert attention.qkv.out_slices == ((0, 16), (32, 48))


def test_separate_projections_are_not_tried_out(recwarn):
    add_lora(TinyTransformer(), rank=2)
    assert not recwarn
