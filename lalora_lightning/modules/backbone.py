"""The pretrained transformers model that a task module trains."""

from typing import Any

from transformers import PreTrainedModel

from lalora_lightning.data.loading import load_pretrained

__all__ = ["load_backbone"]


def load_backbone(
    auto_class: Any, name: str, gradient_checkpointing: bool = False, **arguments: Any
) -> PreTrainedModel:
    """Load a pretrained model with the head of its task, in training mode.

    Args:
        auto_class: One of transformers' ``AutoModelFor...`` classes.
        name: A model on the Hub or a local model folder.
        gradient_checkpointing: Recompute activations in the backward pass instead of keeping them.
        arguments: Further arguments of ``from_pretrained``, such as ``num_labels`` or ``dtype``.

    Raises:
        FileNotFoundError: The model cannot be found or downloaded, or its architecture has no such head.
    """
    model = load_pretrained(auto_class, name, **arguments)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()
