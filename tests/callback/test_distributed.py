"""Several processes: the same ranks on each of them at every step, and the same as one process gives."""

import functools
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FullyShardedDataParallel

from lalora_lightning import LaLoraCallback, RankAllocator, add_lora, load_lora_state_dict, lora_layers
from tests.helpers.models import TinyTransformer
from tests.helpers.processes import ShardedClassifier, batches, in_processes, strategy_of
from tests.helpers.training import TinyClassifier, new_trainer

EPOCHS = 2


@pytest.fixture(autouse=True)
def _no_seed_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    # With one, Lightning starts several processes from it, and one process not.
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


def train(
    folder: Path,
    world: int,
    strategy: Any,
    contribution: str = "norm",
    epochs: int = EPOCHS,
    save_adapter_only: bool = True,
    **settings: Any,
) -> tuple[list[tuple[int, list[int], float]], dict[str, torch.Tensor], pl.Trainer]:
    """Fit; returns history and whole weights."""
    torch.manual_seed(0)
    sharded = isinstance(strategy, ModelParallelStrategy)
    module = ShardedClassifier() if sharded else TinyClassifier()
    callback = LaLoraCallback(rank=4, gamma=1.0, contribution=contribution, save_adapter_only=save_adapter_only)
    trainer = new_trainer(folder, callback, strategy=strategy, devices=world, max_epochs=epochs)
    trainer.fit(module, batches(world), **settings)
    state = {name: p.full_tensor() if sharded else p for name, p in module.named_parameters()}
    return callback.history, {name: p.detach().clone() for name, p in state.items()}, trainer


@pytest.mark.parametrize(
    ("name", "world", "contribution"),
    [("ddp", 2, "norm"), ("ddp", 2, "fisher"), ("ddp", 4, "norm"), ("fsdp2", 2, "fisher"), ("fsdp2", 4, "norm")],
)
def test_ranks_agree_across_processes_and_with_one(tmp_path: Path, name: str, world: int, contribution: str):
    def work() -> Any:
        return train(tmp_path, world, strategy_of(name, world), contribution)[:2]

    results = in_processes(world, tmp_path, work)
    history, weights, _ = train(tmp_path, 1, "auto", contribution)
    assert len({tuple(ranks) for _, ranks, _ in history}) > 3
    for theirs, their_weights in results:
        assert theirs == results[0][0]
        assert [(step, ranks) for step, ranks, _ in theirs] == [(step, ranks) for step, ranks, _ in history]
        assert [budget for *_, budget in theirs] == pytest.approx([budget for *_, budget in history], rel=1e-4)
        for key, value in their_weights.items():
            torch.testing.assert_close(value, weights[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("save_adapter_only", [True, False])
def test_a_sharded_run_is_resumed(tmp_path: Path, save_adapter_only: bool):
    """Adapters in one file, or everything in a folder with a part of each process."""
    world = 2
    run = functools.partial(train, tmp_path, world, save_adapter_only=save_adapter_only)

    def strategy() -> ModelParallelStrategy:
        return ModelParallelStrategy(world, 1, save_distributed_checkpoint=not save_adapter_only)

    def work() -> Any:
        whole, weights, _ = run(strategy())
        *_, trainer = run(strategy(), epochs=1)
        trainer.save_checkpoint(tmp_path / "half.ckpt")
        resumed, same, _ = run(strategy(), ckpt_path=tmp_path / "half.ckpt")
        return whole, weights, resumed, same

    for whole, weights, resumed, same in in_processes(world, tmp_path, work):
        assert resumed == whole
        for key, value in weights.items():
            assert torch.equal(same[key], value)
    if save_adapter_only:
        # Whole adapters, for one process as well.
        state = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
        assert "model.blocks.0.key.weight" not in state
        load_lora_state_dict(TinyClassifier(), state)


def test_adapter_only_parts_of_each_process_are_refused(tmp_path: Path):
    def work() -> str:
        with pytest.raises(ValueError, match="save_adapter_only=True") as error:
            train(tmp_path, 1, ModelParallelStrategy(1, 1))
        return str(error.value)

    (message,) = in_processes(1, tmp_path, work)
    assert "use ModelParallelStrategy(save_distributed_checkpoint=False)" in message


def test_a_sharded_run_is_tested_from_adapters_and_compares_them(tmp_path: Path):
    """Lightning itself takes what is there of such a file and asks for nothing."""
    world = 2

    def work() -> Any:
        _, weights, trainer = train(tmp_path, world, strategy_of("fsdp2", world), epochs=1)
        trainer.save_checkpoint(tmp_path / "end.ckpt")

        def test(path: Path, **settings: Any) -> ShardedClassifier:
            torch.manual_seed(0)
            module = ShardedClassifier()
            callback = LaLoraCallback(rank=4, save_adapter_only=True, **settings)
            strategy = strategy_of("fsdp2", world)
            tester = new_trainer(tmp_path, callback, strategy=strategy, devices=world)
            tester.test(module, batches(world), ckpt_path=path, verbose=False)
            assert module.strict_loading
            return module

        tested = test(tmp_path / "end.ckpt").named_parameters()
        # Some are whole after a forward pass.
        same = {name: getattr(p, "full_tensor", lambda p=p: p)().detach() for name, p in tested}
        with pytest.raises(ValueError, match="scaling and output slices") as scaling:
            test(tmp_path / "end.ckpt", alpha=64.0)
        if trainer.is_global_zero:
            checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
            del checkpoint["state_dict"]["model.head.bias"]
            torch.save(checkpoint, tmp_path / "cut.ckpt")
        trainer.strategy.barrier()
        with pytest.raises(ValueError, match="Cannot load the adapter state") as missing:
            test(tmp_path / "cut.ckpt")
        return weights, same, str(scaling.value), str(missing.value)

    for weights, same, scaling, missing in in_processes(world, tmp_path, work):
        assert all(torch.equal(same[key], value) for key, value in weights.items())
        assert "[4.0, 0.0, 8.0]" in scaling
        assert missing.endswith("missing keys: model.head.bias.")


def test_flattened_parameters_are_refused(tmp_path: Path):
    def work() -> str:
        torch.distributed.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]))
        model = TinyTransformer()
        add_lora(model, rank=4)
        sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match="sharded by fully_shard") as error:
            RankAllocator(sharded)
        return str(error.value)

    for message in in_processes(2, tmp_path, work):
        assert "blocks.0.query.lora_A has the shape (" in message


