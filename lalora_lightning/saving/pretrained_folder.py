"""The weights in a folder that ``save_pretrained`` of transformers, sentence-transformers or diffusers wrote."""

from pathlib import Path

from torch import Tensor

from lalora_lightning.files import first_line
from lalora_lightning.saving.peft_folder import WEIGHTS_FILE

__all__ = ["read_pretrained_weights"]


def read_pretrained_weights(path: Path) -> dict[str, Tensor]:
    """Read a ``.safetensors`` file, or all of them in a folder, which are the parts of one model.

    Raises:
        FileNotFoundError: The folder has no such file.
        ValueError: A file is damaged, or the folder holds a PEFT adapter.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if path / WEIGHTS_FILE in files:
        raise ValueError(f"Expected the weights of a model in {path} but got a PEFT adapter; use load_peft_adapter.")
    if not files:
        raise FileNotFoundError(f"Expected the weights of a model in {path} but it has no .safetensors file.")
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            weights |= load_file(file)
        except SafetensorError as error:
            raise ValueError(
                f"Expected {file} to be a safetensors file but it is damaged: {first_line(error)}"
            ) from error
    return weights
