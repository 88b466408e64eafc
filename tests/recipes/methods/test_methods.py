"""Every row of the registry of methods, on a text encoder and on a vision transformer of width 16 and two blocks."""

import copy
import inspect
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
)

from lalora_lightning.modules.image_classification import ImageClassificationModule
from lalora_lightning.modules.optimization import parameter_groups
from lalora_lightning.modules.task import TaskModule
from recipes import methods
from recipes.methods import METHODS, parse_method
from recipes.methods import NotApplicableError

# Width d = 16, f = 32 hidden units, 2 blocks, query and value: trainable parameters by the references' formulas.
LORA = 2 * 2 * 4 * (16 + 16)
BOTTLENECK = 2 * 16 * 4 + 4 + 16
BIASES_OF_BLOCK = 4 * 16 + 32 + 16 + 2 * 16  # attention, feed-forward network, two norms
WEIGHTS_OF_BLOCK = 4 * 16 * 16 + 2 * 16 * 32 + 2 * 16
COUNTS = {
    "lalora:rank=4": LORA,
    "lora:rank=4": LORA,
    "adalora:rank=2,init_rank=4": LORA + 2 * 2 * 4,
    "dora:rank=4": LORA + 2 * 2 * 16,
    "pissa:rank=4": LORA,
    "milora:rank=4": LORA,
    "randlora:basis_rank=4": 2 * 2 * 4 * (4 + 16),  # 16 / 4 = 4 bases
    "vera:shared_rank=8": 2 * 2 * (16 + 8),
    "lora_fa:rank=4": 2 * 2 * 4 * 16,
    "dylora:rank=4": LORA,
    # Beside the blocks: norm of the embeddings and pooler, or patches and last norm.
    "bitfit": 2 * BIASES_OF_BLOCK + 16 + 16,
    "head": 0,
    "houlsby:bottleneck=4": 2 * 2 * BOTTLENECK,
    "pfeiffer:bottleneck=4": 2 * BOTTLENECK,
    "adapterdrop:bottleneck=4,dropped=0.5": BOTTLENECK,
    "series:bottleneck=4": 2 * BOTTLENECK,
    "parallel:bottleneck=4": 2 * BOTTLENECK,
    "prefix:tokens=4": 2 * 2 * 4 * 16,
    "prompt:tokens=4": 4 * 16,
    "ia3": 2 * (16 + 16 + 32),
}
BLOCKS = 2 * (BIASES_OF_BLOCK + WEIGHTS_OF_BLOCK)
# 50 words, 64 places, 2 token types, a norm, a pooler.
FULL_TEXT = BLOCKS + (50 + 64 + 2) * 16 + 2 * 16 + 16 * 16 + 16
# Patches of 4 x 4, a class token, 5 places, a norm.
FULL_VISION = BLOCKS + 4 * 4 * 16 + 16 + 16 + 5 * 16 + 2 * 16
HEAD = 16 * 2 + 2
VIRTUAL_TOKENS = ("prefix", "prompt")


class TextModule(TaskModule):
    def __init__(self) -> None:
        super().__init__(learning_rate=2e-2, weight_decay=0.0, warmup=0.0)
        config = BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.2,
        )
        self.model: Any = BertForSequenceClassification(config).train()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss


def text() -> tuple[TaskModule, Any]:
    torch.manual_seed(0)
    batch = {
        "input_ids": torch.randint(5, 50, (8, 7)),
        "attention_mask": torch.ones(8, 7, dtype=torch.long),
        "token_type_ids": torch.zeros(8, 7, dtype=torch.long),
        "labels": torch.tensor([0, 1] * 4),
    }
    return TextModule(), batch


def vision() -> tuple[TaskModule, Any]:
    torch.manual_seed(0)
    size = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
    module = ImageClassificationModule(
        "vit_tiny_patch16_224", num_classes=2, pretrained=False, learning_rate=2e-2, model_args=size
    )
    for parameter in module.model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.2)
    return module, (torch.rand(8, 1, 8, 8), torch.tensor([0, 1] * 4))


def logits(module: TaskModule, batch: Any) -> Tensor:
    return module.model(**batch).logits if isinstance(batch, dict) else module(batch[0])


def loss(module: TaskModule, batch: Any) -> float:
    labels = batch["labels"] if isinstance(batch, dict) else batch[1]
    return F.cross_entropy(logits(module, batch), labels).item()


