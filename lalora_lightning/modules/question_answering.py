"""Extractive question answering with a transformers encoder."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForQuestionAnswering

from lalora_lightning.data.squad_metric import Answer, SquadMetric
from lalora_lightning.modules.backbone import load_backbone
from lalora_lightning.modules.task import TaskModule

MAX_ANSWER_TOKENS = 30


class QuestionAnsweringModule(TaskModule):
    """A transformers model that marks the answer in its context, trained in full unless it is adapted.

    Batches are windows of contexts as :class:`SquadDataModule` gives them. Logs ``train/loss``, ``val/loss`` and, for
    ``val/`` and ``test/``, the official scores in percent: ``exact_match`` and ``f1``, with ``no_answer`` also the
    others of :func:`squad_scores`.

    Args:
        name: A model on the Hub or a local model folder.
        no_answer: Some questions have no answer: SQuAD 2.0, else 1.1. The score of none is that of the first token.
        learning_rate: Peak of the schedule, see :class:`TaskModule`.
        weight_decay: Applied to matrices only.
        warmup: Fraction of the run in which the learning rate rises.
        gradient_checkpointing: Recompute activations instead of keeping them.

    Raises:
        FileNotFoundError: The model cannot be reached or found.
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

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val/loss", self._evaluate(batch, self.val_metric), batch_size=len(batch["question"]), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        # Every process has the same numbers.
        scores = self.val_metric.compute()
        self.log_dict({f"val/{name}": score for name, score in scores.items()}, sync_dist=True)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, self.test_metric)

    def on_test_epoch_end(self) -> None:
        scores = self.test_metric.compute()
        self.log_dict({f"test/{name}": score for name, score in scores.items()}, sync_dist=True)

    def _evaluate(self, batch: dict[str, Any], metric: SquadMetric) -> Tensor:
        inputs = dict(batch)
        questions, contexts, references, offsets = (
            inputs.pop(key) for key in ("question", "context", "references", "offsets")
        )
        out = self.model(**inputs)
        # Low precision would make many spans equal.
        start, end = out.start_logits.float(), out.end_logits.float()
        spans = best_spans(start, end, offsets[..., 0] >= 0)
        texts = span_texts(contexts, offsets, *spans[1:])
        answers = zip(spans[0].tolist(), (start[:, 0] + end[:, 0]).tolist(), texts, map(tuple, references), strict=True)
        metric.update(questions, [Answer(*answer) for answer in answers])
        return out.loss


def best_spans(start_logits: Tensor, end_logits: Tensor, in_context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The spans within the context, of at most 30 tokens, whose logits of start and end have the highest sum.

    Args:
        start_logits: ``(N, T)``.
        end_logits: ``(N, T)``.
        in_context: ``(N, T)`` bool, tokens that may be in an answer.

    Returns:
        Each ``(N,)``: the sums, -inf where there is no context, the first and the last token.
    """
    tokens = start_logits.shape[1]
    sums = start_logits[:, :, None] + end_logits[:, None, :]
    lengths = torch.ones(tokens, tokens, dtype=torch.bool, device=sums.device).triu().tril(MAX_ANSWER_TOKENS - 1)
    allowed = in_context[:, :, None] & in_context[:, None, :] & lengths
    best = sums.masked_fill(~allowed, -torch.inf).flatten(1).max(1)
    return best.values, best.indices // tokens, best.indices % tokens


def span_texts(contexts: list[str], offsets: Tensor, first: Tensor, last: Tensor) -> list[str]:
    """What stands in the contexts from the first to the last token.

    Args:
        contexts: N texts.
        offsets: ``(N, T, 2)``, first and one past the last character of each token.
        first: ``(N,)`` int64.
        last: ``(N,)`` int64.
    """
    rows = torch.arange(len(contexts), device=offsets.device)
    starts, ends = offsets[rows, first, 0].tolist(), offsets[rows, last, 1].tolist()
    # Some tokenizers count the space before a word as part of it.
    return [context[start:end].strip() for context, start, end in zip(contexts, starts, ends, strict=True)]
