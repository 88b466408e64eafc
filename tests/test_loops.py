"""The same batches and seed in four kinds of loop: the ranks of every step are the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

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
