import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lalora_lightning.data.commonsense import PROMPT, CommonsenseDataModule

RIGHT = ["true", "false", "true", "true", "false"]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def row(question: str, answer: str) -> dict[str, str]:
    return {
        "instruction": question,
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


def rows(many: int, kind: str = "true/false") -> list[dict[str, str]]:
    """Questions of different lengths; the correct answers of boolq repeat RIGHT."""
    texts = [f"Question {i}: is it" + " so" * (i % 7 * 3) + f"?\n\nAnswer format: {kind}" for i in range(many)]
    answers = RIGHT if kind == "true/false" else kind.split("/")
    return [row(text, answers[i % len(answers)]) for i, text in enumerate(texts)]


def write(folder: Path, train: int = 20, **tests: list[dict[str, str]]) -> Path:
    (folder / "test").mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows(train)).to_parquet(folder / "train.parquet")
    for task, examples in tests.items():
        datasets.Dataset.from_list(examples).to_parquet(folder / "test" / f"{task}.parquet")
    return folder


def build_model(folder: Path, **config: object) -> Path:
    """Save a tiny LLaMA with a byte-level tokenizer; like LLaMA's, it begins texts with a token and has no padding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [PROMPT.format(example["instruction"]) + example["output"] for example in rows(10)]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = {"vocab_size": 400, "bos_token_id": 1, "eos_token_id": 2, **sizes, **config}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_model(tmp_path_factory.mktemp("model")))


def load(folder: Path, tokenizer: str, **arguments: object) -> CommonsenseDataModule:
    settings = {"val_rows": 5, "num_workers": 0, **arguments}
    data = CommonsenseDataModule(tokenizer, str(folder), **settings)
    data.prepare_data()
    data.setup("fit")
    return data


def test_labels_are_the_answer_and_the_end_of_text(tmp_path: Path, model: str):
    data = load(write(tmp_path, boolq=rows(5)), model, max_length=512)
    tokenizer = AutoTokenizer.from_pretrained(model)
    by_question = {r["instruction"]: r["output"] for r in rows(20)}
    seen = set()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            assert set(batch) == {"input_ids", "attention_mask", "labels"}
            for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
                length = int(mask.sum())
                assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
                text = tokenizer.decode(ids[:length])
                question = text.partition("### Instruction:\n")[2].partition("\n\n### Response:\n")[0]
                assert text == (
                    "<s>Below is an instruction that describes a task. Write a response that appropriately completes "
                    f"the request.\n\n### Instruction:\n{question}\n\n### Response:\n{by_question[question]}</s>"
                )
                labeled = labels != -100
                assert tokenizer.decode(labels[labeled]) == by_question[question] + "</s>"
                assert torch.equal(labels[labeled], ids[labeled])
                assert not labeled[length:].any()
                seen.add(question)
    assert seen == set(by_question)


def test_a_long_prompt_loses_its_beginning(tmp_path: Path, model: str):
    data = load(write(tmp_path, boolq=rows(5)), model, max_length=40)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for batch in data.train_dataloader():
        assert batch["input_ids"].shape == (len(batch["labels"]), 40)
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            text = tokenizer.decode(ids)
            assert text.startswith("<s>")
            assert "### Response:\nthe correct answer is" in text
            assert tokenizer.decode(labels[labels != -100]) in (
                "the correct answer is true</s>",
                "the correct answer is false</s>",
            )
    # Test prompts are not cut.
    assert min(len(ids) for ids in data.test_dataloader().dataset["input_ids"]) > 40


def test_test_batches_are_prompts_padded_on_the_left(tmp_path: Path, model: str):
    kind = "option1/option2"
    data = load(write(tmp_path, winogrande=rows(3, kind), boolq=rows(5)), model, test_batch_size=6)
    assert data.test_tasks == ["boolq", "winogrande"]
    batch, rest = data.test_dataloader()
    tokenizer = AutoTokenizer.from_pretrained(model)
    for ids, mask, example in zip(batch["input_ids"], batch["attention_mask"], rows(5) + rows(1, kind), strict=True):
        length = int(mask.sum())
        assert mask.tolist() == [0] * (len(mask) - length) + [1] * length
        assert tokenizer.decode(ids[-length:]).endswith(f"Instruction:\n{example['instruction']}\n\n### Response:\n")
    assert batch["attention_mask"].all(1).any()
    assert batch["task"] == ["boolq"] * 5 + ["winogrande"]
    assert batch["answer"] == [*RIGHT, "option1"]
    assert batch["choices"] == [["true", "false"]] * 5 + [["option1", "option2"]]
    assert rest["answer"] == ["option2", "option1"]
    assert load(tmp_path, model, tasks=["winogrande"]).test_tasks == ["winogrande"]


def test_held_out_rows_are_the_same_every_time(tmp_path: Path, model: str):
    data, again = load(write(tmp_path, boolq=rows(5)), model), load(tmp_path, model, max_length=512)
    held_out = data.val_dataloader().dataset["input_ids"]
    assert len(held_out) == 5
    assert held_out == again.val_dataloader().dataset["input_ids"]
    assert not set(map(tuple, held_out)) & set(map(tuple, data.train_dataloader().dataset["input_ids"]))


def test_batches_hold_texts_of_similar_length_and_every_row_once(tmp_path: Path, model: str):
    data = load(write(tmp_path, train=205, boolq=rows(5)), model)
    loader = data.train_dataloader()
    lengths = [len(ids) for ids in loader.dataset["input_ids"]]
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        epochs.append(list(loader.sampler))
        assert sorted(epochs[-1]) == list(range(200))
        batches = torch.tensor([lengths[i] for i in epochs[-1]]).view(50, 4)
        assert (batches.amax(1) * 4).sum() < 1.02 * batches.sum()
    assert epochs[0] != epochs[1]
    in_order = torch.tensor(lengths).view(50, 4)
    assert (in_order.amax(1) * 4).sum() > 1.05 * in_order.sum()


def test_processes_share_the_rows(tmp_path: Path, model: str):
    data = load(write(tmp_path, boolq=rows(5)), model)
    trained, tested = [], []
    for rank in range(2):
        data.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 2, "rank": rank})
        trained.append(list(data.train_dataloader().sampler))
        tested.append(list(data.test_dataloader().sampler))
    # One of the 15 training rows is seen twice, each of the 5 test rows once.
    assert [len(indices) for indices in trained] == [8, 8]
    assert set(trained[0]) | set(trained[1]) == set(range(15))
    assert tested == [[0, 2, 4], [1, 3]]


def test_tokenized_rows_are_read_from_the_cache(tmp_path: Path, model: str):
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    load(write(tmp_path, boolq=rows(5), piqa=rows(4, "solution1/solution2")), model)
    files = {file: file.stat().st_mtime_ns for file in cache.rglob("*.arrow")}
    assert files
    load(tmp_path, model, batch_size=2)
    assert {file: file.stat().st_mtime_ns for file in cache.rglob("*.arrow")} == files
    load(tmp_path, model, max_length=40)
    assert len(list(cache.rglob("*.arrow"))) > len(files)


def test_test_sets_in_the_layout_of_llm_adapters(tmp_path: Path, model: str):
    for name, kind in (("ARC-Easy", "answer1/answer2/answer3"), ("hellaswag", "ending1/ending2"), ("gsm8k", "1/2")):
        (tmp_path / "dataset" / name).mkdir(parents=True)
        (tmp_path / "dataset" / name / "test.json").write_text(json.dumps(rows(3, kind)))
    data = load(write(tmp_path / "data"), model, test_path=str(tmp_path / "dataset"))
    assert data.test_tasks == ["hellaswag", "arc_easy"]
    (batch,) = data.test_dataloader()
    assert batch["answer"] == ["ending1", "ending2", "ending1", "answer1", "answer2", "answer3"]


def test_errors_name_what_is_missing(tmp_path: Path, model: str):
    folder = write(tmp_path / "data", boolq=rows(5), piqa=rows(4))
    with pytest.raises(
        FileNotFoundError, match=r"test sets of hellaswag in .*data/test but it has boolq, piqa; set `test_path`"
    ):
        load(folder, model, tasks=["boolq", "hellaswag"])
    with pytest.raises(FileNotFoundError, match=r"of bolq in .* <task> is one of boolq, piqa, social_i_qa, hellaswag"):
        load(folder, model, tasks=["bolq"])
    with pytest.raises(FileNotFoundError, match=r"commonsense tasks in zwhe99/commonsense_170k/test but it has none"):
        CommonsenseDataModule(model).prepare_data()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"Expected the folder .*empty to have train.parquet"):
        load(tmp_path / "empty", model, test_path=str(folder / "test"))
    with pytest.raises(FileNotFoundError, match=r"Cannot load '.*empty' with AutoTokenizer"):
        load(folder, str(tmp_path / "empty"))
    datasets.Dataset.from_dict({"instruction": ["a"], "label": [0]}).to_parquet(folder / "test" / "piqa.parquet")
    with pytest.raises(
        FileNotFoundError,
        match=r"piqa.parquet to have the columns instruction, answer but its .* are instruction, label",
    ):
        load(folder, model)
    datasets.Dataset.from_dict({"instruction": ["a"], "answer": ["b"]}).to_parquet(folder / "train.parquet")
    with pytest.raises(FileNotFoundError, match=r"train.parquet to have the columns instruction, output"):
        load(folder, model)


def test_no_network(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    folder = write(tmp_path, boolq=rows(5))
    with pytest.raises(FileNotFoundError, match=r"'zwhe99/commonsense_170k'.*set `path` to a local folder"):
        CommonsenseDataModule(model, test_path=str(folder / "test")).prepare_data()
