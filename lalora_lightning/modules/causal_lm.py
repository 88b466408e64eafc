"""Causal language modelling: loss on the answer, answers generated and matched."""

import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lalora_lightning.hub import load_pretrained
from lalora_lightning.modules.backbone import load_backbone
from lalora_lightning.modules.task import TaskModule


class CausalLMModule(TaskModule):
    """A transformers decoder that learns to answer prompts, trained in full unless it is adapted.

    Batches of training and validation have ``input_ids``, ``attention_mask`` and ``labels``, each ``(N, S)`` int64,
    with labels of -100 where nothing is learnt. Test batches have prompts padded on the left and, in lists of length
    N, the ``task``, the ``choices`` and which of them is the right ``answer``. Logs ``train/loss``, ``val/loss`` (the
    mean over all tokens learnt), ``test/<task>``, the share of right answers, and ``test/average`` over tasks.

    Args:
        name: A model on the Hub or a local model folder, with its tokenizer.
        test_tasks: Names of the tasks that are tested on.
        dtype: Type of the pretrained weights; "bfloat16" halves their memory where only adapters are trained.
        learning_rate: Peak of the schedule, see :class:`TaskModule`.
        weight_decay: Applied to matrices only.
        warmup: Fraction of the run in which the learning rate rises.
        max_new_tokens: An answer is cut off after so many tokens.
        gradient_checkpointing: Recompute activations instead of keeping them.

    Raises:
        FileNotFoundError: The model or its tokenizer cannot be reached or found.
    """

    def __init__(
        self,
        name: str,
        test_tasks: Sequence[str] = (),
        dtype: Literal["float32", "bfloat16"] = "float32",
        learning_rate: float = 2e-4,
        weight_decay: float = 0.0,
        warmup: float = 0.003,
        max_new_tokens: int = 32,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(learning_rate, weight_decay, warmup)
        self.save_hyperparameters()
        self.tokenizer = load_pretrained(AutoTokenizer, name)
        self.model: Any = load_backbone(AutoModelForCausalLM, name, gradient_checkpointing, dtype=dtype)
        # In place of the model's own, which may draw at random. What follows the end of an answer is not read.
        eos = self.tokenizer.eos_token_id
        self.model.generation_config = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=eos, pad_token_id=eos
        )
        self.accuracy = MetricCollection(
            {task: MeanMetric() for task in test_tasks}, prefix="test/", compute_groups=False
        )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        learnt = int((batch["labels"][:, 1:] != -100).sum())
        self.log("val/loss", self.model(**batch).loss, prog_bar=True, batch_size=learnt, sync_dist=True)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        texts = self.answer(batch["input_ids"], batch["attention_mask"])
        for task, choices, right, text in zip(batch["task"], batch["choices"], batch["answer"], texts, strict=True):
            self.accuracy[task].update(float(first_choice(text, choices) == right))

    def on_test_epoch_end(self) -> None:
        # Computed over all processes; NaN is a task of which no row was seen in any of them.
        scores = {key: score for key, score in self.accuracy.compute().items() if not score.isnan()}
        scores["test/average"] = torch.stack(list(scores.values())).mean()
        self.log_dict(scores, sync_dist=True)
        self.accuracy.reset()

    def answer(self, input_ids: Tensor, attention_mask: Tensor) -> list[str]:
        """What the model writes after each prompt, always taking the likeliest token.

        Args:
            input_ids: Prompts padded on the left, ``(N, S)``.
            attention_mask: 0 on the padding, ``(N, S)``.
        """
        tokens = self.model.generate(input_ids=input_ids, attention_mask=attention_mask)
        return self.tokenizer.batch_decode(tokens[:, input_ids.shape[1] :], skip_special_tokens=True)


def first_choice(text: str, choices: Sequence[str]) -> str | None:
    """The choice that comes first in a text, as LLM-Adapters matches answers; None where there is none.

    >>> first_choice("the correct answer is answer2, not answer1", ["answer1", "answer2"])
    'answer2'
    """
    found = re.search("|".join(map(re.escape, choices)), text)
    return None if found is None else found[0]
