"""Counts of operations, which do not vary from machine to machine; see ``recipes.benchmarks.operations``."""

import pytest
import torch

from lalora_lightning import RankAllocator, add_lora
from recipes.benchmarks.operations import (
    OperationCounter,
    allocator_counts,
    allocator_synchronizations,
    compiled_graphs,
    step_counts,
)
from tests.helpers.models import TinyTransformer


def test_counter_counts_kernels_and_no_views():
    x = torch.ones(2, 3)
    with OperationCounter() as counter:
        x.T.reshape(2, 3).unsqueeze(0)[0, :, 1:].add(1).mm(x[:, :2])
    assert counter.counts == {"aten.clone": 1, "aten.add": 1, "aten.mm": 1}


def test_operations_per_adapted_linear_layer():
    counts = step_counts(depth=12)
    forward, backward = counts["ours"]
    assert forward <= 3.1
    assert backward <= 4.7
    # The counter is calibrated by what PEFT is known to need.
    assert counts["PEFT LoRA"] == pytest.approx((4.0, 5.5))


def test_allocator_operations_do_not_grow_with_the_number_of_layers():
    counts = allocator_counts((6, 12, 24, 48, 96))
    assert len(set(counts.values())) == 1
    assert counts[6] <= 75


def test_the_count_of_synchronizations(monkeypatch: pytest.MonkeyPatch):
    assert allocator_synchronizations() == 0
    step = RankAllocator.step

    def asking(allocator: RankAllocator) -> None:
        step(allocator)
        if allocator.budget > 1:
            allocator.ranks.sum().item()

    # One for `if` and one for `item`.
    monkeypatch.setattr(RankAllocator, "step", asking)
    assert allocator_synchronizations() == 2


@pytest.mark.parametrize("settings", [{}, {"contribution": "fisher"}, {"growth": "stored", "fidelity": False}])
def test_the_allocator_never_asks_the_device_for_a_number(settings: dict):
    """A meta tensor has no numbers to give: every ``item()``, ``tolist()`` or ``if tensor`` would raise."""
    with torch.device("meta"):
        model = TinyTransformer()
    add_lora(model, rank=4)
    allocator = RankAllocator(model, **settings)
    for layer in (model.blocks[0].query, model.blocks[1].value):
        layer.lora_A.grad = torch.empty_like(layer.lora_A)
    allocator.observe_gradients()
    allocator.step()
    assert allocator.ranks.is_meta
    assert allocator.ranks.shape == (3,)


def test_the_allocator_copies_nothing_between_devices_in_a_step():
    with torch.device("meta"):
        model = TinyTransformer()
    add_lora(model, rank=4)
    allocator = RankAllocator(model)
    devices = set()

    class Devices(OperationCounter):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = super().__torch_dispatch__(func, types, args, kwargs)
            devices.update(t.device.type for t in (*args, out) if isinstance(t, torch.Tensor))
            return out

    with Devices():
        allocator.step()
    assert devices == {"meta"}


def test_one_graph_over_fifty_rank_changes_in_training_and_evaluation():
    graphs, difference = compiled_graphs(rank_changes=50)
    # One for training and one for evaluation.
    assert graphs == 2
    assert difference < 1e-4
