import random
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering

from lalora_lightning import LaLoraCallback, lora_layers
from lalora_lightning.data.squad import SquadDataModule
from lalora_lightning.modules.question_answering import QuestionAnsweringModule, best_spans, span_texts
from tests.data.test_squad import LETTERS, Row, _cache, load, write, write_tokenizer  # noqa: F401
from tests.helpers.training import new_trainer

QUESTION = "which number ?"
NUMBERS = ("seven", "eight", "nine")


def write_model(folder: Path) -> Path:
    """Save a BERT of two layers with random weights and its tokenizer."""
    write_tokenizer(folder, [" ".join((*LETTERS, *NUMBERS, QUESTION))])
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=200,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertForQuestionAnswering(config).save_pretrained(folder)
    return folder


def number_in_letters(rows: int, unanswerable: float = 0.0) -> list[Row]:
    """Contexts of 24 letters with a number word somewhere, or without one and without an answer."""
    draw = random.Random(rows)
    made: list[Row] = []
    for _ in range(rows):
        words, answers = draw.choices(LETTERS[:8], k=24), []
        if draw.random() >= unanswerable:
            answers = [draw.choice(NUMBERS)]
            words[draw.randrange(24)] = answers[0]
        made.append((QUESTION, " ".join(words), answers))
    return made


def data(folder: Path, model: Path, version: str, **arguments: object) -> SquadDataModule:
    unanswerable = 0.5 if version == "2.0" else 0.0
    write(folder, train=number_in_letters(160, unanswerable), validation=number_in_letters(40, unanswerable))
    return load(folder, model, **{"version": version, "max_length": 24, "stride": 4, "batch_size": 16, **arguments})


@pytest.mark.parametrize("version", ["1.1", "2.0"])
def test_learns_to_find_a_number_with_the_callback(tmp_path: Path, version: str):
    model = write_model(tmp_path / "model")
    numbers = data(tmp_path / "data", model, version)
    module = QuestionAnsweringModule(str(model), no_answer=numbers.no_answer, learning_rate=0.03)
    trainer = new_trainer(tmp_path, LaLoraCallback(rank=4), max_epochs=7)
    (before,) = trainer.validate(module, numbers, verbose=False)
    trainer.fit(module, numbers)
    (scores,) = trainer.test(module, numbers, verbose=False)
    assert len(lora_layers(module)) == 4
    assert before["val/f1"] < 60
    assert 95 <= scores["test/exact_match"] <= scores["test/f1"]
    if version == "2.0":
        assert scores["test/best_f1"] >= scores["test/f1"]
        assert min(scores["test/no_answer_f1"], scores["test/has_answer_f1"]) > 90


def test_scores_do_not_depend_on_the_batches(tmp_path: Path):
    """Windows of a context are in one batch or in several. The module is half-trained, so that scores differ."""
    model = write_model(tmp_path / "model")
    module = QuestionAnsweringModule(str(model), learning_rate=0.03)
    new_trainer(tmp_path, LaLoraCallback(rank=4), max_epochs=1).fit(module, data(tmp_path / "16", model, "1.1"))
    one, many = (
        new_trainer(tmp_path).test(module, data(tmp_path / str(size), model, "1.1", batch_size=size), verbose=False)[0]
        for size in (200, 3)
    )
    assert one == pytest.approx(many, abs=1e-4)
    assert 0 < one["test/f1"] < 100


def test_best_spans_against_a_search_over_all_spans():
    start, end = torch.randn(2, 5, 40)
    in_context = torch.zeros(5, 40, dtype=torch.bool)
    in_context[:4, 3:38] = True
    # The best pair is outside the context, backwards, or 31 tokens long.
    start[0, 0], end[0, 39] = 50, 50
    start[1, 20], end[1, 19] = 50, 50
    start[2, 5], end[2, 35] = 50, 51
    start[3, 5], end[3, 34] = 50, 50
    sums, first, last = best_spans(start, end, in_context)
    for n in range(4):
        spans = [(start[n, s] + end[n, e], s, e) for s in range(3, 38) for e in range(s, min(s + 30, 38))]
        assert (sums[n], first[n], last[n]) == max(spans)
    assert last[2] == 35
    assert (first[3], last[3]) == (5, 34)
    assert sums[4] == -torch.inf


def test_texts_of_spans_do_not_begin_with_a_space():
    offsets = torch.tensor([[[-1, -1], [0, 3], [3, 7], [7, 8]], [[-1, -1], [0, 2], [-1, -1], [-1, -1]]])
    texts = span_texts(["Der Fuß.", "ok"], offsets, torch.tensor([2, 0]), torch.tensor([3, 0]))
    assert texts == ["Fuß.", ""]


def test_a_model_that_does_not_exist(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"Cannot load '.*none' with AutoModelForQuestionAnswering.*`name`"):
        QuestionAnsweringModule(str(tmp_path / "none"))
