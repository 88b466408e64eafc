import re
from pathlib import Path

import datasets
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM

from lalora_lightning import LaLoraCallback, lora_layers
from lalora_lightning.data.commonsense import ANSWERS, CommonsenseDataModule
from lalora_lightning.modules.causal_lm import CausalLMModule, first_choice
from tests.data.test_commonsense import _cache, build_model, load, row, write  # noqa: F401
from tests.helpers.training import new_trainer

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "commonsense"
# The patterns of LLM-Adapters, which uses the first match.
PATTERNS = {
    "boolq": r"true|false",
    "piqa": r"solution1|solution2",
    "social_i_qa": r"answer1|answer2|answer3|answer4|answer5",
    "hellaswag": r"ending1|ending2|ending3|ending4",
    "winogrande": r"option1|option2",
    "arc_easy": r"answer1|answer2|answer3|answer4|answer5",
    "arc_challenge": r"answer1|answer2|answer3|answer4|answer5",
    "openbookqa": r"answer1|answer2|answer3|answer4|answer5",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_model(tmp_path_factory.mktemp("model")))


def tokenize(folder: str, prompt: str, answer: str = "") -> tuple[list[int], list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    labels = tokenizer(answer, add_special_tokens=False)["input_ids"] + [2] if answer else []
    return tokenizer(prompt)["input_ids"], labels


def batch_of(*examples: tuple[list[int], list[int]]) -> dict[str, Tensor]:
    width = max(len(prompt) + len(answer) for prompt, answer in examples)
    empty = [width - len(prompt) - len(answer) for prompt, answer in examples]
    filled = list(zip(examples, empty, strict=True))
    return {
        "input_ids": torch.tensor([p + a + [2] * e for (p, a), e in filled]),
        "attention_mask": torch.tensor([[1] * (width - e) + [0] * e for _, e in filled]),
        "labels": torch.tensor([[-100] * len(p) + a + [-100] * e for (p, a), e in filled]),
    }


def answer_losses(folder: str, prompt: list[int], answer: list[int]) -> list[float]:
    """Negative log-likelihood of each token of the answer, one text at a time."""
    with torch.no_grad():
        probabilities = LlamaForCausalLM.from_pretrained(folder)(torch.tensor([prompt + answer])).logits[0].softmax(-1)
    return [-float(probabilities[len(prompt) - 1 + i, token].log()) for i, token in enumerate(answer)]


def test_the_loss_is_the_cross_entropy_of_the_answer(tmp_path: Path, folder: str):
    examples = [
        tokenize(folder, "### Instruction:\nis it?\n\n### Response:\n", "the correct answer is true"),
        tokenize(folder, "### Instruction:\nis it so or is it not?\n\n### Response:\n", "false"),
        tokenize(folder, "so?", "true"),
    ]
    losses = [answer_losses(folder, *example) for example in examples]
    assert len(losses[0]) > len(losses[1]) > 1
    module = CausalLMModule(folder)
    batches = [batch_of(*examples[:2]), batch_of(examples[2])]
    first = losses[0] + losses[1]
    assert module.model(**batches[0]).loss.item() == pytest.approx(sum(first) / len(first), rel=1e-5)
    # The validation loss is the mean over all labeled tokens, not over batches.
    trainer = new_trainer(tmp_path)
    (scores,) = trainer.validate(module, torch.utils.data.DataLoader(batches, batch_size=None), verbose=False)
    every = first + losses[2]
    assert scores["val/loss"] == pytest.approx(sum(every) / len(every), rel=1e-5)


def test_answers_are_greedy_and_do_not_depend_on_the_batch(tmp_path: Path):
    path = build_model(tmp_path, initializer_range=0.3)
    # Samples at random by default, as LLaMA 2 does.
    GenerationConfig(do_sample=True, temperature=5.0, bos_token_id=1, eos_token_id=2).save_pretrained(path)
    prompts = [tokenize(str(path), text)[0] for text in ("so?", "is it so or is it not, and if not, why?", "is it")]
    model, tokenizer = LlamaForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + 12 and ids[-1] != 2:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        expected.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))
    assert len(set(expected)) == 3

    module = CausalLMModule(str(path), max_new_tokens=12).eval()
    width = max(map(len, prompts))
    ids = torch.tensor([[2] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    assert module.answer(ids, mask) == expected
    for prompt, text in zip(prompts, expected, strict=True):
        assert module.answer(torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.long)) == [text]


def test_learns_to_answer_with_the_callback(tmp_path: Path):
    path = str(build_model(tmp_path / "model", initializer_range=0.1))
    examples = [row(f"is it {letter}?", "true" if letter in "ab" else "false") for letter in "abcd"]
    folder = write(tmp_path / "data", boolq=examples)
    many = [{**example, "output": example["answer"]} for example in examples * 182]
    datasets.Dataset.from_list(many).to_parquet(folder / "train.parquet")
    data = load(folder, path, batch_size=6, val_rows=8)
    module = CausalLMModule(path, data.test_tasks, learning_rate=0.007, warmup=0.1)
    # The weights are random, so the embeddings must be trained as well.
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    callback = LaLoraCallback(rank=8, target_modules=targets, modules_to_save=["embed_tokens", "lm_head"])
    trainer = new_trainer(tmp_path, callback, max_epochs=1)
    trainer.fit(module, data)
    assert len(lora_layers(module)) == 10
    assert callback.allocator.layer_names == ["model.model.layers.0", "model.model.layers.1"]
    assert trainer.callback_metrics["val/loss"] < 0.2
    assert trainer.test(module, data, verbose=False) == [{"test/boolq": 1.0, "test/average": 1.0}]


def test_the_average_is_over_tasks_not_over_questions(tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch):
    tests = {
        "boolq": [row("is it?", answer) for answer in ("true", "true", "true", "false")],
        "piqa": [row("which solution?", "solution2")],
    }
    data = load(write(tmp_path, **tests), folder, test_batch_size=3)
    module = CausalLMModule(folder, [*data.test_tasks, "openbookqa"])
    said = iter(["true", "the correct answer is false", "true, not false", "true", "solution1"])
    monkeypatch.setattr(module, "answer", lambda ids, mask: [next(said) for _ in ids])
    trainer = new_trainer(tmp_path)
    expected = {"test/boolq": 0.5, "test/piqa": 0.0, "test/average": 0.25}
    assert trainer.test(module, data, verbose=False) == [expected]
    # The metrics are reset, and a task without rows does not count.
    said = iter(["false", "true", "true", "false", "solution2"])
    expected = {"test/boolq": 0.75, "test/piqa": 1.0, "test/average": 0.875}
    assert trainer.test(module, data, verbose=False) == [expected]


@pytest.mark.parametrize(
    ("task", "text", "found"),
    [
        ("boolq", "the correct answer is true", "true"),
        ("boolq", "False, that is false, not true", "false"),
        ("boolq", "untrue", "true"),
        ("boolq", "the correct answer is True", None),
        ("boolq", "", None),
        ("piqa", "solution3 or solution2", "solution2"),
        ("openbookqa", "answer6 answer5 answer1", "answer5"),
        ("winogrande", "the correct answer is answer1", None),
        ("hellaswag", "ending4ending3", "ending4"),
    ],
)
def test_the_first_answer_word_counts(task: str, text: str, found: str | None):
    assert first_choice(text, ANSWERS[task]) == found
    assert next(iter(re.findall(PATTERNS[task], text)), None) == found


@pytest.mark.skipif(not REAL.is_dir(), reason="without the real data")
def test_real_answers_are_matched():
    files = sorted((REAL / "test").glob("*.parquet"))
    assert files
    for file in files:
        task, choices = file.stem, ANSWERS[file.stem]
        examples = datasets.Dataset.from_parquet(str(file))
        assert len(examples) >= 200
        for text, right in zip(examples["output"], examples["answer"], strict=True):
            assert first_choice(text, choices) == right == re.findall(PATTERNS[task], text)[0]
            for other in set(choices) - {right}:
                wrong = text.replace(right, other)
                assert first_choice(wrong, choices) == other == re.findall(PATTERNS[task], wrong)[0]


@pytest.mark.skipif(not REAL.is_dir(), reason="without the real data")
def test_real_prompts_are_scored_by_what_follows_them(tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch):
    """The prompts contain every answer word: only the generated text may be searched."""
    tests = {}
    for file in sorted((REAL / "test").glob("*.parquet")):
        tests[file.stem] = datasets.Dataset.from_parquet(str(file)).select(range(50)).to_list()
    data: CommonsenseDataModule = load(write(tmp_path, **tests), folder, test_batch_size=100)
    assert data.test_tasks == [task for task in ANSWERS if task in tests]
    module = CausalLMModule(folder, data.test_tasks)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def score(texts: list[str]) -> dict[str, float]:
        said = iter(tokenizer(texts, add_special_tokens=False, padding=True, padding_side="right")["input_ids"])

        def generate(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return torch.cat([input_ids, torch.tensor([next(said) for _ in input_ids])], dim=1)

        monkeypatch.setattr(module.model, "generate", generate)
        (scores,) = new_trainer(tmp_path).test(module, data, verbose=False)
        return scores

    tokenizer.pad_token = tokenizer.eos_token
    rows = [(task, example) for task in data.test_tasks for example in tests[task]]
    keys = [f"test/{task}" for task in data.test_tasks] + ["test/average"]
    assert score([example["output"] for _, example in rows]) == dict.fromkeys(keys, 1.0)
    others = {
        (task, right): next(choice for choice in ANSWERS[task] if choice != right)
        for task in tests
        for right in ANSWERS[task]
    }
    wrong = [example["output"].replace(example["answer"], others[task, example["answer"]]) for task, example in rows]
    assert score(wrong) == dict.fromkeys(keys, 0.0)
    assert score(["I do not know"] * len(rows)) == dict.fromkeys(keys, 0.0)
