"""Sizes of exported adapters in both forms, computed from the shapes of RoBERTa-base and LLaMA-7B.

python -m recipes.benchmarks.adapter_files
"""

import torch
from jsonargparse import auto_cli

from lalora_lightning import add_lora
from lalora_lightning.tables import text_table
from recipes.benchmarks.common import TARGETS, Shape, build_model

__all__ = ["components_parameters", "main"]


def components_parameters(shape: Shape, target_modules: str | list[str]) -> int:
    """Return the parameters of one component in every adapted layer."""
    model = build_model(shape, torch.device("meta"), torch.float32)
    return add_lora(model, rank=1, target_modules=target_modules, modules_to_save=[]).adapter_parameters


def main(average_rank: float = 2.0, highest_rank: int = 8, padded_to: int = 16) -> None:
    """Print the sizes in float32. The mixed form is as large as LoRA of the average rank, the uniform one is padded.

    Args:
        average_rank: Average rank of the layers, weighted by the parameters of a component.
        highest_rank: Rank of the uniform form.
        padded_to: Rank of the uniform form that is padded for an engine.
    """
    shapes: dict[Shape, str] = {"roberta-base": "RoBERTa-base", "llama-7b": "LLaMA-7B"}
    rows = []
    for shape, name in shapes.items():
        for targets in (TARGETS[shape.partition("-")[0]], "all-linear"):
            kind = targets if isinstance(targets, str) else "query and value"
            mib = components_parameters(shape, targets) * 4 / 2**20
            rows.append(
                [f"{name}, {kind}", *(f"{rank * mib:,.1f}" for rank in (average_rank, highest_rank, padded_to))]
            )
    print(text_table(["MiB", f"mixed, {average_rank:g} on average", f"uniform, {highest_rank}", f"{padded_to}"], rows))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
