"""Loading data sets and pretrained models from the Hub or from local folders, with errors that say what to do."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lalora_lightning.files import first_line

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["load_pretrained", "load_splits"]


def load_splits(
    path: str,
    name: str | None = None,
    columns: Iterable[str] = (),
    splits: Iterable[str] = ("train",),
    max_train_rows: int | None = None,
) -> dict[str, Dataset]:
    """Load all splits of a data set.

    Args:
        path: Name of a data set on the Hub, or a folder in the Hub's layout: parquet files named by split, or images in
            one folder per class.
        name: A configuration on the Hub, or the subfolder of that name in a local folder.
        columns: Columns that every split must have.
        splits: Splits that the data set must have.
        max_train_rows: Keep this many rows of the training split, drawn at random with a fixed seed.

    Raises:
        FileNotFoundError: The data set cannot be found or downloaded, or lacks a split or a column.
    """
    import datasets

    where = path if name is None else f"{path}/{name}"
    try:
        _require_folder_if_local(path)
        loaded = datasets.load_dataset(where) if Path(path).is_dir() else datasets.load_dataset(path, name)
    except (OSError, ValueError) as error:
        # Both types have many causes: no network, offline mode, not found, no such configuration, no data files.
        raise FileNotFoundError(
            f"Cannot load the data set {where!r} ({first_line(error)}). Without a network, set `path` to a local "
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
    """Call ``from_pretrained`` of a transformers class such as ``AutoTokenizer`` or ``AutoModelForCausalLM``.

    Args:
        auto_class: The class.
        name: A model on the Hub or a local model folder.
        arguments: Further arguments of ``from_pretrained``.

    Raises:
        FileNotFoundError: The model cannot be found or downloaded, or the class does not know its architecture.
    """
    try:
        _require_folder_if_local(name)
        return auto_class.from_pretrained(name, **arguments)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"Cannot load {name!r} with {auto_class.__name__} ({first_line(error)}). Without a network, set `name` to "
            "a local model folder."
        ) from error


def _require_folder_if_local(name: str) -> None:
    """Raise an error if the name starts like a path, as no name on the Hub does, and there is no such path."""
    if name.startswith((".", "/", "~")) and not Path(name).exists():
        raise FileNotFoundError("there is no such folder")
