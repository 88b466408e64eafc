"""Reading a run from its logs or from a checkpoint."""

import os
from pathlib import Path

from lalora_lightning.runs.checkpoint import read_checkpoint
from lalora_lightning.runs.logs import read_logs
from lalora_lightning.runs.run import Run

__all__ = ["read_run"]


def read_run(source: Run | str | os.PathLike[str]) -> Run:
    """Read a run from a folder with the logs of CSVLogger or TensorBoardLogger, or from a Trainer's checkpoint.

    The settings are read from ``hparams.yaml`` and ``config.yaml``, the summary from ``report.json``, in the folder of
    the logs and in the given folder. A :class:`Run` is returned unchanged.

    Raises:
        FileNotFoundError: There is no such file or folder, or no logs in it.
        ValueError: The logs are of several runs, or of a run without La-LoRA, or a file is damaged.
    """
    if isinstance(source, Run):
        return source
    path = Path(source)
    if path.is_file():
        return read_checkpoint(path)
    if path.is_dir():
        return read_logs(path)
    raise FileNotFoundError(f"Expected {path} to be a folder of logs or a checkpoint but it does not exist.")
