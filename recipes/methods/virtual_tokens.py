"""Prefix and prompt tuning (arXiv 2101.00190, 2104.08691) with the peft library, for text classification."""

import inspect
from typing import Any

import lightning.pytorch as pl
from torch import nn
from transformers import PreTrainedModel

from lalora_lightning.adapters import find_head
from recipes.methods.projections import NotApplicableError, find_projections

__all__ = ["add_prefix", "add_prompt"]


def add_prefix(module: nn.Module, tokens: int = 16) -> list[pl.Callback]:
    """Train keys and values of virtual tokens in front of those of each block, without reparameterization."""
    from peft import PrefixTuningConfig

    backbone = _text_classifier(module).base_model
    if "past_key_values" not in inspect.signature(backbone.forward).parameters:
        # Encoders of transformers before 5.24 have this argument; later versions call it cache.
        raise NotApplicableError(
            f"peft passes a prefix as past_key_values and the forward of {type(backbone).__name__} has no such argument"
        )
    _wrap(module, PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=tokens))
    return []


def add_prompt(module: nn.Module, tokens: int = 20) -> list[pl.Callback]:
    """Train the embeddings of virtual tokens in front of the text.

    The pooler of an encoder reads the first token, which is then a virtual token.
    """
    from peft import PromptTuningConfig

    _wrap(module, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=tokens))
    return []


def _wrap(module: nn.Module, config: Any) -> None:
    """Wrap ``module.model`` in a peft model, which trains the virtual tokens and the head."""
    from peft import get_peft_model

    model = _text_classifier(module)
    # peft finds the classifier by name but not DeBERTa's pooler, which is also new, nor one that was never trained.
    head = find_head(model, find_projections(model).names)
    backbone = f"{model.base_model_prefix}."
    config.modules_to_save = sorted(
        {name[: name.index(".", len(backbone) if name.startswith(backbone) else 0)] for name in head}
    )
    module.model = get_peft_model(model, config)


def _text_classifier(module: nn.Module) -> PreTrainedModel:
    model = getattr(module, "model", None)
    if not isinstance(model, PreTrainedModel) or "SequenceClassification" not in type(model).__name__:
        raise NotApplicableError(
            "virtual tokens need a transformers model for sequence classification and the model is a "
            f"{type(model).__name__}"
        )
    return model
