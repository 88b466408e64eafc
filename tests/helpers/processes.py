"""Training in several processes, as torchrun would start them."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from tests.helpers.training import TinyClassifier

STEPS, GLOBAL_BATCH = 6, 8


class ShardedClassifier(TinyClassifier):
    """Each block, and the rest, sharded by FSDP2; the callback has put its layers in by then."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


def batches(world: int) -> DataLoader:
    """Rows dealt out in turn, so that a global batch is the same rows for any number of processes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS * GLOBAL_BATCH, 5, 8, generator=generator)
    data = TensorDataset(x, (x.mean((1, 2)) > 0).long())
    sampler = DistributedSampler(data, world, int(os.environ.get("LOCAL_RANK", 0)), shuffle=False)
    return DataLoader(data, batch_size=GLOBAL_BATCH // world, sampler=sampler)


def in_processes(world: int, folder: Path, work: Callable[[], Any]) -> list[Any]:
    """What ``work`` returns in each of several processes, which are told about each other as torchrun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def process(rank: int) -> None:
        os.environ.update(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(world)
        )
        torch.save(work(), folder / f"{rank}.pt")

    # Forked: torch need not be imported again.
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=process, args=(rank,)) for rank in range(world)]
    for child in processes:
        child.start()
    for child in processes:
        child.join(timeout=600)
        child.kill()
    assert [child.exitcode for child in processes] == [0] * world
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def strategy_of(name: str, world: int) -> Any:
    if name == "ddp":
        return DDPStrategy()
    return ModelParallelStrategy(world, tensor_parallel_size=1, save_distributed_checkpoint=False)
