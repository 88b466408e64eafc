"""A text encoder and a vision transformer of width 16 and two blocks, with a batch each."""

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from lalora_lightning.modules.image_classification import ImageClassificationModule
from lalora_lightning.modules.task import TaskModule

# Parameters of the head.


HEAD = 16 * 2 + 2


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
