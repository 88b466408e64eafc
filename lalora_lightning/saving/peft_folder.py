"""The folder of an adapter in PEFT's format: reading, writing, and downloading it from the Hub."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lalora_lightning.files import first_line, replaced_when_complete
from lalora_lightning.saving.model_card import is_model_card

__all__ = ["CARD_FILE", "CONFIG_FILE", "KEY_PREFIX", "WEIGHTS_FILE", "local_folder", "read_folder", "write_folder"]

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "adapter_config.json", "adapter_model.safetensors", "README.md"

KEY_PREFIX = "base_model.model."
"""Beginning of the keys of the weights, because PEFT wraps a model in two modules of these names."""

# Settings that change what a PEFT adapter computes and are not supported here.
_UNSUPPORTED_SETTINGS = (
    "use_dora",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "lora_ga_config",
    "monteclora_config",
    "velora_config",
)
# Initializations that leave the base weights as they are; the others subtract something from them.
_SUPPORTED_INITIALIZATIONS = ("True", "False", "gaussian", "eva", "orthogonal")


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], card: str) -> None:
    """Write weights, config and model card, each of them atomically.

    A ``README.md`` that is not one of our model cards is kept.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    with replaced_when_complete(folder / WEIGHTS_FILE) as path:
        save_file(tensors, path, metadata={"format": "pt"})
    texts = {CONFIG_FILE: json.dumps(config, indent=2) + "\n"}
    if not (folder / CARD_FILE).exists() or is_model_card((folder / CARD_FILE).read_text()):
        texts[CARD_FILE] = card
    for name, text in texts.items():
        with replaced_when_complete(folder / name) as path:
            path.write_text(text)


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read config and weights of a LoRA adapter.

    Raises:
        FileNotFoundError: One of the files is missing.
        ValueError: A file is damaged, or the adapter is not a plain LoRA adapter.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"Expected a PEFT adapter in {folder} but it has no {file}.")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        tensors = load_file(folder / WEIGHTS_FILE)
    except (ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"Expected a PEFT adapter in {folder} but it cannot be read ({error}).") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"Expected {CONFIG_FILE} in {folder} to hold an object but it holds a {type(config).__name__}."
        )
    _require_plain_lora(config, folder)
    return config, tensors


def local_folder(folder: str | os.PathLike[str], revision: str | None, token: str | None) -> Path:
    """Return the path of a local folder, or download a repository from the Hub and return its folder.

    Raises:
        FileNotFoundError: There is no such folder, and no such repository can be downloaded.
    """
    if not isinstance(folder, str) or Path(folder).is_dir() or folder.count("/") != 1:
        return Path(folder)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        files = [CONFIG_FILE, WEIGHTS_FILE]
        return Path(snapshot_download(folder, revision=revision, token=token, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"Expected {folder!r} to be a folder or a repository on the Hub but there is no such folder, and "
            f"the Hub says: {first_line(error)}"
        ) from error


def _require_plain_lora(config: Mapping[str, Any], folder: Path) -> None:
    unsupported = [key for key in _UNSUPPORTED_SETTINGS if config.get(key)]
    initialization = str(config.get("init_lora_weights", True))
    if initialization not in _SUPPORTED_INITIALIZATIONS:
        unsupported.append(f"init_lora_weights={initialization}")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or unsupported:
        kind = ", ".join([str(config.get("peft_type")), f"bias={config.get('bias')}", *unsupported])
        raise ValueError(f"Expected a plain LoRA adapter without biases in {folder} but got {kind}.")
