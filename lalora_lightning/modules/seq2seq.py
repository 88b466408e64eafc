"""Sequence-to-sequence tasks, such as summarization, with a transformers model."""

from typing import Any

from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.functional.text import rouge_score
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from lalora_lightning.data.loading import load_pretrained
from lalora_lightning.modules.backbone import load_backbone
from lalora_lightning.modules.task import TaskModule

__all__ = ["ROUGE_KEYS", "Seq2SeqModule"]

# Without rougeLsum, whose sentence splitter needs a download.
ROUGE_KEYS = ("rouge1", "rouge2", "rougeL")
"""The scores that are logged."""


class Seq2SeqModule(TaskModule):
    """A transformers encoder-decoder, scored on the text it generates. All its parameters are trained unless adapted.

    Batches contain ``input_ids`` and ``attention_mask`` ``(N, S)`` and ``labels`` ``(N, T)`` padded with -100, which
    the loss ignores. Validation and test batches may contain ``references``, N texts. Without them, the labels are
    decoded.

    Logs ``train/loss``, ``val/loss`` and, with the prefixes ``val/`` and ``test/``, ``rouge1``, ``rouge2`` and
    ``rougeL``: the mean F1 of the texts with Porter stemming, from 0 to 100.

    Args:
        name: A model on the Hub or a local model folder, with its tokenizer.
        learning_rate: Peak of the schedule, see :class:`TaskModule`.
        weight_decay: Applied to matrices only.
        warmup: Fraction of the run during which the learning rate rises.
        max_new_tokens: Generated texts have at most this many tokens.
        num_beams: Number of beams in testing; 1 is greedy decoding.
        val_beams: Number of beams in validation, which is more frequent.
        generation: Further arguments of ``generate``, such as ``no_repeat_ngram_size``.
        gradient_checkpointing: Recompute activations instead of keeping them.

    Raises:
        FileNotFoundError: The model or its tokenizer cannot be found or downloaded.
    """

    def __init__(
        self,
        name: str,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.06,
        max_new_tokens: int = 128,
        num_beams: int = 4,
        val_beams: int = 1,
        generation: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(learning_rate, weight_decay, warmup)
        self.save_hyperparameters()
        self.model = load_backbone(AutoModelForSeq2SeqLM, name, gradient_checkpointing)
        self.tokenizer = load_pretrained(AutoTokenizer, name)
        self.num_beams, self.val_beams = num_beams, val_beams
        self.generation = {"max_new_tokens": max_new_tokens, **(generation or {})}
        # Running means need no memory per text, and processes may have different numbers of texts.
        rouge = MetricCollection({key: MeanMetric() for key in ROUGE_KEYS}, compute_groups=False)
        self.val_metrics, self.test_metrics = rouge.clone(prefix="val/"), rouge.clone(prefix="test/")

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Return the model's loss, without passing the references to the model."""
        return self.model(**{key: value for key, value in batch.items() if key != "references"}).loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log the loss and the ROUGE scores of the generated texts."""
        self.log("val/loss", self.loss(batch), batch_size=len(batch["labels"]), sync_dist=True)
        self._score(batch, self.val_beams, self.val_metrics)
        self.log_dict(self.val_metrics, prog_bar=True)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log the ROUGE scores of the generated texts."""
        self._score(batch, self.num_beams, self.test_metrics)
        self.log_dict(self.test_metrics)

    def generate(self, batch: dict[str, Any], num_beams: int) -> list[str]:
        """Return the N texts that the model generates for a batch, without special tokens."""
        tokens = self.model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            num_beams=num_beams,
            **self.generation,
        )
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    def _score(self, batch: dict[str, Any], num_beams: int, metrics: MetricCollection) -> None:
        texts, references = self.generate(batch, num_beams), batch.get("references")
        if references is None:
            labels = batch["labels"].masked_fill(batch["labels"] == -100, self.tokenizer.pad_token_id)
            references = self.tokenizer.batch_decode(labels, skip_special_tokens=True)
        scores = rouge_score(texts, references, use_stemmer=True, rouge_keys=ROUGE_KEYS)
        for key, metric in metrics.items(keep_base=True):
            metric.update(100 * scores[f"{key}_fmeasure"], weight=len(texts))
