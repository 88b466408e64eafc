"""Settings and summary of a run, from the YAML and JSON files next to its logs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lalora_lightning.files import first_line

__all__ = ["flat", "read_settings", "read_summary"]


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings in a folder's ``hparams.yaml`` and ``config.yaml``, flat; empty without these files."""
    settings: dict[str, Any] = {}
    for path in (folder / "hparams.yaml", folder / "config.yaml"):
        if path.exists():
            settings |= flat(_read_yaml(path))
    return settings


def read_summary(folder: Path) -> Mapping[str, Any]:
    """Return the contents of a folder's ``report.json``; empty without this file."""
    path = folder / "report.json"
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"Expected {path} to be JSON but it cannot be read ({first_line(error)}).") from error
    return _require_mapping(content, path)


def flat(settings: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings with dotted names.

    >>> flat({"lalora": {"gamma": 2}})
    {'lalora.gamma': 2}
    """
    result: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


class _PlainLoader(yaml.SafeLoader):
    """Reads Python objects in the hyperparameters, as Lightning writes them, as their names."""


_PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix.partition(":")[2])


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        # A SafeLoader does not construct objects.
        content = yaml.load(path.read_text(), Loader=_PlainLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected {path} to be YAML but it cannot be read ({first_line(error)}).") from error
    return _require_mapping(content or {}, path)


def _require_mapping(content: Any, path: Path) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise ValueError(f"Expected {path} to hold names and values but it holds a {type(content).__name__}.")
    return content
