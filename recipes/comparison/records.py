"""Records of runs: dictionaries, one per line of a JSON lines file."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from recipes.methods import METHODS, method_label

__all__ = [
    "SAME_COMPARISON",
    "Record",
    "append_record",
    "group_records",
    "label",
    "read_lines",
    "read_records",
    "run_key",
    "run_title",
]

Record = dict[str, Any]
"""A run: what was planned (task, method, settings, seed, ...) and what was measured, or why it ``failed``."""

SAME_COMPARISON = ("task", "task_settings", "protocol", "precision")
"""Runs with equal values of these keys are compared with each other."""

_SAME_RUN = (*SAME_COMPARISON, "method", "settings", "seed", "searched")

# Settings that were removed, with the value that corresponds to the current method. A record with this value is a run
# of the current method. A record with any other value keeps the setting and counts as another method.
_REMOVED_SETTINGS = {
    "random_rank": {
        "lalora": False,
        "lora": False,
        "pissa": False,
        "milora": False,
        "lora_fa": False,
        "dylora": True,
    },
}


def label(record: Record) -> str:
    """Return the run's method and settings, with the current names and defaults."""
    return method_label(METHODS[record["method"]], record["settings"])


def run_title(run: Record) -> str:
    """Return the task, the method, the learning rate and the seed of a run as text."""
    return f"{run['task']}, {label(run)}, learning rate {run['learning_rate']:g}, seed {run['seed']}"


def run_key(record: Record) -> str:
    """Return a string that identifies a run; it is the same for a planned run and for its record."""
    return _key(record, _SAME_RUN)


def read_lines(path: Path) -> list[Record]:
    """Read all complete lines of a file of JSON lines; an empty list if there is no such file."""
    if not path.exists():
        return []
    complete = path.read_text().rpartition("\n")[0]
    return [json.loads(line) for line in complete.splitlines()]


def read_records(path: Path) -> list[Record]:
    """Read all complete records of a file; an incomplete last line is ignored. Of a repeated run, the last one counts.

    Settings that were added to a method after the run get their default, which corresponds to the earlier behavior.
    Removed settings are dropped if their value corresponds to the current method. Records without a protocol get that
    of the version that wrote them.

    Returns:
        The records; an empty list if there is no such file.
    """
    records = [
        {
            "protocol": _first_protocol(record),
            **record,
            "settings": _current_settings(record["method"], record["settings"]),
        }
        for record in read_lines(path)
    ]
    return list({run_key(record): record for record in records}.values())


def append_record(path: Path, record: Record) -> None:
    """Add a record as one line, replacing an incomplete line at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(record).encode() + b"\n")


def group_records(records: Iterable[Record], names: Sequence[str]) -> list[list[Record]]:
    """Group records with equal values of these keys; groups are in the order of their first records."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(_key(record, names), []).append(record)
    return list(groups.values())


def _first_protocol(record: Record) -> Record:
    """Return the protocol of a record without one, where learning rates were chosen with one seed on the test rows."""
    rates = record.get("learning_rates", [])
    chosen = len(rates) > 1
    return {
        "version": 1,
        "learning_rates": rates,
        "selection_rows": "test rows" if chosen else None,
        "selection_seeds": [1_000_000] if chosen else [],
    }


def _current_settings(method: str, settings: dict[str, Any]) -> dict[str, Any]:
    kept = {
        name: value
        for name, value in settings.items()
        if method not in (removed := _REMOVED_SETTINGS.get(name, {})) or value != removed[method]
    }
    return {**METHODS[method].defaults, **kept}


def _key(record: Record, names: Sequence[str]) -> str:
    return json.dumps([_with_integers(record[name]) for name in names], sort_keys=True)


def _with_integers(value: Any) -> Any:
    """Return a value in which 2.0 is 2, since both are the same setting."""
    if isinstance(value, dict):
        return {key: _with_integers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_integers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
