"""Data sets and pretrained models from the Hub or from local folders, with errors that say what to do."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


def load_splits(
    path: str,
    name: str | None = None,
    columns: Iterable[str] = (),
    splits: Iterable[str] = ("train",),
    max_train_rows: int | None = None,
) -> dict[str, Dataset]:
    """All splits of a data set.

    Args:
        path: Name of a data set on the Hub, or a folder in the Hub's layout: parquet files named by split, or images in
            one folder a class.
        name: A configuration on the Hub; locally the subfolder of that name.
        columns: Columns that every split must have.
        splits: Splits that there must be.
        max_train_rows: So many rows of the training split only, drawn at random, always the same.

    Raises:
        FileNotFoundError: The data set cannot be reached or found, or lacks a split or a column.
    """
    import datasets

    where = path if name is None else f"{path}/{name}"
    try:
        _refuse_missing_folder(path)
        loaded = datasets.load_dataset(where) if Path(path).is_dir() else datasets.load_dataset(path, name)
    except (OSError, ValueError) as error:
        # Of both there are many kinds: unreachable, offline, not found, no such configuration, no data files.
        raise FileNotFoundError(
            f"Cannot load the data set {where!r} ({_first_line(error)}). Without a network, give --data.path a local "
            "folder in the Hub's layout."
        ) from error
    for split, rows in loaded.items():
        if not set(columns) <= set(rows.column_names):
            raise FileNotFoundError(
                f"Expected the {split} split of {where} to have the columns {', '.join(columns)} but its columns are "
                f"{', '.join(rows.column_names)}."
            )
    for split in splits:
        if split not in loaded:
            raise FileNotFoundError(f"Expected {where} to have a {split} split but its splits are {', '.join(loaded)}.")
    loaded = dict(loaded)
    if max_train_rows is not None and max_train_rows < len(loaded["train"]):
        loaded["train"] = loaded["train"].shuffle(seed=0).select(range(max_train_rows))
    return loaded


def load_pretrained(auto_class: Any, name: str, **arguments: Any) -> Any:
    """What a transformers class such as ``AutoTokenizer`` or ``AutoModelForCausalLM`` loads by name.

    Args:
        auto_class: The class.
        name: A model on the Hub or a local model folder.
        arguments: Further arguments of its ``from_pretrained``.

    Raises:
        FileNotFoundError: The model cannot be reached or found, or is of a kind that the class does not know.
    """
    try:
        _refuse_missing_folder(name)
        return auto_class.from_pretrained(name, **arguments)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"Cannot load {name!r} by {auto_class.__name__} ({_first_line(error)}). Without a network, give "
            "--model.name a local model folder."
        ) from error


def _refuse_missing_folder(name: str) -> None:
    """No name on the Hub begins like a path; that there is no network would be the wrong reason."""
    if name.startswith((".", "/", "~")) and not Path(name).exists():
        raise FileNotFoundError("there is no such folder")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
