"""Sequence classification and regression with a transformers model."""

from typing import Any

from torch import Tensor
from torchmetrics import MetricCollection, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassMatthewsCorrCoef,
)
from transformers import AutoModelForSequenceClassification

from lalora_lightning.modules.backbone import load_backbone
from lalora_lightning.modules.task import TaskModule

__all__ = ["SequenceClassificationModule"]


class SequenceClassificationModule(TaskModule):
    """A transformers model with a classification head. All its parameters are trained unless it is adapted.

    Batches contain the padded output of a tokenizer and ``labels``: ``(N,)`` int64 classes or float targets. Logs
    ``train/loss``, ``val/loss`` and metrics with the prefixes ``val/`` and ``test/``: ``accuracy`` and ``matthews``,
    and with two classes also ``f1`` of class 1; for regression, ``pearson`` and ``spearman``.

    Args:
        name: A model on the Hub or a local model folder.
        num_labels: Number of classes; 1 is regression with the mean squared error.
        learning_rate: Peak of the schedule, see :class:`TaskModule`.
        weight_decay: Applied to matrices only.
        warmup: Fraction of the run during which the learning rate rises.
        gradient_checkpointing: Recompute activations instead of keeping them.

    Raises:
        FileNotFoundError: The model cannot be found or downloaded.
    """

    def __init__(
        self,
        name: str,
        num_labels: int,
        learning_rate: float = 4e-4,
        weight_decay: float = 0.1,
        warmup: float = 0.06,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(learning_rate, weight_decay, warmup)
        self.save_hyperparameters()
        self.model = load_backbone(
            AutoModelForSequenceClassification, name, gradient_checkpointing, num_labels=num_labels
        )
        metrics = _metrics(num_labels)
        self.val_metrics, self.test_metrics = metrics.clone(prefix="val/"), metrics.clone(prefix="test/")

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the loss and the metrics."""
        self.log("val/loss", self._evaluate(batch, self.val_metrics), batch_size=len(batch["labels"]), sync_dist=True)
        self.log_dict(self.val_metrics, prog_bar=True)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the metrics."""
        self._evaluate(batch, self.test_metrics)
        self.log_dict(self.test_metrics)

    def _evaluate(self, batch: dict[str, Tensor], metrics: MetricCollection) -> Tensor:
        out = self.model(**batch)
        # Correlations sum over all examples, so they need float32.
        predictions = out.logits.float().squeeze(-1) if out.logits.shape[-1] == 1 else out.logits.argmax(-1)
        metrics.update(predictions, batch["labels"])
        return out.loss


def _metrics(num_labels: int) -> MetricCollection:
    if num_labels == 1:
        return MetricCollection({"pearson": PearsonCorrCoef(), "spearman": SpearmanCorrCoef()})
    metrics: dict[str, Any] = {
        "accuracy": MulticlassAccuracy(num_labels, average="micro"),
        "matthews": MulticlassMatthewsCorrCoef(num_labels),
    }
    if num_labels == 2:
        metrics["f1"] = BinaryF1Score()
    return MetricCollection(metrics, compute_groups=False)
