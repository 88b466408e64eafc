"""Time and memory of condensing all linear layers of RoBERTa-base, ViT-B and LLaMA-7B.

The backbone is on the meta device. Only the adapters have values, because condensing reads nothing else.

    python -m recipes.benchmarks.condensing
"""

from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import nn

from lalora_lightning import add_lora, condense_lora, lora_layers
from lalora_lightning.memory import peak_memory_mib, reset_peak_memory
from lalora_lightning.tables import text_table
from recipes.benchmarks.common import Shape, build_model, default_device, machine, quartiles, spread, timed, write_json

__all__ = ["build", "main", "measure"]

# The largest last: the peak memory of a process on a CPU never falls.
_SHAPES: tuple[tuple[Shape, int], ...] = (
    ("roberta-base", 8),
    ("roberta-base", 32),
    ("vit-base", 8),
    ("llama-7b", 8),
    ("llama-7b", 16),
    ("llama-7b", 64),
)


def main(repeats: int = 3, shapes: tuple[tuple[Shape, int], ...] = _SHAPES, json: Path | None = None) -> None:
    """Time ``condense_lora`` to half of the ranks; print a table.

    Args:
        repeats: Measured runs of each shape.
        shapes: Shapes of models, each with a rank.
        json: File for the results.
    """
    device = default_device()
    results = [measure(shape, rank, repeats, device) for shape, rank in shapes]
    columns = ("shape", "rank", "projections", "adapter MiB", "seconds", "additional MiB")
    for result in results:
        result["seconds"] = quartiles(result["seconds"])
    rows = [
        [r["shape"], *(f"{r[key]:.0f}" for key in columns[1:4]), spread(r["seconds"]), f"{r['additional MiB']:.0f}"]
        for r in results
    ]
    print(f"\nCondensing all linear layers to half of the ranks; {machine(device)}\n")
    print(text_table(columns, rows))
    write_json(json, {"machine": machine(device), "results": results})


def measure(shape: Shape, rank: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Condense the adapters of all linear layers to half of the ranks, repeatedly.

    Returns:
        The sizes, the seconds of each run, and the additional memory in MiB.
    """
    model, adapter_mib = build(shape, rank, device)
    reset_peak_memory(device)
    before = peak_memory_mib(device) or 0.0
    seconds = []
    for _ in range(1 + repeats):
        for layer in lora_layers(model).values():
            layer.set_rank(rank)
        seconds.append(timed(lambda: condense_lora(model, average_rank=rank / 2), device))
    return {
        "shape": shape,
        "rank": rank,
        "projections": len(lora_layers(model)),
        "adapter MiB": adapter_mib,
        "seconds": seconds[1:],  # the first run also loads the libraries
        "additional MiB": max((peak_memory_mib(device) or 0.0) - before, 0.0),
    }


def build(shape: Shape, rank: int, device: torch.device) -> tuple[nn.Module, float]:
    """Adapt all linear layers of a model without values, and return it and the size of its adapters in MiB."""
    model = build_model(shape, torch.device("meta"), torch.float32)
    summary = add_lora(model, rank=rank, target_modules="all-linear", modules_to_save=[], device=device)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.02)
    return model, summary.adapter_parameters * 4 / 2**20


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
