"""Cost of a rank change: how it grows with layers and with projections, on the shapes of LLaMA-70B.

The backbone lies on the meta device; only the adapters, which are all that the allocator reads, are real.

    python -m recipes.bench_allocator
"""

from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from transformers import LlamaConfig, LlamaForCausalLM

from lalora_lightning import RankAllocator, add_lora
from recipes.bench_ops import OperationCounter
from recipes.benchmarking import default_device, interleave, machine, quartiles, spread, write_json
from recipes.reporting import table

# In this order there is a new shape of lora_A or lora_B at q, v, up and down.
PROJECTIONS = ("q_proj", "o_proj", "v_proj", "k_proj", "up_proj", "gate_proj", "down_proj")


def main(rank: int = 16, repeats: int = 20, json: Path | None = None) -> None:
    """Time ``RankAllocator.step()`` and count its operations; print a table.

    Args:
        rank: Maximum rank.
        repeats: Counted steps of each.
        json: Where to write the figures.
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
    print(f"\nA rank change on LLaMA-70B's shapes, rank {rank}; {machine(device)}\n")
    print(table(["layers", "projections", "adapter MiB", "operations", "ms"], rows))
    write_json(json, {"rank": rank, "machine": machine(device), "results": results})


def build(layers: int, projections: int, rank: int, device: torch.device) -> tuple[RankAllocator, float]:
    """The allocator of a LLaMA-70B of so many layers, with the first of ``PROJECTIONS``, and the adapters' MiB."""
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
