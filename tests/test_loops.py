"""The same batches and seed in four kinds of loop: the ranks of every step are the same."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from lalora_lightning import LaLoraCallback, RankAllocator, add_lora, lora_layers
from lalora_lightning.transformers_trainer import LaLoraTrainerCallback
from tests.helpers.models import TinyTransformer
from tests.helpers.training import TinyClassifier, loader, new_trainer


def by_trainer(folder: Path) -> list[list[int]]:
    torch.manual_seed(0)
    callback = LaLoraCallback(rank=4, gamma=1.0)
    new_trainer(folder, callback).fit(TinyClassifier(), loader())
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


class TransformersClassifier(nn.Module):
    """What transformers' Trainer asks of a model: a loss first."""

    def __init__(self) -> None:
        super().__init__()
        self.model = TinyTransformer()

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(x)
        return nn.functional.cross_entropy(logits, labels), logits


class OrderedTrainer(Trainer):
    """Takes the batches as they come, as the other loops do."""

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_dataset, batch_size=4, collate_fn=self.collate)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        return self.get_train_dataloader()

    @staticmethod
    def collate(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        x, labels = map(torch.stack, zip(*rows, strict=True))
        return {"x": x, "labels": labels}


def new_transformers_trainer(folder: Path, *callbacks: Any, **settings: Any) -> OrderedTrainer:
    torch.manual_seed(0)
    model = TransformersClassifier()
    add_lora(model, rank=4)
    arguments = TrainingArguments(
        folder,
        **{
            "num_train_epochs": 3,
            "learning_rate": 0.05,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.01,
            "max_grad_norm": 0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            **settings,
        },
    )
    rows = loader().dataset
    return OrderedTrainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=list(callbacks))


def logged_ranks(trainer: Trainer) -> list[list[int]]:
    names = [f"rank/model.blocks.{i}" for i in range(3)]
    return [[int(log[name]) for name in names] for log in trainer.state.log_history if "loss" in log]


def test_transformers_trainer_gives_the_same_ranks(tmp_path: Path):
    callback = LaLoraTrainerCallback(gamma=1.0)
    trainer = new_transformers_trainer(tmp_path, callback)
    trainer.train()
    assert logged_ranks(trainer) == by_hand(None)
    last = trainer.state.log_history[-2]
    assert last["rank/total"] == sum(logged_ranks(trainer)[-1])
    assert last["rank/budget"] == float(callback.allocator.budget)


def test_transformers_trainer_logs_every_change_at_its_step(tmp_path: Path):
    """Also of a run that is saved, stopped and resumed between two logs."""

    def logged(callback: LaLoraTrainerCallback, resume: bool, **settings: Any) -> dict[int, list[int]]:
        trainer = new_transformers_trainer(tmp_path, callback, **settings)
        trainer.train(resume_from_checkpoint=resume)
        logs = trainer.state.log_history
        assert [log["step"] for log in logs] == sorted(log["step"] for log in logs)
        names = [f"rank/model.blocks.{i}" for i in range(3)]
        return {log["step"]: [int(log[name]) for name in names] for log in logs if names[0] in log}

    expected = by_hand(None)
    changes = {i + 1: ranks for i, ranks in enumerate(expected) if i > 0 and ranks != expected[i - 1]}
    assert len(changes) > 4
    callback = LaLoraTrainerCallback(gamma=1.0)
    whole = logged(callback, False, logging_steps=20)
    assert changes.items() <= whole.items()
    assert [ranks for _, ranks, _ in callback.history] == expected
    assert callback.plot().axes

    logged(LaLoraTrainerCallback(gamma=1.0), False, logging_steps=20, num_train_epochs=2, save_strategy="epoch")
    again = LaLoraTrainerCallback(gamma=1.0)
    resumed = logged(again, True, logging_steps=20)
    assert changes.items() <= resumed.items()
    assert again.history == callback.history


