"""Image classification with a timm or transformers model."""

from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoImageProcessor, AutoModelForImageClassification

from lalora_lightning.data.loading import load_pretrained
from lalora_lightning.modules.backbone import load_backbone
from lalora_lightning.modules.task import TaskModule

__all__ = ["ImageClassificationModule"]


class ImageClassificationModule(TaskModule):
    """A timm or transformers model with a new head. All its parameters are trained unless it is adapted.

    Batches are ``(images, labels)``: ``(N, C, H, W)`` in [0, 1] and ``(N,)`` int64. The module normalizes the images
    with the mean and standard deviation that the pretrained weights expect. Logs ``train/loss``, ``val/loss``,
    ``val/accuracy`` and ``test/accuracy`` (top-1).

    Args:
        name: A timm model, such as ``vit_base_patch16_224.augreg_in21k``; or a transformers model, such as
            ``google/vit-base-patch16-224-in21k``, on the Hub or a local model folder.
        num_classes: Size of the new head.
        pretrained: For timm: load the pretrained weights, from the Hub unless ``checkpoint`` is set.
        checkpoint: For timm: a local file with weights of this model (safetensors or a torch state dict).
        learning_rate: Peak of the schedule, see :class:`TaskModule`.
        weight_decay: Applied to matrices only.
        warmup: Fraction of the run during which the learning rate rises.
        gradient_checkpointing: Recompute activations instead of keeping them.
        model_args: For timm: further arguments of ``timm.create_model``, such as ``img_size`` or ``drop_path_rate``.

    Raises:
        FileNotFoundError: The weights cannot be found or downloaded.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        num_classes: int,
        pretrained: bool = True,
        checkpoint: str | None = None,
        learning_rate: float = 5e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.06,
        gradient_checkpointing: bool = False,
        model_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(learning_rate, weight_decay, warmup)
        self.save_hyperparameters()
        if timm.is_model(name):
            self.model = _load_timm(name, num_classes, pretrained, checkpoint, model_args or {})
            if gradient_checkpointing:
                self.model.set_grad_checkpointing()
            expected = timm.data.resolve_model_data_config(self.model)
            # timm returns three values, even if in_chans is not 3.
            channels = (model_args or {}).get("in_chans", 3)
            mean, std = expected["mean"][:channels], expected["std"][:channels]
        else:
            self.model = load_backbone(
                AutoModelForImageClassification,
                name,
                gradient_checkpointing,
                num_labels=num_classes,
                ignore_mismatched_sizes=True,
            )
            processor = load_pretrained(AutoImageProcessor, name)
            mean, std = processor.image_mean, processor.image_std
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(N, num_classes)`` of images ``(N, C, H, W)`` in [0, 1]."""
        out = self.model((images - self.mean) / self.std)
        return out if isinstance(out, Tensor) else out.logits

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the cross-entropy of a batch."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss and the accuracy."""
        images, labels = batch
        logits = self(images)
        self.val_accuracy(logits, labels)
        self.log("val/loss", F.cross_entropy(logits, labels), batch_size=len(labels), sync_dist=True)
        self.log("val/accuracy", self.val_accuracy, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        images, labels = batch
        self.test_accuracy(self(images), labels)
        self.log("test/accuracy", self.test_accuracy)


def _load_timm(
    name: str, num_classes: int, pretrained: bool, checkpoint: str | None, model_args: dict[str, Any]
) -> nn.Module:
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise FileNotFoundError(f"Expected `checkpoint` to be a file of weights but {checkpoint} is not a file.")
    try:
        return timm.create_model(
            name,
            pretrained=pretrained or checkpoint is not None,
            pretrained_cfg_overlay=None if checkpoint is None else {"file": checkpoint},
            num_classes=num_classes,
            **model_args,
        )
    except OSError as error:
        raise FileNotFoundError(
            f"Cannot load the pretrained weights of {name} ({type(error).__name__}). Without a network, set "
            "`checkpoint` to a local file with weights of this model, or `pretrained` to false."
        ) from error