def count_broadcasts(module: torch.nn.Module) -> tuple[int, list[list[float]]]:
    """Return how much DDP sends in a forward pass, and the masks after it."""
    parallel = torch.nn.parallel.DistributedDataParallel(module)
    x = torch.randn(4, 5, 8)
    for _ in range(2):
        # DDP arranges its buckets after the first backward pass.
        parallel(x).sum().backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        parallel(x)
    sent = sum(event.count for event in profiled.key_averages() if "broadcast" in event.key)
    return sent, [layer.rank_mask.tolist() for layer in lora_layers(module).values()]


def test_ddp_sends_no_masks_that_an_allocator_writes(tmp_path: Path):
    """Without an allocator, the masks of the first process are sent, as other buffers are."""

    def work() -> Any:
        rank = int(os.environ["LOCAL_RANK"])
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
        torch.manual_seed(0)
        model = TinyTransformer()
        add_lora(model, rank=4)
        if rank == 1:
            for layer in lora_layers(model).values():
                layer.set_rank(2)
        without = count_broadcasts(model)
        RankAllocator(model, gradual_budget=False)
        return without, count_broadcasts(model)

    for (without, full), (sent, allocated) in in_processes(2, tmp_path, work):
        assert without > sent == 0
        assert full == allocated == [[1, 1, 1, 1]] * 6


def test_ddp_sends_no_masks_in_a_trainer(tmp_path: Path):
    class Ignored(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.names = set(trainer.strategy.model.parameters_to_ignore)

    def work() -> Any:
        ignored = Ignored()
        trainer = new_trainer(tmp_path, LaLoraCallback(rank=4), ignored, strategy="ddp", devices=2, max_epochs=1)
        trainer.fit(TinyClassifier(), batches(2))
        return sorted(ignored.names)

    for names in in_processes(2, tmp_path, work):
        assert names == sorted(
            f"model.blocks.{i}.{projection}.rank_mask" for i in range(3) for projection in ("query", "value")
        )


def test_ranks_that_only_the_first_process_has_are_those_of_all(tmp_path: Path):
    """As if a state was loaded there only, in the belief that DDP sends it to the others."""

    class OnFirst(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.is_global_zero:
                for layer in lora_layers(pl_module).values():
                    layer.set_rank(3)

    def work() -> Any:
        callback = LaLoraCallback(rank=4, gamma=1.0)
        trainer = new_trainer(tmp_path, OnFirst(), callback, strategy="ddp", devices=2, max_epochs=1)
        trainer.fit(TinyClassifier(), batches(2))
        return callback.history

    first, second = in_processes(2, tmp_path, work)
    assert first == second
    assert first[0][1] == [3, 3, 3]
