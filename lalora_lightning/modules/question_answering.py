"""Extractive question answering with a transformers encoder."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForQuestionAnswering

from lalora_lightning.modules.backbone import load_backbone
from lalora_lightning.modules.squad_metric import Answer, SquadMetric
from lalora_lightning.modules.task import TaskModule

__all__ = ["MAX_ANSWER_TOKENS", "QuestionAnsweringModule", "best_spans", "span_texts"]

MAX_ANSWER_TOKENS = 30
"""Longer spans are not considered as answers."""


class QuestionAnsweringModule(TaskModule):
    """A transformers model that marks the answer in the context. All its parameters are trained unless it is adapted.

    Batches are windows of contexts from :class:`SquadDataModule`. Logs ``train/loss``, ``val/loss`` and, with the
    prefixes ``val/`` and ``test/``, the official scores in percent: ``exact_match`` and ``f1``, and with ``no_answer``
    also the other scores of :func:`squad_scores`.

    Args:
        name: A model on the Hub or a local model folder.
        no_answer: Score as SQuAD 2.0, where questions may have no answer, instead of SQuAD 1.1. The first token
            represents "no answer".
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
        no_answer: bool = False,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        warmup: float = 0.02,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(learning_rate, weight_decay, warmup)
        self.save_hyperparameters()
        self.model = load_backbone(AutoModelForQuestionAnswering, name, gradient_checkpointing)
        self.val_metric, self.test_metric = SquadMetric(no_answer), SquadMetric(no_answer)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log the loss and collect the answers."""
        self.log("val/loss", self._evaluate(batch, self.val_metric), batch_size=len(batch["question"]), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Log the scores of all answers."""
        # compute() returns the same scores on every process.
        scores = self.val_metric.compute()
        self.log_dict({f"val/{name}": score for name, score in scores.items()}, sync_dist=True)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Collect the answers."""
        self._evaluate(batch, self.test_metric)

    def on_test_epoch_end(self) -> None:
        """Log the scores of all answers."""
        scores = self.test_metric.compute()
        self.log_dict({f"test/{name}": score for name, score in scores.items()}, sync_dist=True)

    def _evaluate(self, batch: dict[str, Any], metric: SquadMetric) -> Tensor:
        inputs = dict(batch)
        questions, contexts, references, offsets = (
            inputs.pop(key) for key in ("question", "context", "references", "offsets")
        )
        out = self.model(**inputs)
        # In lower precision, many spans would have equal scores.
        start, end = out.start_logits.float(), out.end_logits.float()
        spans = best_spans(start, end, offsets[..., 0] >= 0)
        texts = span_texts(contexts, offsets, *spans[1:])
        answers = zip(spans[0].tolist(), (start[:, 0] + end[:, 0]).tolist(), texts, map(tuple, references), strict=True)
        metric.update(questions, [Answer(*answer) for answer in answers])
        return out.loss


def best_spans(start_logits: Tensor, end_logits: Tensor, in_context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the span of at most 30 context tokens with the highest sum of start and end logit, for each window.

    Args:
        start_logits: ``(N, T)``.
        end_logits: ``(N, T)``.
        in_context: ``(N, T)`` bool, tokens that may be part of an answer.

    Returns:
        The sums (-inf for a window without context), the first tokens and the last tokens, each ``(N,)``.
    """
    tokens = start_logits.shape[1]
    sums = start_logits[:, :, None] + end_logits[:, None, :]
    lengths = torch.ones(tokens, tokens, dtype=torch.bool, device=sums.device).triu().tril(MAX_ANSWER_TOKENS - 1)
    allowed = in_context[:, :, None] & in_context[:, None, :] & lengths
    best = sums.masked_fill(~allowed, -torch.inf).flatten(1).max(1)
    return best.values, best.indices // tokens, best.indices % tokens


def span_texts(contexts: list[str], offsets: Tensor, first: Tensor, last: Tensor) -> list[str]:
    """Return the text of the contexts from the first to the last token of each span.

    Args:
        contexts: N texts.
        offsets: ``(N, T, 2)``, the first character of each token and the one after its last.
        first: ``(N,)`` int64.
        last: ``(N,)`` int64.
    """
    rows = torch.arange(len(contexts), device=offsets.device)
    starts, ends = offsets[rows, first, 0].tolist(), offsets[rows, last, 1].tolist()
    # Some tokenizers count the space before a word as part of the token.
    return [context[start:end].strip() for context, start, end in zip(contexts, starts, ends, strict=True)]
