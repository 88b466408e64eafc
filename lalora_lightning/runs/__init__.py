"""Training runs, read from the logs of a logger or from a Trainer's checkpoint."""

from lalora_lightning.runs.adapter_size import component_size, trimmed_bytes
from lalora_lightning.runs.logs import run_folders
from lalora_lightning.runs.reading import read_run
from lalora_lightning.runs.run import Run, parameter_totals

__all__ = ["Run", "component_size", "parameter_totals", "read_run", "run_folders", "trimmed_bytes"]