def fit(module: TaskModule, batch: Any, callbacks: list[pl.Callback], steps: int = 15, **arguments: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        **arguments,
    )
    trainer.fit(module, DataLoader([batch] * 100, batch_size=None))
    return trainer


def trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def applies(method: str, new: Any) -> bool:
    """Virtual tokens are for texts; prefixes only where transformers takes them as peft gives them."""
    if method == "prefix" and "past_key_values" not in inspect.signature(BertModel.forward).parameters:
        return False
    return new is text or method not in VIRTUAL_TOKENS


def test_every_method_is_tested():
    assert {spec.partition(":")[0] for spec in COUNTS} | {"full"} == set(METHODS)


@pytest.mark.parametrize("new", [text, vision])
@pytest.mark.parametrize("spec", [*COUNTS, "full"])
def test_method(spec: str, new: Any):
    method, settings = parse_method(spec)
    module, batch = new()
    if not applies(method.name, new):
        with pytest.raises(NotApplicableError, match=f"^Method {method.name} does not apply to this model because"):
            method.adapt(module, **settings)
        return
    before = logits(module, batch).detach()
    callbacks = method.adapt(module, **settings)
    if method.name not in VIRTUAL_TOKENS:
        torch.testing.assert_close(logits(module, batch), before, atol=1e-5, rtol=1e-5)
    start = loss(module, batch)
    head = {n: p.detach().clone() for n, p in module.named_parameters() if "head" in n or "classifier" in n}

    fit(module, batch, callbacks)

    expected = COUNTS.get(spec, FULL_TEXT if new is text else FULL_VISION)
    assert trainable(module) == expected + HEAD
    # A frozen original stays behind where peft trains a copy of the head.
    moved = [p for n, p in module.named_parameters() if n in head and not torch.equal(p, head[n])]
    assert sum(p.numel() for p in moved) == HEAD
    # Every part of it is reached, not only the head.
    idle = [n for n, p in module.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not idle
    module.train()
    assert loss(module, batch) < start - 0.02


def test_all_methods_start_with_the_same_head():
    heads = []
    for spec in COUNTS:
        method, settings = parse_method(spec)
        if not applies(method.name, text):
            continue
        module, _ = text()
        method.adapt(module, **settings)
        named = module.named_parameters()
        heads.append(torch.cat([p.detach().flatten() for n, p in named if "classifier" in n and "original" not in n]))
    assert all(torch.equal(head, heads[0]) for head in heads)


@pytest.mark.parametrize("new", [text, vision])
def test_adalora_allocates_after_every_optimizer_step(new: Any):
    module, batch = new()
    (callback,) = METHODS["adalora"].adapt(module, rank=2, init_rank=4)
    assert isinstance(callback, AdaLoraCallback)
    steps = []
    allocate = callback.tuner.update_and_allocate
    callback.tuner.update_and_allocate = lambda step: (steps.append(step), allocate(step))
    fit(module, batch, [callback], steps=20, accumulate_grad_batches=2)

    config = callback.tuner.peft_config["default"]
    assert steps == list(range(1, 21))
    assert (config.total_step, config.tinit, config.tfinal) == (20, 3, 10)
    # Two matrices a block at 2 of 4 triplets on average, as ranks of the blocks 2 + 2.
    ranks = layer_ranks(module)
    assert len(ranks) == 2
    assert sum(ranks.values()) == 4
    assert trimmed_parameters(module) == HEAD + 8 * (16 + 16 + 1)


def test_the_orthogonality_penalty_is_pefts():
    module, batch = text()
    (callback,) = METHODS["adalora"].adapt(module, rank=2, init_rank=4, orthogonality=0.3)
    tuner = callback.tuner
    plain = module.model(**batch).loss
    # peft's forward pass adds it to the loss of the model inside.
    tuner.model = module.model
    expected = tuner(**batch).loss - plain
    penalty = orthogonality_penalty(dict(module.named_parameters()))
    torch.testing.assert_close(0.3 * penalty, expected, atol=1e-5, rtol=1e-5)


def test_adalora_needs_ranks_to_prune():
    with pytest.raises(ValueError, match="Expected init_rank to be above the final rank of 8 but got 8"):
        METHODS["adalora"].adapt(text()[0], init_rank=8)
    with pytest.raises(ValueError, match=r"leave time to prune between them but got 0\.5 and 0\.5"):
        METHODS["adalora"].adapt(text()[0], initial=0.5)


@pytest.mark.parametrize("stopped", [9, 15])
def test_adalora_resumes_as_if_it_had_never_stopped(stopped: int, tmp_path: Path):
    """While it prunes, steps 3 to 10 of 20, and after."""

    def new(steps: int) -> tuple[pl.LightningModule, pl.Trainer, Any]:
        module, batch = text()
        callbacks = METHODS["adalora"].adapt(module, rank=2, init_rank=4)
        checkpoints = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=stopped, save_top_k=-1)
        trainer = pl.Trainer(
            max_steps=steps,
            callbacks=[*callbacks, checkpoints],
            accelerator="cpu",
            logger=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        return module, trainer, DataLoader([batch] * 100, batch_size=None)

    whole, trainer, data = new(20)
    trainer.fit(whole, data)
    resumed, trainer, data = new(20)
    trainer.fit(resumed, data, ckpt_path=tmp_path / f"step={stopped}.ckpt")
    assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))
    assert sum(layer_ranks(resumed).values()) == 4


