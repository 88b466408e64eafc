"""Averages of an adapted model in training, by other libraries and by hand: the average computes what it should."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lalora_lightning import RankAllocator, add_lora, load_lora_state_dict, lora_layers, lora_state_dict, trim_lora
from tests.helpers.models import TinyTransformer

X = torch.randn(64, 5, 8, generator=torch.Generator().manual_seed(1))
Y = (X.mean((1, 2)) > 0).long()


def average_by_state(model: nn.Module, decay: float) -> tuple[nn.Module, Callable[[], None]]:
    average = copy.deepcopy(model)

    def update() -> None:
        for own, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
            if new.is_floating_point():
                own.mul_(decay).add_(new, alpha=1 - decay)
            else:
                own.copy_(new)

    return average, update


@torch.no_grad()
def average_by_parameters(model: nn.Module, decay: float) -> tuple[nn.Module, Callable[[], None]]:
    """Buffers are copied, as for BatchNorm."""
    average = copy.deepcopy(model)

    @torch.no_grad()
    def update() -> None:
        for own, new in zip(average.parameters(), model.parameters(), strict=True):
            own.mul_(decay).add_(new, alpha=1 - decay)
        for own, new in zip(average.buffers(), model.buffers(), strict=True):
            own.copy_(new)

    return average, update


def torchs_average(use_buffers: bool) -> Any:
    def build(model: nn.Module, decay: float) -> tuple[nn.Module, Callable[[], None]]:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=use_buffers)
        return average.module, lambda: average.update_parameters(model)

    return build


def timms_average(kind: type) -> Any:
    def build(model: nn.Module, decay: float) -> tuple[nn.Module, Callable[[], None]]:
        average = kind(model, decay=decay)
        return average.module, lambda: average.update(model)

    return build


AVERAGES = {
    "state": average_by_state,
    "parameters": average_by_parameters,
    "torch": torchs_average(False),
    "torch with buffers": torchs_average(True),
    "timm 2": timms_average(ModelEmaV2),
    "timm 3": timms_average(ModelEmaV3),
}


def train(model: nn.Module, allocator: RankAllocator, steps: int, update: Callable[[], None] = lambda: None) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(steps):
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
        allocator.step()
        update()


@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_that_forgets_at_once_is_the_model(kind: str, model: TinyTransformer):
    add_lora(model, rank=4)
    allocator = RankAllocator(model, gamma=3.0)
    average, update = AVERAGES[kind](model, decay=0.0)
    train(model, allocator, 10, update)
    assert allocator.ranks.sum() > 3
    assert [int(layer.rank) for layer in lora_layers(average).values()] == [
        int(layer.rank) for layer in lora_layers(model).values()
    ]
    torch.testing.assert_close(average(X), model(X))


@pytest.mark.parametrize("kind", ["state", "torch with buffers", "timm 2"])
def test_an_average_follows_ranks_that_fall(kind: str, model: TinyTransformer):
    """The weight of a component that was taken away fades; it is what an average over the steps gives by hand."""
    add_lora(model, rank=4)
    layer = model.blocks[0].query
    nn.init.normal_(layer.lora_B)
    average, update = AVERAGES[kind](model, decay=0.5)
    update()
    layer.set_rank(2)
    for expected in (0.5, 0.25):
        update()
        averaged = average.blocks[0].query
        torch.testing.assert_close(averaged.rank_mask, torch.tensor([1.0, 1.0, expected, expected]))
    # Components 3 and 4 count a quarter.
    A, B = layer.lora_A.detach(), layer.lora_B.detach() * torch.tensor([1.0, 1.0, 0.25, 0.25])
    x = torch.randn(3, 8)
    by_hand = layer.base_layer(x) + layer.scaling * x @ A.T @ B.T
    torch.testing.assert_close(averaged(x), by_hand)
    torch.testing.assert_close(x @ averaged.weight.T + averaged.bias, by_hand)
    trim_lora(average)
    torch.testing.assert_close(average.blocks[0].query(x), by_hand)
    assert average.blocks[0].query.rank_mask.tolist() == [1, 1, 1, 1]


def test_an_average_of_states_is_loaded(model: TinyTransformer):
    plain = copy.deepcopy(model)
    add_lora(model, rank=4)
    states = []
    for rank in (1, 3):
        for layer in lora_layers(model).values():
            layer.set_rank(rank)
        states.append({key: value.clone() for key, value in lora_state_dict(model).items()})
    load_lora_state_dict(plain, {key: (states[0][key] + states[1][key]) / 2 for key in states[0]})
    assert plain.blocks[0].query.rank_mask.tolist() == [1, 0.5, 0.5, 0]
    assert int(plain.blocks[0].query.rank) == 3
    # An allocator goes on with whole components.
    RankAllocator(plain, gamma=0.0)
    assert plain.blocks[0].query.rank_mask.tolist() == [1, 0, 0, 0]
