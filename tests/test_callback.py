"""LaLoraCallback in whole Trainer runs."""

import copy
import csv
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lalora_lightning import LaLoraCallback, RankAllocator, add_lora, load_lora_state_dict, lora_layers, merge_lora
from tests.conftest import TinyTransformer


class Task(pl.LightningModule):
    """What a user brings: a model, a loss, an optimizer; nothing of La-LoRA."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.model = TinyTransformer()
        self.lr = lr
        self.optimizer_steps = 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.model(x), y)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test/loss", self.training_step(batch, batch_idx))

    def optimizer_step(self, *args: object, **kwargs: object) -> None:
        super().optimizer_step(*args, **kwargs)
        self.optimizer_steps += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def loader(batches: int = 7) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4 * batches, 5, 8, generator=generator)
    return DataLoader(TensorDataset(x, (x.mean((1, 2)) > 0).long()), batch_size=4)


def new_trainer(folder: Path, *callbacks: pl.Callback, **settings: object) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=folder,
        callbacks=list(callbacks),
        **{
            "max_epochs": 3,
            "accelerator": "cpu",
            "logger": False,
            "log_every_n_steps": 1,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **settings,
        },
    )


def test_the_callback_alone_is_all_it_takes(tmp_path: Path):
    module, callback = Task(), LaLoraCallback(rank=4, gamma=3.0)
    frozen = module.model.blocks[0].key.weight.clone()
    head = module.model.head.weight.clone()
    new_trainer(tmp_path, callback).fit(module, loader(), loader(2))
    layers = lora_layers(module)
    assert len(layers) == 6
    assert all(layer.lora_B.any() for layer in layers.values())
    assert torch.equal(module.model.blocks[0].key.weight, frozen)
    assert not torch.equal(module.model.head.weight, head)
    # The budget grows from one rank a layer, and the layers hold what the allocator decided.
    assert callback.history[0] == (0, [1, 1, 1], 3.0)
    step, ranks, budget = callback.history[-1]
    assert step == 21
    assert sum(ranks) > 3
    assert sum(ranks) <= budget <= 12
    assert [int(layers[f"model.blocks.{i}.value"].rank) for i in range(3)] == ranks


def test_it_acts_once_per_optimizer_step_when_gradients_accumulate(tmp_path: Path):
    """7 batches with accumulation over 3 are 3 optimizer steps an epoch: after batches 3, 6 and, short, 7."""
    module, callback = Task(), LaLoraCallback(rank=4)
    new_trainer(tmp_path, callback, accumulate_grad_batches=3, max_epochs=2).fit(module, loader(7))
    assert module.optimizer_steps == 6
    assert callback.allocator.steps == 6
    assert [step for step, _, _ in callback.history] == list(range(7))


def test_a_training_step_that_returns_none_changes_no_rank(tmp_path: Path):
    """Lightning counts such a batch as a step, with which the optimizer does nothing."""

    class Skipping(Task):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
            return None if batch_idx > 3 else super().training_step(batch, batch_idx)

    callback = LaLoraCallback(rank=4, gamma=3.0)
    trainer = new_trainer(tmp_path, callback, max_epochs=1)
    trainer.fit(Skipping(), loader(7))
    assert callback.allocator.steps == trainer.global_step == 7
    decisions = [(ranks, budget) for _, ranks, budget in callback.history]
    assert len(set(map(str, decisions[:5]))) == 5
    assert decisions[4] == decisions[5] == decisions[6] == decisions[7]


def test_two_loggers_hold_the_keys(tmp_path: Path):
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tb")]
    callback = LaLoraCallback(rank=4, gamma=3.0)
    new_trainer(tmp_path, callback, logger=loggers, log_every_n_steps=5).fit(Task(), loader())
    keys = {f"rank/model.blocks.{i}" for i in range(3)} | {"rank/total", "rank/budget"}

    with open(Path(loggers[0].log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert keys <= set(rows[0])
    # 21 steps, counted from zero as Lightning does: every fifth, and the last.
    assert [int(row["step"]) for row in rows] == [4, 9, 14, 19, 20]
    for row, (step, ranks, budget) in zip(rows, callback.history[1:], strict=True):
        assert int(row["step"]) == step - 1
        assert [float(row[f"rank/model.blocks.{i}"]) for i in range(3)] == ranks
        assert float(row["rank/total"]) == sum(ranks)
        assert float(row["rank/budget"]) == pytest.approx(budget)

    events = EventAccumulator(loggers[1].log_dir).Reload()
    assert keys <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("rank/total")] == [4, 9, 14, 19, 20]
    assert "rank/trajectories" in events.Tags()["images"]


def test_the_total_rank_is_in_the_progress_bar(tmp_path: Path):
    callback = LaLoraCallback(rank=4, gamma=3.0)
    trainer = new_trainer(tmp_path, callback)
    trainer.fit(Task(), loader())
    assert trainer.progress_bar_metrics["rank/total"] == sum(callback.history[-1][1])


def test_numbers_are_asked_from_the_device_at_logging_steps_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    callback = LaLoraCallback(rank=4)
    read = callback._read
    reads = []
    monkeypatch.setattr(callback, "_read", lambda trainer: reads.append(trainer.global_step) or read(trainer))
    new_trainer(tmp_path, callback, log_every_n_steps=10).fit(Task(), loader())
    # At the start, every tenth step, and the last.
    assert reads == [0, 10, 20, 21]


def test_layers_that_are_there_already_are_used(tmp_path: Path):
    module, callback = Task(), LaLoraCallback()
    add_lora(module, rank=2, target_modules=["key"])
    new_trainer(tmp_path, callback, max_epochs=1).fit(module, loader())
    assert callback.allocator.max_rank == 2
    assert list(lora_layers(module)) == [f"model.blocks.{i}.key" for i in range(3)]


def test_a_model_built_in_configure_model_is_adapted_there(tmp_path: Path):
    class Late(Task):
        def __init__(self) -> None:
            super().__init__()
            self.model = None

        def configure_model(self) -> None:
            if self.model is None:
                self.model = TinyTransformer()
                add_lora(self, rank=4)

    class LateWithALinear(Late):
        def __init__(self) -> None:
            super().__init__()
            self.probe = nn.Linear(3, 3)

        def configure_model(self) -> None:
            if self.model is None:
                self.model = TinyTransformer()
                add_lora(self, rank=4, modules_to_save=["head"])

    new_trainer(tmp_path, LaLoraCallback(), max_epochs=1).fit(LateWithALinear(), loader())
    callback = LaLoraCallback()
    new_trainer(tmp_path, callback, max_epochs=1).fit(Late(), loader())
    assert callback.allocator.steps == 7

    class TooLate(Late):
        def configure_model(self) -> None:
            self.model = TinyTransformer()

    with pytest.raises(RuntimeError, match=r"add_lora\(self\) at the end.* seen: model\.blocks\.0\.query to "):
        new_trainer(tmp_path, LaLoraCallback()).fit(TooLate(), loader())


def test_adapters_that_no_optimizer_holds_are_an_error(tmp_path: Path):
    class HeadOnly(Task):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.model.head.parameters(), lr=0.1)

    with pytest.raises(RuntimeError, match=r"lack 12, model\.blocks\.0\.query\.lora_A the first"):
        new_trainer(tmp_path, LaLoraCallback(rank=4)).fit(HeadOnly(), loader())


class Dropping(Task):
    """With dropout, as most backbones have it."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return super().training_step([nn.functional.dropout(x, 0.2), y], batch_idx)


