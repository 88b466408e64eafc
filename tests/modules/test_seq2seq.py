"""ROUGE by hand and against rouge-score, decoding, padding in the loss, and a tiny T5 that learns."""

from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import torch.nn.functional as F
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import T5Config, T5ForConditionalGeneration

from lalora_lightning import LaLoraCallback, lora_layers
from lalora_lightning.modules.seq2seq import Seq2SeqModule
from tests.data.test_summarization import save_tokenizer
from tests.helpers.training import new_trainer

WORDS = ["the", "cat", "sat", "on", "mat", "a", "dog", "ran"]
KEYS = ("rouge1", "rouge2", "rougeL")


def save_t5(folder: Path, words: list[str] = WORDS, width: int = 32) -> str:
    """Save a T5 of two encoder and two decoder blocks, with random weights, and its tokenizer."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(words) + 3,
        d_model=width,
        d_kv=width // 2,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return save_tokenizer(folder, words)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return save_t5(tmp_path / "model")


def batch(module: Seq2SeqModule, texts: list[str], summaries: list[str]) -> dict[str, Tensor]:
    encoded = module.tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    labels = module.tokenizer(summaries, padding=True, return_tensors="pt")["input_ids"]
    return {**encoded, "labels": labels.masked_fill(labels == 0, -100)}


class Writer(nn.Module):
    """In place of a model: writes ``texts[i]`` for a row whose first token is i, and keeps the arguments."""

    def __init__(self, texts: list[list[int]]) -> None:
        super().__init__()
        self.texts = torch.tensor(texts)
        self.asked: list[dict] = []

    def forward(self, **batch: Tensor) -> SimpleNamespace:
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        return SimpleNamespace(loss=torch.tensor(0.5))

    def generate(self, input_ids: Tensor, **arguments: object) -> Tensor:
        self.asked.append(arguments)
        return self.texts[input_ids[:, 0]]


# The generated tokens, with special tokens, for the references below: "cat the sat", "dog", "the dog ran".
WRITTEN = [[0, 4, 3, 5, 1, 0], [0, 9, 1, 0, 0, 0], [0, 3, 9, 10, 1, 0], [0, 9, 1, 0, 0, 0]]
REFERENCES = ["the cat sat on the mat", "a mat", "the dog ran", "a mat"]
# The first: 3 words of 3 and of 6, so F1 2/3; no pair of 2 and 5; "cat sat" in order, 2 of 3 and of 6, so F1 4/9.
# The second and fourth 0, the third 1.
ROUGE = {"rouge1": 100 * (2 / 3 + 1) / 4, "rouge2": 100 / 4, "rougeL": 100 * (4 / 9 + 1) / 4}


def rows(**columns: list) -> list[dict]:
    tokens = {"attention_mask": torch.ones(1, dtype=torch.int64), "labels": torch.ones(1, dtype=torch.int64)}
    return [{"input_ids": torch.tensor([i]), **tokens, "references": text} for i, text in enumerate(columns["texts"])]


def test_rouge_by_hand(folder: str, tmp_path: Path):
    module = Seq2SeqModule(folder)
    module.model = Writer(WRITTEN)
    # Batches of 3 and 1: texts have equal weights, not batches.
    data = DataLoader(rows(texts=REFERENCES), batch_size=3)
    (scores,) = new_trainer(tmp_path).test(module, data, verbose=False)
    assert scores == pytest.approx({f"test/{key}": value for key, value in ROUGE.items()}, rel=1e-5)
    (scores,) = new_trainer(tmp_path).validate(module, data, verbose=False)
    expected = {f"val/{key}": value for key, value in ROUGE.items()}
    assert scores == pytest.approx({"val/loss": 0.5, **expected}, rel=1e-5)


def test_rouge_of_two_processes(folder: str, tmp_path: Path):
    module = Seq2SeqModule(folder)
    module.model = Writer(WRITTEN)
    trainer = new_trainer(tmp_path, devices=2, strategy="ddp_fork")
    (scores,) = trainer.test(module, DataLoader(rows(texts=REFERENCES), batch_size=3), verbose=False)
    assert scores == pytest.approx({f"test/{key}": value for key, value in ROUGE.items()}, rel=1e-5)


def test_rouge_against_another_package_on_real_text(folder: str, tmp_path: Path):
    data = Path(__file__).parents[2].parent / "shared" / "data" / "dialogsum" / "test.parquet"
    if not data.is_file():
        pytest.skip("without the real data")
    real = datasets.Dataset.from_parquet(str(data), cache_dir=str(tmp_path / "cache")).select(range(250))
    # The beginning of the dialogue has words in common with the summary.
    texts = [" ".join(dialogue.split()[:40]) for dialogue in real["dialogue"]]
    module = Seq2SeqModule(folder)
    module.generate = lambda batch, num_beams: [texts[i] for i in batch["input_ids"][:, 0]]
    (scores,) = new_trainer(tmp_path).test(
        module, DataLoader(rows(texts=list(real["summary"])), batch_size=32), verbose=False
    )
    scorer = RougeScorer(list(KEYS), use_stemmer=True)
    expected = [scorer.score(summary, text) for summary, text in zip(real["summary"], texts, strict=True)]
    for key in KEYS:
        assert scores[f"test/{key}"] == pytest.approx(
            100 * sum(score[key].fmeasure for score in expected) / 250, rel=1e-5
        )
    assert 5 < scores["test/rouge2"] < scores["test/rougeL"] < scores["test/rouge1"] < 60


def test_generated_texts_have_no_special_tokens(folder: str):
    module = Seq2SeqModule(folder)
    module.model = Writer(WRITTEN)
    assert module.generate({"input_ids": torch.tensor([[0], [1]]), "attention_mask": torch.ones(2, 1)}, 1) == [
        "cat the sat",
        "dog",
    ]


def test_beams_and_lengths(folder: str, tmp_path: Path):
    module = Seq2SeqModule(folder, max_new_tokens=7, num_beams=3, val_beams=2, generation={"no_repeat_ngram_size": 3})
    module.model = Writer(WRITTEN)
    data = DataLoader(rows(texts=REFERENCES), batch_size=4)
    new_trainer(tmp_path).validate(module, data, verbose=False)
    new_trainer(tmp_path).test(module, data, verbose=False)
    validation, test = module.model.asked
    assert [validation.pop("num_beams"), test.pop("num_beams")] == [2, 3]
    for asked in (validation, test):
        del asked["attention_mask"]
        assert asked == {"max_new_tokens": 7, "no_repeat_ngram_size": 3}


def test_without_references_the_labels_are_decoded(folder: str):
    module = Seq2SeqModule(folder)
    texts = batch(module, ["cat", "dog", "the"], ["the cat sat on the mat", "a mat", "the dog ran"])
    texts["input_ids"] = torch.tensor([[0], [1], [2]])
    module.model = Writer(WRITTEN)
    module.test_step(texts, 0)
    expected = {"rouge1": 5 / 9, "rouge2": 1 / 3, "rougeL": 13 / 27}
    assert {key: float(value) for key, value in module.test_metrics.compute().items()} == pytest.approx(
        {f"test/{key}": 100 * value for key, value in expected.items()}, rel=1e-5
    )


def test_the_loss_ignores_padding(folder: str):
    module = Seq2SeqModule(folder).eval()
    texts, summaries = ["the cat sat on the mat", "a dog"], ["cat", "the dog ran on"]
    padded = batch(module, texts, summaries)
    assert (padded["labels"] == -100).sum() == 3
    assert (padded["attention_mask"] == 0).sum() == 4

    # Each text alone, without padding: the sum over the 2 and 5 tokens, </s> included, divided by 7.
    total = 0.0
    for text, summary in zip(texts, summaries, strict=True):
        alone = batch(module, [text], [summary])
        shifted = F.pad(alone["labels"][:, :-1], (1, 0))
        logits = module.model(input_ids=alone["input_ids"], decoder_input_ids=shifted).logits
        total += F.cross_entropy(logits[0], alone["labels"][0], reduction="sum").item()
    assert module.training_step(padded, 0).item() == pytest.approx(total / 7, rel=1e-5)

    longer = {**padded, "labels": F.pad(padded["labels"], (0, 4), value=-100), "references": summaries}
    assert module.training_step(longer, 0).item() == pytest.approx(total / 7, rel=1e-5)


def examples(module: Seq2SeqModule) -> DataLoader:
    pairs = {"cat": "the cat sat", "dog": "a dog ran on the mat", "mat": "on a mat", "sat cat": "the cat ran"}
    return DataLoader([0], collate_fn=lambda _: batch(module, list(pairs), list(pairs.values())))


def test_a_tiny_t5_learns_to_write(folder: str, tmp_path: Path):
    module = Seq2SeqModule(folder, learning_rate=0.01, max_new_tokens=10, num_beams=2)
    data = examples(module)
    new_trainer(tmp_path, max_epochs=60, check_val_every_n_epoch=60).fit(module, data, data)
    (scores,) = new_trainer(tmp_path).test(module, data, verbose=False)
    assert scores == {"test/rouge1": 100, "test/rouge2": 100, "test/rougeL": 100}


def test_the_callback_adapts_encoder_and_decoder(folder: str, tmp_path: Path):
    module, callback = Seq2SeqModule(folder, max_new_tokens=4), LaLoraCallback(rank=4, gamma=20.0)
    frozen = module.model.lm_head.weight.clone()
    data = examples(module)
    new_trainer(tmp_path, callback, max_epochs=8).fit(module, data, data)
    # Two blocks each; an encoder block has one attention, a decoder block two, each with q and v.
    assert callback.allocator.layer_names == [
        f"model.{part}.block.{i}" for part in ("encoder", "decoder") for i in (0, 1)
    ]
    assert len(lora_layers(module)) == 12
    assert all(layer.lora_B.any() for layer in lora_layers(module).values())
    assert callback.history[-1][0] == 8
    assert sum(callback.history[-1][1]) > 4
    assert torch.equal(module.model.lm_head.weight, frozen)


def test_gradient_checkpointing_changes_no_gradient(folder: str):
    gradients = []
    for checkpointing in (False, True):
        module = Seq2SeqModule(folder, gradient_checkpointing=checkpointing)
        assert module.model.encoder.gradient_checkpointing is checkpointing
        module.training_step(batch(module, ["the cat"], ["a dog"]), 0).backward()
        gradients.append(module.model.shared.weight.grad)
    torch.testing.assert_close(*gradients)


def test_a_model_that_does_not_exist(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"Cannot load '.*none' with AutoModelForSeq2SeqLM.*`name`"):
        Seq2SeqModule(str(tmp_path / "none"))
