"""The same batches and seed in three kinds of loop: the ranks of every step are the same."""

from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch import nn

from lalora_lightning import LaLoraCallback, RankAllocator, add_lora
from tests.conftest import TinyTransformer
from tests.test_callback import Task, loader, new_trainer


def by_trainer(folder: Path) -> list[list[int]]:
    torch.manual_seed(0)
    callback = LaLoraCallback(rank=4, gamma=1.0)
    new_trainer(folder, callback).fit(Task(), loader())
    return [ranks for _, ranks, _ in callback.history[1:]]


def by_hand(fabric: Fabric | None) -> list[list[int]]:
    torch.manual_seed(0)
    model: nn.Module = TinyTransformer()
    add_lora(model, rank=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    allocator = RankAllocator(model, gamma=1.0)
    batches = loader()
    if fabric is not None:
        model, optimizer = fabric.setup(model, optimizer)
        batches = fabric.setup_dataloaders(batches)
    trajectory = []
    for _ in range(3):
        for x, y in batches:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward() if fabric is None else fabric.backward(loss)
            optimizer.step()
            allocator.step()
            trajectory.append(allocator.ranks.tolist())
    return trajectory


def test_trainer_fabric_and_a_plain_loop_give_the_same_ranks(tmp_path: Path):
    expected = by_trainer(tmp_path)
    assert len(expected) == 21
    assert len(set(map(tuple, expected))) > 3
    assert by_hand(None) == expected
    assert by_hand(Fabric(accelerator="cpu", devices=1)) == expected
