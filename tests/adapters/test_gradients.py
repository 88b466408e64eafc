"""Whether adapters learn is found out from gradients, without false alarms."""

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lalora_lightning import add_lora, lora_layers
from lalora_lightning.adapters import (
    GradientMonitor,
    disable_input_gradients,
    enable_input_gradients,
    require_gradients,
    require_trainable,
)
from tests.helpers.models import Attention, TinyTransformer

X = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))


def observe(model: nn.Module, steps: int, forward=None) -> tuple[list[str], int]:
    """Warnings of so many steps, and the most hooks that a module had."""
    monitor, warnings, hooks = GradientMonitor(model), [], 0
    for step in range(steps):
        model.zero_grad()
        out = model(X) if forward is None else forward(step)
        out.sum().backward()
        warning = monitor.observe()
        warnings += [warning] if warning else []
        hooks = max(hooks, *(len(module._forward_pre_hooks) for module in model.modules()))
    monitor.close()
    assert not any(module._forward_pre_hooks for module in model.modules())
    return warnings, hooks


def test_where_all_is_well_nothing_is_said_and_no_hook_is_attached(adapted: TinyTransformer):
    assert observe(adapted, 15) == ([], 0)


def test_features_without_gradients_are_reported_once(adapted: TinyTransformer):
    def forward(step: int) -> Tensor:
        x = X
        for block in adapted.blocks:
            x = block(x)
        return adapted.head(x.mean(1).detach())

    (warning,), hooks = observe(adapted, 15, forward)
    assert warning.startswith("6 of 6 adapters get no gradient, so that they do not learn: blocks.0.query, ")
    assert "torch.no_grad() or its output is detached; reentrant activation checkpointing" in warning
    assert hooks == 1


def test_a_part_without_gradients_is_named(adapted: TinyTransformer):
    def forward(step: int) -> Tensor:
        with torch.no_grad():
            x = adapted.blocks[0](X)
        return adapted.head(adapted.blocks[2](adapted.blocks[1](x)).mean(1))

    (warning,), _ = observe(adapted, 15, forward)
    assert "2 of 6 adapters get no gradient, so that they do not learn: blocks.0.query, blocks.0.value." in warning


class Routed(nn.Module):
    """Of several experts one is called."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Attention(8) for _ in range(4))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor, expert: int = 0) -> Tensor:
        return self.head(self.experts[expert](x).mean(1))


def test_layers_that_no_batch_reaches_are_no_fault():
    model = Routed()
    add_lora(model, rank=2)
    warnings, _ = observe(model, 30)
    assert warnings == []
    # Nor are towers that come in turn.
    warnings, _ = observe(model, 30, lambda step: model(X, step // 2 % 4))
    assert warnings == []


def test_an_attention_whose_weight_is_read_is_reported_too():
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.0, batch_first=True)
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 2), "head": nn.Linear(8, 2)})
    add_lora(model, rank=2)
    (warning,), _ = observe(model, 6, lambda step: model["head"](model["encoder"](X).detach().mean(1)))
    assert "2 of 2 adapters get no gradient" in warning


def test_a_pass_without_gradients_beside_one_with_them_is_no_fault(adapted: TinyTransformer):
    def forward(step: int) -> Tensor:
        with torch.no_grad():
            target = adapted(X)
        return (adapted(X) - target).square() + adapted(X)

    assert observe(adapted, 15, forward) == ([], 0)


def test_frozen_adapters_are_an_error(adapted: TinyTransformer):
    require_trainable(adapted)
    adapted.blocks[1].requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"4 of 12 factors are frozen, the first blocks\.1\.query\.lora_B"):
        require_trainable(adapted)


def test_frozen_a_is_frozen_on_purpose(model: TinyTransformer):
    add_lora(model, rank=2, freeze_A=True)
    require_trainable(model)
    model(X).sum().backward()
    require_gradients(model)


def test_the_function_for_plain_loops(adapted: TinyTransformer):
    adapted.head(X.mean(1)).sum().backward()
    with pytest.raises(RuntimeError, match=r"6 of 6 adapters get no gradient"):
        require_gradients(adapted)
    adapted(X).sum().backward()
    require_gradients(adapted)
    with pytest.raises(ValueError, match="call add_lora"):
        require_gradients(TinyTransformer())


@pytest.mark.parametrize("reentrant", [True, False])
def test_reentrant_checkpointing_over_frozen_embeddings(reentrant: bool):
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=16, use_cache=False)).train()
    add_lora(model, rank=2)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if hasattr(model, "_require_grads_hook"):
        # Newer versions of transformers have done it themselves.
        assert enable_input_gradients(model) == []
        model.disable_input_require_grads()
    ids = torch.arange(8)[None]
    enabled = enable_input_gradients(model)
    # Without reentrant checkpointing it would only cost the gradients of the first layer's input.
    assert enabled == ([model] if reentrant else [])
    model(ids, labels=ids).loss.backward()
    assert all(layer.lora_B.grad is not None for layer in lora_layers(model).values())
    disable_input_gradients(enabled)
    assert not model.get_input_embeddings()(ids).requires_grad
