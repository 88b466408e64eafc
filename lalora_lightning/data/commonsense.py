"""The eight commonsense reasoning tasks as instructions and answers, after LLM-Adapters (arXiv 2304.01933)."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lalora_lightning.data.loading import load_splits
from lalora_lightning.data.text import TextDataModule, map_rows

__all__ = ["ANSWERS", "PROMPT", "CommonsenseDataModule", "CommonsenseTask"]

CommonsenseTask = Literal[
    "boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"
]

_FIVE = ("answer1", "answer2", "answer3", "answer4", "answer5")
ANSWERS: dict[str, tuple[str, ...]] = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "social_i_qa": _FIVE,
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "winogrande": ("option1", "option2"),
    "arc_easy": _FIVE,
    "arc_challenge": _FIVE,
    "openbookqa": _FIVE,
}
"""The possible answers of each task."""

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)
"""The prompt of LLM-Adapters, with a place for the instruction."""


class CommonsenseDataModule(TextDataModule):
    """A training set for all tasks, with held-out validation rows, and a test set for each task.

    Training and validation batches contain ``input_ids``, ``attention_mask`` and ``labels``, each ``(N, S)`` int64 and
    padded on the right. All labels are -100 except those of the answer and of the end-of-text token after it. Test
    batches contain prompts padded on the left and lists of length N: ``task``, the correct ``answer`` and all
    ``choices``.

    Args:
        tokenizer: A model on the Hub or a local model folder, whose tokenizer is used.
        path: The training set on the Hub, or a folder with ``train.parquet``: columns instruction and output.
        test_path: A folder of test sets, ``<task>.parquet`` or, as in LLM-Adapters, ``<task>/test.json``: columns
            instruction and answer. By default the folder ``test`` in ``path``, if that is a local folder.
        tasks: The tasks to test on; by default every task in ``test_path``.
        max_length: Maximum number of tokens of prompt and answer in training; longer prompts lose their beginning. Test
            prompts are not truncated.
        batch_size: Texts per training or validation batch and device.
        test_batch_size: Prompts per test batch and device.
        val_rows: Number of rows of the training set that are held out.
        num_workers: Processes that prepare batches.

    Raises:
        FileNotFoundError: In ``test_tasks``, ``prepare_data`` and ``setup``: the training set, the tokenizer or a
            task's test set cannot be found or downloaded, or columns are missing.
    """

    def __init__(
        self,
        tokenizer: str,
        path: str = "zwhe99/commonsense_170k",
        test_path: str | None = None,
        tasks: list[CommonsenseTask] | None = None,
        max_length: int = 256,
        batch_size: int = 4,
        test_batch_size: int = 16,
        val_rows: int = 120,
        num_workers: int = 2,
    ) -> None:
        super().__init__(tokenizer, batch_size, num_workers)
        self.save_hyperparameters()
        self.path = path
        self.test_path = Path(test_path or Path(path) / "test")
        self.tasks = tasks
        self.max_length = max_length
        self.test_batch_size = test_batch_size
        self.val_rows = val_rows

    @property
    def test_tasks(self) -> list[str]:
        """The tasks to test on."""
        return list(self._test_files())

    def test_dataloader(self) -> DataLoader:
        """Return the prompts of all tasks; with several processes, exactly one of them gets each prompt."""
        # The Trainer's own sampler would repeat rows, so that every process has the same number of them.
        processes, rank = self.processes()
        sampler = UnrepeatedDistributedSampler(self.splits["test"], processes, rank, shuffle=False)
        collate = self.collator(side="left")
        return self.loader("test", sampler=sampler, batch_size=self.test_batch_size, collate_fn=collate)

    def collator(self, side: str = "right") -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Return the function that pads rows on a side, "right" or "left"."""
        # Some tokenizers, such as LLaMA's, have no padding token. Any token works, because padding is masked.
        pad_id = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        return functools.partial(_collate, pad_id=pad_id, side=side)

    def tokenize(self) -> dict[str, Any]:
        """Tokenize the training set, hold out the validation rows, and tokenize the prompts of the test sets."""
        files = self._test_files()
        columns = ("instruction", "output")
        if Path(self.path).is_dir():
            rows = _load(Path(self.path) / "train.parquet", columns)
        else:
            rows = load_splits(self.path, columns=columns)["train"]
        tokenize = functools.partial(_tokenize_answered, tokenizer=self.tokenizer, max_length=self.max_length)
        halves = map_rows(rows, tokenize).train_test_split(self.val_rows, seed=0)
        tests = []
        for task, file in files.items():
            rows = _load(file, ("instruction", "answer"))
            tokenize = functools.partial(_tokenize_prompt, tokenizer=self.tokenizer, task=task)
            tests.append(map_rows(rows, tokenize))
        return {"train": halves["train"], "validation": halves["test"], "test": datasets.concatenate_datasets(tests)}

    def _test_files(self) -> dict[str, Path]:
        files = [(file.stem, file) for file in self.test_path.glob("*.parquet")]
        files += [(file.parent.name, file) for file in self.test_path.glob("*/test.json")]
        named = {name.lower().replace("-", "_"): file for name, file in files}
        found = {task: named[task] for task in ANSWERS if task in named}
        wanted: Sequence[str] = self.tasks or list(found)
        missing = [task for task in wanted if task not in found]
        if missing or not found:
            raise FileNotFoundError(
                f"Expected test sets of {', '.join(missing) or 'commonsense tasks'} in {self.test_path} but it has "
                f"{', '.join(found) or 'none'}; set `test_path` to a folder of <task>.parquet or <task>/test.json, "
                f"where <task> is one of {', '.join(ANSWERS)}."
            )
        return {task: found[task] for task in wanted}


def _load(file: Path, columns: Sequence[str]) -> datasets.Dataset:
    if not file.is_file():
        raise FileNotFoundError(f"Expected the folder {file.parent} to have {file.name} but it does not.")
    rows = datasets.load_dataset(file.suffix[1:], data_files=str(file), split="train")
    if not set(columns) <= set(rows.column_names):
        names = ", ".join(rows.column_names)
        raise FileNotFoundError(
            f"Expected {file} to have the columns {', '.join(columns)} but its columns are {names}."
        )
    return rows


def _tokenize_answered(row: dict[str, str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list]:
    # Prompt and answer are tokenized separately, so that the prompt has the same tokens as in generation.
    prompt = tokenizer(PROMPT.format(row["instruction"]))["input_ids"]
    answer = [*tokenizer(row["output"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    # The first token is kept, since it may be the beginning-of-text token.
    prompt = prompt[:1] + prompt[1 + max(0, len(prompt) + len(answer) - max_length) :]
    ids = prompt + answer
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(prompt) + answer}


def _tokenize_prompt(row: dict[str, str], tokenizer: PreTrainedTokenizerBase, task: str) -> dict[str, Any]:
    encoded = tokenizer(PROMPT.format(row["instruction"]))
    return {**encoded, "task": task, "choices": ANSWERS[task], "answer": row["answer"]}


def _collate(rows: list[dict[str, Any]], pad_id: int, side: str) -> dict[str, Any]:
    padding = {"input_ids": pad_id, "attention_mask": 0, "labels": -100}
    batch: dict[str, Any] = {key: [row[key] for row in rows] for key in rows[0]}
    for key in padding.keys() & batch.keys():
        batch[key] = pad_sequence([torch.tensor(sequence) for sequence in batch[key]], True, padding[key], side)
    return batch
