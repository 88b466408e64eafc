"""Sizes of full and adapter-only checkpoints after a step of AdamW.

python -m recipes.benchmarks.checkpoints
"""

import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import auto_cli
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM, RobertaConfig

from lalora_lightning import LaLoraCallback, add_lora
from lalora_lightning.tables import text_table
from recipes.console import quiet

__all__ = ["RobertaClassifier", "main"]


def main(rank: int = 8) -> None:
    """Measure the sizes for RoBERTa-base with a head for two classes, compute them for LLaMA-7B, and print a table.

    Args:
        rank: Maximum rank.
    """
    quiet()
    sizes = [_measure(rank, save_adapter_only) for save_adapter_only in (False, True)]
    rows = [["RoBERTa-base, query and value, measured", *(f"{size / 2**20:,.1f}" for size in sizes)]]
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig())
        summary = add_lora(
            llama, rank=16, target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"], modules_to_save=[]
        )
    # The adapters' weights and AdamW's two averages are in float32, the backbone is in bfloat16.
    adapters = summary.adapter_parameters * 4 * 3
    backbone = (summary.total_parameters - summary.adapter_parameters) * 2
    rows.append(
        [
            "LLaMA-7B, rank 16 as in Table 9, computed",
            f"{(backbone + adapters) / 2**20:,.1f}",
            f"{adapters / 2**20:,.1f}",
        ]
    )
    print(text_table(["MiB", "full", "adapter only"], rows))


class RobertaClassifier(pl.LightningModule):
    """RoBERTa-base with a head for two classes, trained on a text of random tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.model: Any = AutoModelForSequenceClassification.from_config(
            RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
        )

    def train_dataloader(self) -> DataLoader:
        """Return a loader of one text."""
        tokens: Any = torch.randint(5, 100, (1, 8))
        return DataLoader(tokens)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the loss."""
        return self.model(batch, labels=torch.zeros(1, dtype=torch.long, device=batch.device)).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over the trainable parameters."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad])


def _measure(rank: int, save_adapter_only: bool) -> int:
    """Return the size of a checkpoint in bytes."""
    trainer = pl.Trainer(
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[LaLoraCallback(rank=rank, save_adapter_only=save_adapter_only)],
    )
    trainer.fit(RobertaClassifier())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.ckpt"
        trainer.save_checkpoint(path)
        return path.stat().st_size


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
