"""Time and operations of a rank update for different numbers of layers and projections of LLaMA-70B.

The backbone is on the meta device. Only the adapters have values, because the allocator reads nothing else.

    python -m recipes.benchmarks.allocator
"""

from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from transformers import LlamaConfig, LlamaForCausalLM

from lalora_lightning import RankAllocator, add_lora
from lalora_lightning.tables import text_table
from recipes.benchmarks.common import default_device, interleave, machine, quartiles, spread, write_json
from recipes.benchmarks.operations import OperationCounter

__all__ = ["PROJECTIONS", "build", "main"]

# In this order, each of q, v, up and down adds a new shape of lora_A or lora_B.
PROJECTIONS = ("q_proj", "o_proj", "v_proj", "k_proj", "up_proj", "gate_proj", "down_proj")


def main(rank: int = 16, repeats: int = 20, json: Path | None = None) -> None:
    """Time ``RankAllocator.step()`` and count its operations; print a table.

    Args:
        rank: Maximum rank.
        repeats: Measured steps of each size.
        json: File for the results.
    """
    device = default_device()
    cases = [(layers, 7) for layers in (6, 12, 24, 48, 96)] + [(96, projections) for projections in (1, 2, 4, 6)]
    allocators, sizes = {}, {}
    for case in cases:
        allocators[case], sizes[case] = build(*case, rank, device)
    operations = {}
    for case, allocator in allocators.items():
        with OperationCounter() as counter:
            allocator.step()
        operations[case] = counter.total
    seconds = interleave({str(case): allocator.step for case, allocator in allocators.items()}, repeats, device)
    results: list[dict[str, Any]] = []
    for case in cases:
        milliseconds = quartiles([1000 * s for s in seconds[str(case)]])
        results.append(
            {
                "layers": case[0],
                "projections": case[1],
                "adapter MiB": sizes[case],
                "operations": operations[case],
                "milliseconds": milliseconds,
            }
        )
    rows = [
        [
            *(f"{r[key]:.0f}" for key in ("layers", "projections", "adapter MiB", "operations")),
            spread(r["milliseconds"]),
        ]
        for r in results
    ]
    print(f"\nA rank update with the shapes of LLaMA-70B, rank {rank}; {machine(device)}\n")
    print(text_table(["layers", "projections", "adapter MiB", "operations", "ms"], rows))
    write_json(json, {"rank": rank, "machine": machine(device), "results": results})


def build(layers: int, projections: int, rank: int, device: torch.device) -> tuple[RankAllocator, float]:
    """Adapt a LLaMA-70B and return its allocator and the size of the adapters in MiB.

    Args:
        layers: Number of layers of the model.
        projections: Number of adapted projections in each layer, the first ones of ``PROJECTIONS``.
        rank: Maximum rank.
        device: Device of the adapters.
    """
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    summary = add_lora(model, rank=rank, target_modules=PROJECTIONS[:projections], modules_to_save=[], device=device)
    return RankAllocator(model), summary.adapter_parameters * 4 / 2**20


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