@pytest.mark.parametrize("save_adapter_only", [False, True])
@pytest.mark.parametrize("contribution", ["norm", "fisher"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, contribution: str, save_adapter_only: bool
):
    """Also the rows of a batch, which are drawn at random, and what dropout drops."""

    def start(epochs: int) -> tuple[Task, LaLoraCallback, pl.Trainer]:
        torch.manual_seed(1)
        callback = LaLoraCallback(
            rank=4, gamma=3.0, contribution=contribution, save_adapter_only=save_adapter_only, dropout=0.1
        )
        return Dropping(), callback, new_trainer(tmp_path, callback, max_epochs=epochs)

    shuffled = DataLoader(loader().dataset, batch_size=4, shuffle=True)
    whole, whole_callback, trainer = start(4)
    trainer.fit(whole, shuffled, loader(2))

    first, _, trainer = start(2)
    trainer.fit(first, shuffled, loader(2))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    half = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert ("model.blocks.0.key.weight" in half["state_dict"]) is not save_adapter_only

    second, second_callback, trainer = start(4)
    trainer.fit(second, shuffled, loader(2), ckpt_path=tmp_path / "half.ckpt")

    assert second_callback.history == whole_callback.history
    assert second_callback.allocator.steps == whole_callback.allocator.steps == 28
    for resumed, uninterrupted in zip(second.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(resumed, uninterrupted)


def test_a_checkpoint_is_tested_by_a_fresh_module(tmp_path: Path):
    pl.seed_everything(0)
    module = Task()
    trainer = new_trainer(tmp_path, LaLoraCallback(rank=4, gamma=3.0, save_adapter_only=True))
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    expected = trainer.test(module, loader(3), verbose=False)
    pl.seed_everything(0)  # the same backbone again
    got = new_trainer(tmp_path, LaLoraCallback(rank=4, save_adapter_only=True)).test(
        Task(), loader(3), ckpt_path=tmp_path / "end.ckpt", verbose=False
    )
    assert got == expected


def test_all_keys_an_adapter_checkpoint_lacks_or_has_too_many_are_named(tmp_path: Path):
    trainer = new_trainer(tmp_path, LaLoraCallback(rank=4, save_adapter_only=True), max_epochs=1)
    trainer.fit(Task(), loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    state = checkpoint["state_dict"]
    del state["model.blocks.1.value.lora_A"], state["model.head.bias"]
    state["model.blocks.9.value.lora_A"] = torch.zeros(4, 8)
    torch.save(checkpoint, tmp_path / "end.ckpt")
    for method in ("fit", "test"):
        run = getattr(new_trainer(tmp_path, LaLoraCallback(rank=4)), method)
        with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.1\.value\.lora_A.*head\.bias") as error:
            run(Task(), loader(), ckpt_path=tmp_path / "end.ckpt")
        assert "blocks.9.value.lora_A" in str(error.value)
        assert "key.weight" not in str(error.value)


def test_a_checkpoint_that_lacks_some_of_the_backbone_is_an_error(tmp_path: Path):
    trainer = new_trainer(tmp_path, LaLoraCallback(rank=4), max_epochs=1)
    trainer.fit(Task(), loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    del checkpoint["state_dict"]["model.blocks.1.key.weight"]
    torch.save(checkpoint, tmp_path / "end.ckpt")
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.1\.key\.weight"):
        new_trainer(tmp_path, LaLoraCallback(rank=4, save_adapter_only=True)).test(
            Task(), loader(), ckpt_path=tmp_path / "end.ckpt"
        )


@pytest.mark.parametrize("method", ["fit", "test"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, method: str):
    trainer = new_trainer(tmp_path, LaLoraCallback(rank=4), max_epochs=1)
    trainer.fit(Task(), loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    weights = trainer.lightning_module.model.blocks[0].key.weight.detach().numpy().tobytes()
    content = (tmp_path / "end.ckpt").read_bytes()
    (tmp_path / "end.ckpt").write_bytes(content.replace(weights, weights[:-1] + b"\0"))
    with pytest.raises(ValueError, match=r"Expected .*end\.ckpt to be as it was written but it is damaged"):
        getattr(new_trainer(tmp_path, LaLoraCallback(rank=4)), method)(
            Task(), loader(), ckpt_path=tmp_path / "end.ckpt"
        )


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("save_adapter_only", [False, True])
def test_a_checkpoint_goes_into_a_plain_module(tmp_path: Path, save_adapter_only: bool, weights_only: bool):
    module = Task()
    trainer = new_trainer(tmp_path, LaLoraCallback(rank=4, alpha=5.0, gamma=3.0, save_adapter_only=save_adapter_only))
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt", weights_only)
    state = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    assert ("model.blocks.0.key.weight" in state) is not save_adapter_only
    torch.manual_seed(0)  # the same backbone again
    plain = Task()
    load_lora_state_dict(plain, tmp_path / "end.ckpt")
    x = torch.randn(2, 5, 8)
    assert torch.equal(plain.model(x), module.model(x))


def test_a_module_that_adapts_itself_is_loaded_from_an_adapter_checkpoint(tmp_path: Path):
    class Adapted(Task):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = TinyTransformer()
            add_lora(self, rank=4)

    module = Adapted()
    trainer = new_trainer(tmp_path, LaLoraCallback(gamma=3.0, save_adapter_only=True))
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    loaded = Adapted.load_from_checkpoint(tmp_path / "end.ckpt", strict=False)
    for got, expected in zip(loaded.state_dict().values(), module.state_dict().values(), strict=True):
        assert torch.equal(got, expected)


def test_a_test_of_an_old_checkpoint_is_no_part_of_the_run(tmp_path: Path):
    """Weights and ranks go back to it, as asked; steps are counted, and rows drawn, as before."""
    module, callback = Task(), LaLoraCallback(rank=4, gamma=3.0)
    trainer = new_trainer(tmp_path, callback, max_epochs=1)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "seven.ckpt")
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    trainer.test(module, loader(1), ckpt_path=tmp_path / "seven.ckpt", verbose=False)
    assert callback.allocator.steps == 7
    trainer.fit_loop.max_epochs = 3
    torch.manual_seed(5)
    expected = torch.rand(1)

    class Draw(pl.Callback):
        def on_fit_start(self, *args: object) -> None:
            self.drawn = torch.rand(1)

    draw = Draw()
    trainer.callbacks.append(draw)
    torch.manual_seed(5)
    trainer.fit(module, loader())
    assert callback.allocator.steps == 7 + 7
    assert torch.equal(draw.drawn, expected)


def test_a_state_given_before_fit_is_taken_up(tmp_path: Path):
    module, callback = Task(), LaLoraCallback(rank=4, gamma=3.0)
    new_trainer(tmp_path, callback).fit(module, loader())
    again = LaLoraCallback(rank=4, gamma=0.0)
    again.load_state_dict(callback.state_dict())
    new_trainer(tmp_path, again, max_epochs=1).fit(module, loader())
    assert again.allocator.steps == 28
    assert again.allocator.budget == callback.allocator.budget


def test_a_strategy_that_trains_copies_in_other_processes_needs_an_adapted_module(tmp_path: Path):
    module = Task()
    trainer = new_trainer(tmp_path, LaLoraCallback(rank=4), strategy="ddp_fork", devices=1)
    with pytest.raises(Exception, match=r"call add_lora\(module\) before fit"):
        trainer.fit(module, loader())


def test_a_fitted_module_can_be_copied_and_pickled(tmp_path: Path):
    module = Task()
    new_trainer(tmp_path, LaLoraCallback(rank=4, save_adapter_only=True), max_epochs=1).fit(module, loader())
    torch.save(module, tmp_path / "module")
    x = torch.randn(2, 5, 8)
    for copied in (copy.deepcopy(module), torch.load(tmp_path / "module", weights_only=False)):
        assert torch.equal(copied.model(x), module.model(x))
        assert copied.on_save_checkpoint.args[0] is copied
        copied._trainer = None
        copied.on_save_checkpoint({})


def test_a_step_that_was_saved_before_the_callbacks_turn_is_made_up_for(tmp_path: Path):
    """A callback in front saves a checkpoint after the optimizer step and before the allocator acts, then fails."""

    class Saver(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
            if trainer.global_step == 10:
                trainer.save_checkpoint(tmp_path / "ten.ckpt")
                raise InterruptedError

    def start() -> tuple[Task, LaLoraCallback]:
        torch.manual_seed(1)
        return Task(), LaLoraCallback(rank=4, gamma=3.0)

    whole, whole_callback = start()
    new_trainer(tmp_path, whole_callback, max_epochs=1).fit(whole, loader(20))

    module, callback = start()
    with pytest.raises(InterruptedError):
        new_trainer(tmp_path, Saver(), callback, max_epochs=1).fit(module, loader(20))
    assert callback.allocator.steps == 9
    module, callback = start()

    class Stop(pl.Callback):
        def on_train_batch_start(self, *args: object) -> None:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        new_trainer(tmp_path, callback, Stop(), max_epochs=1).fit(module, loader(20), ckpt_path=tmp_path / "ten.ckpt")
    assert callback.allocator.steps == 10
    assert callback.history == whole_callback.history[:11]


def test_fit_called_twice_goes_on(tmp_path: Path):
    module, callback = Task(), LaLoraCallback(rank=4, gamma=3.0)
    trainer = new_trainer(tmp_path, callback, max_epochs=1)
    trainer.fit(module, loader())
    allocator = callback.allocator
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    assert callback.allocator is allocator
    assert allocator.steps == 14
    assert [step for step, _, _ in callback.history] == list(range(15))


def test_another_module_gets_its_own_allocator(tmp_path: Path):
    callback = LaLoraCallback(rank=4, gamma=3.0)
    new_trainer(tmp_path, callback, max_epochs=1).fit(Task(), loader())
    first = callback.allocator
    new_trainer(tmp_path, callback, max_epochs=1).fit(Task(), loader())
    assert callback.allocator is not first
    assert callback.allocator.steps == 7
    assert [step for step, _, _ in callback.history] == list(range(8))


def test_layers_put_in_anew_get_their_own_allocator(tmp_path: Path):
    module, callback = Task(), LaLoraCallback(rank=4, gamma=3.0)
    new_trainer(tmp_path, callback).fit(module, loader())
    merge_lora(module, remove=True)
    new_trainer(tmp_path, callback, max_epochs=1).fit(module, loader())
    assert callback.allocator.steps == 7
    assert callback.history[0] == (0, [1, 1, 1], 3.0)
    assert [int(module.model.blocks[i].value.rank) for i in range(3)] == callback.allocator.ranks.tolist()


@pytest.mark.parametrize("fixed_ranks", [False, True])
def test_merged_adapters_are_not_trained(fixed_ranks: bool, tmp_path: Path):
    module, callback = Task(), LaLoraCallback(rank=4, fixed_ranks=fixed_ranks)
    new_trainer(tmp_path, callback, max_epochs=1).fit(module, loader())
    merge_lora(module)
    with pytest.raises(RuntimeError, match=r"model\.blocks\.0\.query is merged.*call unmerge_lora"):
        new_trainer(tmp_path, callback, max_epochs=1).fit(module, loader())
    with pytest.raises(RuntimeError, match=r"model\.blocks\.0\.query is merged.*call unmerge_lora"):
        RankAllocator(module)


def test_ranks_of_an_earlier_run_are_not_lost_in_silence(tmp_path: Path):
    module = Task()
    add_lora(module, rank=4)
    trainer = new_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "lora.ckpt")
    with pytest.raises(ValueError, match=r"lora\.ckpt to be of a run with LaLoraCallback but it has none of its state"):
        new_trainer(tmp_path, LaLoraCallback(rank=4)).fit(Task(), loader(), ckpt_path=tmp_path / "lora.ckpt")

    module = Task()
    load_lora_state_dict(module, tmp_path / "lora.ckpt")
    with pytest.warns(UserWarning, match="trained already, and their ranks start anew"):
        new_trainer(tmp_path, LaLoraCallback(rank=4), max_epochs=1).fit(module, loader())


def test_a_checkpoint_is_restored_into_the_module_that_is_fitted_and_into_no_other(tmp_path: Path):
    first, second = Task(), Task()
    callback = LaLoraCallback(rank=4, gamma=3.0)
    trainer = new_trainer(tmp_path, callback, max_epochs=2)
    trainer.fit(first, loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    trained = callback.allocator.state_dict()
    for layer in lora_layers(first).values():
        layer.set_rank(1)

    new_trainer(tmp_path, callback, max_epochs=2).fit(second, loader(), ckpt_path=tmp_path / "end.ckpt")
    assert callback.allocator.ranks.tolist() == trained["ranks"].tolist()
    assert callback.allocator.steps == 14
    assert [int(second.model.blocks[i].query.rank) for i in range(3)] == trained["ranks"].tolist()
    assert all(int(layer.rank) == 1 for layer in lora_layers(first).values())


def test_a_checkpoint_that_was_tested_is_no_part_of_another_modules_fit(tmp_path: Path):
    callback = LaLoraCallback(rank=4, gamma=3.0)
    trainer = new_trainer(tmp_path, callback, max_epochs=2)
    trainer.fit(Task(), loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")

    callback = LaLoraCallback(rank=4, gamma=3.0)
    new_trainer(tmp_path, callback).test(Task(), loader(), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    new_trainer(tmp_path, callback, max_epochs=1).fit(Task(), loader())
    assert callback.allocator.steps == 7


def test_a_second_fit_by_another_trainer_draws_one_rising_history(tmp_path: Path):
    module, callback = Task(), LaLoraCallback(rank=4)
    for _ in range(2):
        new_trainer(tmp_path, callback, max_epochs=1).fit(module, loader())
    assert [step for step, _, _ in callback.history] == list(range(8))
    # Another Trainer counts from zero: its first batches are no step, though the last step acted on was the seventh.
    new_trainer(tmp_path, callback, max_epochs=1, accumulate_grad_batches=3).fit(module, loader())
    assert callback.allocator.steps == 7 + 7 + 3


def test_averaging_leaves_the_ranks_alone(tmp_path: Path):
    module, callback = Task(), LaLoraCallback(rank=4, gamma=3.0)
    new_trainer(tmp_path, callback, WeightAveraging(use_buffers=False)).fit(module, loader(), loader(2))
    ranks = callback.allocator.ranks.tolist()
    assert sum(ranks) > 3
    assert [int(module.model.blocks[i].query.rank) for i in range(3)] == ranks
    for i, rank in enumerate(ranks):
        assert module.model.blocks[i].query.rank_mask.tolist() == [k < rank for k in range(4)]


def test_stochastic_weight_averaging_averages_the_adapters(tmp_path: Path):
    class Recorder(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.seen.append(pl_module.model.blocks[0].query.lora_B.detach().clone())

    module, callback, recorder = Task(), LaLoraCallback(rank=4, gamma=3.0), Recorder()
    averaging = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2, annealing_epochs=1)
    new_trainer(tmp_path, callback, recorder, averaging, max_epochs=3).fit(module, loader())
    # It takes the weights at the start of the second and the third epoch.
    average = (recorder.seen[0] + recorder.seen[1]) / 2
    torch.testing.assert_close(module.model.blocks[0].query.lora_B.detach(), average)
    assert [int(module.model.blocks[i].query.rank) for i in range(3)] == callback.allocator.ranks.tolist()


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([LaLoraCallback(rank=4), WeightAveraging()], "has use_buffers=True; give it use_buffers=False"),
        ([WeightAveraging(use_buffers=False), LaLoraCallback(rank=4)], "to come after LaLoraCallback"),
        ([StochasticWeightAveraging(1e-3), LaLoraCallback(rank=4)], "to come after LaLoraCallback"),
        (
            [LaLoraCallback(rank=4, save_adapter_only=True), WeightAveraging(use_buffers=False)],
            "Expected save_adapter_only=False with WeightAveraging",
        ),
    ],
)
def test_averaging_that_cannot_work_is_refused(tmp_path: Path, callbacks: list[pl.Callback], message: str):
    module = Task()
    with pytest.raises(ValueError, match=message):
        new_trainer(tmp_path, *callbacks).fit(module, loader())


def test_freeze_after_a_fraction_of_the_run(tmp_path: Path):
    callback = LaLoraCallback(rank=4, gamma=3.0, freeze_after=0.5)
    new_trainer(tmp_path, callback, max_epochs=2).fit(Task(), loader())
    assert callback.allocator.settings.freeze_after == 7
    ranks = [ranks for _, ranks, _ in callback.history]
    assert ranks[7:] == [ranks[7]] * 8
    with pytest.raises(ValueError, match="run of known length"):
        new_trainer(tmp_path, LaLoraCallback(rank=4, freeze_after=0.5), max_epochs=-1, max_time="00:00:00:01").fit(
            Task(), loader()
        )


def test_weights_that_are_not_finite_are_reported_and_change_no_rank(tmp_path: Path):
    class Diverging(Task):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            if self.global_step >= 10:
                self.model.blocks[0].query.lora_B.grad.fill_(float("nan"))

    module, callback = Diverging(), LaLoraCallback(rank=4, gamma=3.0)
    trainer = new_trainer(tmp_path, callback, log_every_n_steps=7)
    with pytest.warns(UserWarning, match="4 optimizer steps since the last report left weights that are NaN or Inf"):
        trainer.fit(module, loader())
    steps, ranks, budgets = zip(*callback.history, strict=True)
    assert steps == (0, 7, 14, 21)
    assert ranks[2] == ranks[3]
    assert budgets[2] == budgets[3]
    assert callback.allocator.skipped == 11
    trainer.save_checkpoint(tmp_path / "diverged.ckpt")
    again = LaLoraCallback(rank=4)
    new_trainer(tmp_path, again, max_epochs=4).fit(Task(), loader(), ckpt_path=tmp_path / "diverged.ckpt")
    assert again.allocator.ranks.tolist() == ranks[3]


def test_history_stays_short_and_keeps_its_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lalora_lightning.callback.history.MAX_READINGS", 10)
    callback = LaLoraCallback(rank=4)
    new_trainer(tmp_path, callback).fit(Task(), loader())
    steps = [step for step, _, _ in callback.history]
    assert len(steps) <= 10
    assert steps[0] == 0
    assert steps[-1] == 21
    assert steps == sorted(steps)


def test_plot_before_fit():
    with pytest.raises(RuntimeError, match="fit has not started"):
        LaLoraCallback().plot()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": -1.0}, "gamma"),
        ({"growth": "letter"}, "growth"),
        ({"contribution": "fisher", "contribution_scale": "absolute"}, "contribution_scale"),
        ({"freeze_after": 1.5}, r"a fraction in \[0, 1\] but got 1.5"),
        ({"interval": 0}, "interval"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        LaLoraCallback(**arguments)


def test_a_module_without_targets_is_refused_before_training(tmp_path: Path):
    class Plain(Task):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Flatten(), nn.Linear(40, 2))

    with pytest.raises(ValueError, match=r"Linear layers seen: model\.1\."):
        new_trainer(tmp_path, LaLoraCallback()).fit(Plain(), loader())


@pytest.mark.parametrize(
    ("fixed_ranks", "ranks"), [(True, [4, 4, 4]), ({"blocks.0": 1, "blocks.2": 3}, [1, 4, 3])], ids=["LoRA", "pattern"]
)
def test_fixed_ranks_train_and_are_never_touched(fixed_ranks, ranks, tmp_path):
    task, callback = Task(), LaLoraCallback(rank=4, fixed_ranks=fixed_ranks, save_adapter_only=True)
    trainer = new_trainer(tmp_path, callback, logger=CSVLogger(tmp_path))
    trainer.fit(task, loader())
    assert callback.allocator is None
    assert [int(task.model.blocks[i].query.rank) for i in range(3)] == ranks
    assert [task.model.blocks[i].query.max_rank for i in range(3)] == ranks
    assert all(layer.lora_B.any() for layer in lora_layers(task).values())
    trainer.save_checkpoint(tmp_path / "whole.ckpt")

    resumed = Task()
    again = LaLoraCallback(rank=4, fixed_ranks=fixed_ranks)
    new_trainer(tmp_path / "resumed", again, max_epochs=4).fit(resumed, loader(), ckpt_path=tmp_path / "whole.ckpt")
    assert [int(resumed.model.blocks[i].query.rank) for i in range(3)] == ranks


def test_variants_reach_the_layers(tmp_path):
    task = Task()
    callback = LaLoraCallback(rank=4, init="pissa", use_rslora=True, freeze_A=True)
    new_trainer(tmp_path, callback).fit(task, loader())
    layer = task.model.blocks[0].query
    assert (layer.init, layer.scaling) == ("pissa", 8.0)
    assert torch.equal(layer.lora_A, layer.start_A)
    assert not torch.equal(layer.lora_B, layer.start_B)


@pytest.mark.parametrize("settings", [{}, {"dropout": 0.2}], ids=["plain", "dropout"])
def test_a_run_at_fixed_ranks_resumes_as_if_it_had_never_stopped(settings, tmp_path):
    def run(folder, epochs, ckpt_path=None):
        torch.manual_seed(0)
        task, callback = Task(), LaLoraCallback(rank=4, fixed_ranks=True, **settings)
        trainer = new_trainer(folder, callback, max_epochs=epochs)
        trainer.fit(task, DataLoader(loader().dataset, batch_size=4, shuffle=True), ckpt_path=ckpt_path)
        return trainer, task

    _, whole = run(tmp_path, 4)
    trainer, _ = run(tmp_path, 2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = run(tmp_path, 4, tmp_path / "half.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_fixed_ranks_are_the_maximum_after_a_run_at_adaptive_ones(tmp_path):
    task = Task()
    new_trainer(tmp_path, LaLoraCallback(rank=4, gamma=0.0)).fit(task, loader())
    assert {int(layer.rank) for layer in lora_layers(task).values()} == {1}
    callback = LaLoraCallback(rank=4, fixed_ranks=True)
    new_trainer(tmp_path, callback).fit(task, loader())
    assert {int(layer.rank) for layer in lora_layers(task).values()} == {4}
    with pytest.raises(RuntimeError, match="its ranks are fixed"):
        callback.plot()


@pytest.mark.parametrize("fixed", [False, True])
def test_a_checkpoint_of_adaptive_ranks_is_none_of_fixed_ones(fixed, tmp_path):
    trainer = new_trainer(tmp_path, LaLoraCallback(rank=4, fixed_ranks=not fixed))
    trainer.fit(Task(), loader())
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="set fixed_ranks as in that run"):
        new_trainer(tmp_path, LaLoraCallback(rank=4, fixed_ranks=fixed)).fit(
            Task(), loader(), ckpt_path=tmp_path / "other.ckpt"
        )


def test_a_pattern_needs_a_module_that_is_not_adapted_yet(tmp_path):
    task = Task()
    add_lora(task, rank=4)
    with pytest.raises(ValueError, match="give the pattern to add_lora as rank_pattern"):
        new_trainer(tmp_path, LaLoraCallback(rank=4, fixed_ranks={"blocks.1": 2})).fit(task, loader())
    callback = LaLoraCallback(rank=4, fixed_ranks={"blocks.1": 2})
    task = Task()
    for _ in range(2):
        # Its own layers are no other's.
        new_trainer(tmp_path, callback).fit(task, loader())
    assert task.model.blocks[1].query.max_rank == 2
