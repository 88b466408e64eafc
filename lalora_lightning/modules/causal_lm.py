"""Causal language modeling: training on answers to prompts, testing on generated answers."""

import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lalora_lightning.data.loading import load_pretrained
from lalora_lightning.modules.backbone import load_backbone
from lalora_lightning.modules.task import TaskModule

__all__ = ["CausalLMModule", "first_choice"]


class CausalLMModule(TaskModule):
    """A transformers decoder that learns to answer prompts. All its parameters are trained unless it is adapted.

    Training and validation batches contain ``input_ids``, ``attention_mask`` and ``labels``, each ``(N, S)`` int64. The
    loss ignores tokens with the label -100. Test batches contain prompts padded on the left and lists of length N: the
    ``task``, the ``choices`` and the correct ``answer``, which is one of the choices.

    Logs ``train/loss``, ``val/loss`` (the mean over all labeled tokens), ``test/<task>`` (the fraction of correct
    answers) and ``test/average`` (the mean over tasks).

    Args:
        name: A model on the Hub or a local model folder, with its tokenizer.
        test_tasks: Names of the tasks to test on.
        dtype: Type of the pretrained weights; "bfloat16" halves their memory when only adapters are trained.
        learning_rate: Peak of the schedule, see :class:`TaskModule`.
        weight_decay: Applied to matrices only.
        warmup: Fraction of the run during which the learning rate rises.
        max_new_tokens: Maximum number of tokens in a generated answer.
        gradient_checkpointing: Recompute activations instead of keeping them.

    Raises:
        FileNotFoundError: The model or its tokenizer cannot be found or downloaded.
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
        self.model = load_backbone(AutoModelForCausalLM, name, gradient_checkpointing, dtype=dtype)
        # Replaces the model's own settings, which may sample at random. After the end of an answer, eos is the padding.
        eos = self.tokenizer.eos_token_id
        self.model.generation_config = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=eos, pad_token_id=eos
        )
        self.accuracy = MetricCollection(
            {task: MeanMetric() for task in test_tasks}, prefix="test/", compute_groups=False
        )

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the loss, weighted by the number of labeled tokens."""
        labeled = int((batch["labels"][:, 1:] != -100).sum())
        self.log("val/loss", self.loss(batch), prog_bar=True, batch_size=labeled, sync_dist=True)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Generate answers and count the correct ones by task."""
        texts = self.answer(batch["input_ids"], batch["attention_mask"])
        for task, choices, right, text in zip(batch["task"], batch["choices"], batch["answer"], texts, strict=True):
            self.accuracy[task].update(float(first_choice(text, choices) == right))

    def on_test_epoch_end(self) -> None:
        """Log the accuracy of each tested task, and the mean over these tasks."""
        # The accuracies are computed over all processes. NaN means that no process has seen a row of the task.
        scores = {key: score for key, score in self.accuracy.compute().items() if not score.isnan()}
        scores["test/average"] = torch.stack(list(scores.values())).mean()
        self.log_dict(scores, sync_dist=True)
        self.accuracy.reset()

    def answer(self, input_ids: Tensor, attention_mask: Tensor) -> list[str]:
        """Return the text that the model generates after each prompt, by greedy decoding.

        Args:
            input_ids: Prompts padded on the left, ``(N, S)``.
            attention_mask: 0 on padding, ``(N, S)``.
        """
        tokens = self.model.generate(input_ids=input_ids, attention_mask=attention_mask)
        return self.tokenizer.batch_decode(tokens[:, input_ids.shape[1] :], skip_special_tokens=True)


def first_choice(text: str, choices: Sequence[str]) -> str | None:
    """Return the first of the choices in a text, or None; matches answers as LLM-Adapters does (arXiv 2304.01933).

    >>> first_choice("the correct answer is answer2, not answer1", ["answer1", "answer2"])
    'answer2'
    """
    found = re.search("|".join(map(re.escape, choices)), text)
    return None if found is None else found[0]