def test_factors_are_not_decayed():
    module, _ = vision()
    METHODS["ia3"].adapt(module)
    decayed, spared = parameter_groups(module, 0.1)
    assert [p.shape for p in decayed["params"]] == [(2, 16)]
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert sum(p.numel() for p in spared["params"]) == COUNTS["ia3"] + 2


def test_virtual_tokens_train_all_of_a_new_head():
    """DeBERTa's pooler is as new as its classifier, and peft looks for the latter only."""
    module, _ = text()
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    module.model = DebertaV2ForSequenceClassification(DebertaV2Config(vocab_size=50, **size))
    METHODS["prompt"].adapt(module, tokens=4)
    assert trainable(module) == 4 * 16 + (16 * 16 + 16) + HEAD


def test_what_is_trained_after_trimming():
    module, batch = text()
    callbacks = METHODS["lalora"].adapt(module, rank=4)
    fit(module, batch, callbacks, steps=5)
    ranks = layer_ranks(module)
    # Query and value of each block, 32 a rank.
    assert trimmed_parameters(module) == HEAD + sum(2 * 32 * rank for rank in ranks.values())


def test_a_parallel_adapter_stands_beside_the_feed_forward_network():
    module, _ = vision()
    plain = copy.deepcopy(module.model.blocks[0].mlp)
    METHODS["parallel"].adapt(module, bottleneck=4)
    mlp = module.model.blocks[0].mlp
    nn.init.normal_(mlp.fc2.up.weight)
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(mlp(x), plain(x) + mlp.fc2.up(F.gelu(mlp.fc1.down(x))))


def test_adapterdrop_leaves_out_the_first_five_of_twelve_blocks():
    module, _ = vision()
    METHODS["adapterdrop"].adapt(module, bottleneck=4, dropped=0.5)
    first, second = ([type(m).__name__ for m in block.modules()] for block in module.model.blocks)
    assert "SeriesAdapter" not in first
    assert "SeriesAdapter" in second
    assert round(METHODS["adapterdrop"].defaults["dropped"] * 12) == 5


def test_settings_are_read():
    method, settings = parse_method("lora:alpha=1e1,target_modules=[query, key],dropout=0")
    assert settings == {"alpha": 10.0, "target_modules": ["query", "key"], "dropout": 0.0}
    assert parse_method(methods.method_label(method, settings)) == (
        method,
        {"alpha": 10.0, "target_modules": ["query", "key"]},
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lorra", "Expected a method to be one of lalora, lora, .* but got 'lorra'"),
        ("lora:gamma=2", "Expected a setting of lora to be one of rank, alpha, .* but got 'gamma'"),
        ("lora:rank=[", "Expected settings as name:setting=value"),
        ("lora:alpha=big", "Expected alpha of lora to be a number but got 'big'"),
        ("lalora:gamma", "Expected gamma of lalora to be a number but got None"),
        ("lora:rank=2.5", r"Expected rank of lora to be a whole number but got 2\.5"),
    ],
)
def test_settings_that_there_are_not(spec: str, message: str):
    with pytest.raises(ValueError, match=message):
        parse_method(spec)