def test_logs_of_transformers_trainer_are_in_order_between_evaluations(tmp_path: Path):
    """At every moment; and the Trainer's own logs stay behind those of the same step, its summary the last one."""
    seen = []

    class Reader(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append([log["step"] for log in state.log_history])
            assert "step" not in kwargs["logs"]

    settings = {"logging_steps": 10, "eval_strategy": "steps", "eval_steps": 3}
    trainer = new_transformers_trainer(tmp_path, LaLoraTrainerCallback(gamma=1.0), Reader(), **settings)
    trainer.train()
    assert len(seen) > 9
    assert all(steps == sorted(steps) for steps in seen)
    assert trainer.state.log_history[-2]["step"] == 21
    assert "rank/total" in trainer.state.log_history[-3]
    assert "train_loss" in trainer.state.log_history[-1]


def test_steps_of_an_interrupted_run_are_not_logged_in_the_next(tmp_path: Path):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 7:
                raise KeyboardInterrupt

    trainer = new_transformers_trainer(tmp_path, LaLoraTrainerCallback(gamma=1.0), Interrupt(), logging_steps=5)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.pop_callback(Interrupt)
    trainer.train()
    steps = [log["step"] for log in trainer.state.log_history if "rank/total" in log]
    assert steps == sorted(set(steps))


def test_a_loss_that_is_logged_before_the_first_step_has_the_initial_ranks(tmp_path: Path):
    class Talkative(OrderedTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.log({"loss": 1.0})
            return super().compute_loss(*args, **kwargs)

    trainer = new_transformers_trainer(tmp_path, LaLoraTrainerCallback(), max_steps=2)
    trainer.__class__ = Talkative
    trainer.train()
    assert trainer.state.log_history[0]["step"] == 0
    assert trainer.state.log_history[0]["rank/total"] == 3


def test_the_last_step_keeps_its_ranks_if_the_best_model_is_loaded(tmp_path: Path):
    """No checkpoint was saved at this step, so its ranks are read after the Trainer has loaded an earlier one."""
    callback = LaLoraTrainerCallback(gamma=1.0)
    settings = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "best", "logging_steps": 20}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = new_transformers_trainer(tmp_path, callback, **settings, **best)
    trainer.train()
    if trainer.state.best_model_checkpoint is None:
        pytest.skip('Transformers 4.56 loads no model at the end with save_strategy="best".')
    assert callback.allocator.read()[0] == by_hand(None)[2]
    assert callback.history[-1][:2] == (21, by_hand(None)[-1])


def test_transformers_trainer_acts_once_per_optimizer_step(tmp_path: Path):
    callback = LaLoraTrainerCallback(gamma=1.0)
    trainer = new_transformers_trainer(tmp_path, callback, gradient_accumulation_steps=3)
    trainer.train()
    # 7 batches, 3 to a step: 3 steps an epoch.
    assert callback.allocator.steps == trainer.state.global_step == 9


@pytest.mark.parametrize("contribution", ["norm", "fisher"])
@pytest.mark.parametrize("told", [False, True])
def test_transformers_trainer_resumes_as_if_it_had_never_stopped(tmp_path: Path, contribution: str, told: bool):
    def run(folder: Path, epochs: int, resume: bool = False) -> OrderedTrainer:
        trainer = new_transformers_trainer(
            folder,
            LaLoraTrainerCallback(gamma=1.0, contribution=contribution),
            num_train_epochs=epochs,
            save_strategy="epoch",
            restore_callback_states_from_checkpoint=told,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole", 3)
    run(tmp_path / "parts", 2)
    resumed = run(tmp_path / "parts", 3, resume=True)
    assert logged_ranks(resumed) == logged_ranks(whole)
    for own, other in zip(lora_layers(resumed.model).values(), lora_layers(whole.model).values(), strict=True):
        assert torch.equal(own.lora_B, other.lora_B)
        assert torch.equal(own.rank, other.rank)


def test_transformers_trainer_saves_and_resumes_with_a_grouping_function(tmp_path: Path):
    for epochs in (1, 2):
        callback = LaLoraTrainerCallback(group_by=lambda name: name.rpartition(".")[2])
        trainer = new_transformers_trainer(tmp_path, callback, num_train_epochs=epochs, save_strategy="epoch")
        trainer.train(resume_from_checkpoint=epochs == 2)
    assert callback.allocator.layer_names == ["query", "value"]
    assert callback.allocator.steps == 14


def test_transformers_trainer_resumes_only_its_own_runs(tmp_path: Path):
    new_transformers_trainer(tmp_path, num_train_epochs=1, save_strategy="epoch").train()
    trainer = new_transformers_trainer(tmp_path, LaLoraTrainerCallback(), num_train_epochs=2)
    with pytest.raises(ValueError, match=r"checkpoint of a run with LaLoraTrainerCallback"):
        trainer.train(resume_from_checkpoint=True)


def test_transformers_trainer_needs_an_adapted_model(tmp_path: Path):
    trainer = Trainer(
        TransformersClassifier(), TrainingArguments(tmp_path, use_cpu=True), train_dataset=loader().dataset
    )
    trainer.add_callback(LaLoraTrainerCallback())
    with pytest.raises(ValueError, match=r"call add_lora\(model\) first"):
        trainer.train()


def test_trainer_fabric_and_a_plain_loop_give_the_same_ranks(tmp_path: Path):
    expected = by_trainer(tmp_path)
    assert len(expected) == 21
    assert len(set(map(tuple, expected))) > 3
    assert by_hand(None) == expected
    assert by_hand(Fabric(accelerator="cpu", devices=1)) == expected


def test_transformers_trainer_says_that_adapters_do_not_learn(tmp_path: Path):
    trainer = new_transformers_trainer(tmp_path, LaLoraTrainerCallback(), max_steps=6)
    model = trainer.model.model
    model.blocks.register_module("0", nn.Identity())
    blocks = list(model.blocks)
    model.forward = lambda x: model.head([x := block(x) for block in blocks][-1].mean(1).detach())
    with pytest.warns(UserWarning, match="4 of 4 adapters get no gradient"):
        trainer.train()
    frozen = new_transformers_trainer(tmp_path, LaLoraTrainerCallback())
    frozen.model.model.blocks.requires_grad_(False)
    with pytest.raises(RuntimeError, match="12 of 12 factors are frozen"):
        frozen.train()


def test_a_second_call_of_transformers_train_continues(tmp_path: Path):
    callback = LaLoraTrainerCallback(gamma=1.0)
    trainer = new_transformers_trainer(tmp_path, callback)
    trainer.train()
    before, budget = logged_ranks(trainer)[-1], float(callback.allocator.budget)
    assert sum(before) > 3
    trainer.train()
    assert sum(logged_ranks(trainer)[0]) >= sum(before)
    assert callback.allocator.budget >= budget


@pytest.mark.parametrize(
    ("optim", "settings", "steps"),
    [
        ("adagrad", {"contribution": "fisher"}, [7, 14, 21]),
        ("adamw_torch", {"freeze_after": 4}, [14]),
        ("sgd", {"min_rank": 0, "condense_to": 0.5, "group_by": "module"}, [14]),
    ],
)
def test_transformers_trainer_condenses(tmp_path: Path, optim: str, settings: dict[str, Any], steps: list[int]):
    """Once, at its step; and a run that is resumed before, at and after is the run that never stopped."""

    def run(resume: Path | None, **saving: Any) -> tuple[OrderedTrainer, LaLoraTrainerCallback]:
        callback = LaLoraTrainerCallback(**{"gamma": 1.0, "condense_to": 1.5, "condense_at": 14, **settings})
        trainer = new_transformers_trainer(tmp_path, callback, num_train_epochs=4, optim=optim, **saving)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="La-LoRA")
            trainer.train(resume_from_checkpoint=resume)
        return trainer, callback

    whole, callback = run(None, save_strategy="epoch")
    budgets = [log["rank/budget"] for log in whole.state.log_history if "loss" in log]
    expected = callback.allocator.ranks.tolist()
    costs = callback.allocator.costs.tolist()
    used = sum(rank * cost for rank, cost in zip(expected, costs, strict=True))
    assert used <= callback.condense_to * len(expected)
    assert budgets[12] > budgets[13]
    assert budgets[13:] == pytest.approx([used] * 15)
    (energy,) = (log for log in whole.state.log_history if "fit/energy_kept" in log)
    assert energy["step"] == 14
    assert 0 < energy["fit/energy_kept"] < 1
    for step in steps:
        resumed, again = run(tmp_path / f"checkpoint-{step}")
        assert again.allocator.ranks.tolist() == expected
        assert energy in resumed.state.log_history
        for own, other in zip(lora_layers(resumed.model).values(), lora_layers(whole.model).values(), strict=True):
            assert torch.equal(own.lora_A, other.lora_A)
            assert torch.equal(own.lora_B, other.lora_B)
            assert torch.equal(own.rank_mask, other.rank_mask)
    # A second call goes on at these ranks.
    whole.train()
    assert callback.allocator.ranks.tolist() == expected


def test_transformers_trainer_condenses_after_a_fraction_of_its_steps(tmp_path: Path):
    callback = LaLoraTrainerCallback(gamma=1.0, condense_to=1.5, condense_at=0.5)
    trainer = new_transformers_trainer(tmp_path, callback)
    trainer.train()
    ranks = logged_ranks(trainer)
    assert ranks[8] != ranks[9]
    assert all(then == ranks[9] for then in ranks[9:])
    layers = lora_layers(trainer.model).values()
    assert sum(int(layer.rank) for layer in layers) <= 1.5 * len(layers)


def test_transformers_trainer_condenses_what_a_plain_loop_does(tmp_path: Path):
    trainer = new_transformers_trainer(tmp_path, LaLoraTrainerCallback(condense_to=1.5, condense_at=10, gamma=1.0))
    trainer.train()
    torch.manual_seed(0)
    model: nn.Module = TinyTransformer()
    add_lora(model, rank=4)
    weights = [p for p in model.parameters() if p.requires_grad and p.ndim == 2]
    groups = [{"params": weights}, {"params": [model.head.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.05, weight_decay=0.01)
    allocator = RankAllocator(model, gamma=1.0)
    for _ in range(3):
        for x, y in loader():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            allocator.step()
            if allocator.steps == 10:
                allocator.condense(1.5, [optimizer])
    for own, other in zip(lora_layers(trainer.model).values(), lora_layers(model).values(), strict=True):
        torch.testing.assert_close(own.increment(), other.increment())


def test_transformers_trainer_says_that_it_did_not_condense(tmp_path: Path):
    trainer = new_transformers_trainer(tmp_path, LaLoraTrainerCallback(condense_to=1.5, condense_at=30))
    with pytest.warns(UserWarning, match="not condensed, because the run ended at step 21; call condense_lora"):
        trainer.train()
    best = {"eval_strategy": "steps", "eval_steps": 6, "save_strategy": "steps", "save_steps": 6}
    trainer = new_transformers_trainer(
        tmp_path,
        LaLoraTrainerCallback(condense_to=1.2, condense_at=13, gamma=20.0),
        **best,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    with pytest.warns(UserWarning, match="checkpoint-6 was loaded, which is from before that step"):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"condense_to": 0.5}, "at least min_rank=1"), ({"condense_to": 2, "condense_at": 0}, "condense_at")],
)
def test_settings_of_condensing_in_transformers_trainer(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        LaLoraTrainerCallback(**settings)


def test_transformers_trainer_refuses_to_condense_initial_factors(tmp_path: Path):
    trainer = new_transformers_trainer(tmp_path, LaLoraTrainerCallback(condense_to=2))
    torch.manual_seed(0)
    trainer.model = trainer.model_wrapped = TransformersClassifier()
    add_lora(trainer.model, rank=4, init="pissa")
    with pytest.raises(ValueError, match=r"Cannot condense .* init='pissa'"):
        trainer.train()
    trainer = new_transformers_trainer(tmp_path, LaLoraTrainerCallback(condense_to=4))
    with pytest.raises(ValueError, match="below the maximum rank 4"):
        trainer.train()


def test_a_new_callback_resets_ranks_with_a_warning(tmp_path: Path):
    trainer = new_transformers_trainer(tmp_path, LaLoraTrainerCallback(gamma=1.0))
    trainer.train()
    trainer.pop_callback(LaLoraTrainerCallback)
    trainer.add_callback(LaLoraTrainerCallback(gamma=1.0))
    with pytest.warns(UserWarning, match="adapters have been trained already, and their ranks are reset"):
        trainer.train()


def test_the_best_model_that_transformers_trainer_loads_has_its_ranks(tmp_path: Path):
    callback = LaLoraTrainerCallback(gamma=1.0)
    trainer = new_transformers_trainer(
        tmp_path,
        callback,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # The model with the highest loss is an early one.
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    state = json.loads((best / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["LaLoraTrainerCallback"]["attributes"]["restored"]["ranks"]
    ranks = [int(block.query.rank) for block in trainer.model.model.blocks]
    assert ranks == saved == callback.allocator.read()[0]
    assert ranks != logged_ranks(trainer)[-1]
