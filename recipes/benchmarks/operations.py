"""Operations of a training step and of the allocator, counted by PyTorch's dispatcher.

The model is a 12-layer ViT of transformers with query and value adapted (24 linear layers). The counts are in
addition to those of the frozen backbone with gradients that flow through it. Views are free and are not counted.

    python -m recipes.benchmarks.operations
"""

import copy
from collections import Counter
from typing import Any

import timm
import torch
from jsonargparse import auto_cli
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ViTConfig, ViTModel

from lalora_lightning import RankAllocator, add_lora, lora_layers
from lalora_lightning.tables import text_table

__all__ = [
    "SYNCHRONIZING",
    "OperationCounter",
    "allocator_counts",
    "allocator_synchronizations",
    "compiled_graphs",
    "count_step",
    "main",
    "step_counts",
]

# Operations that run no kernel. `_unsafe_view` is a view that autograd does not track.
_FREE = {"aten.detach", "aten.alias", "aten.lift_fresh", "aten._unsafe_view", "aten.empty", "aten.promote_types"}

SYNCHRONIZING = ("aten._local_scalar_dense", "aten.equal", "aten.nonzero", "aten.masked_select")
"""Operations that wait for the device: `item`, `bool` and `if`, and those whose output's shape depends on values."""


class OperationCounter(TorchDispatchMode):
    """Counts the operations that run a kernel; views are not counted.

    >>> with OperationCounter() as counter:
    ...     _ = torch.ones(2, 3).T @ torch.ones(2)
    >>> counter.total
    3
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket)
        if not func.is_view and name not in _FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """Number of all operations."""
        return self.counts.total()


def count_step(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """Return the operations of a forward and of a backward pass, measured after a first pass."""
    counts = []
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        with OperationCounter() as forward:
            loss = model(pixel_values=images).last_hidden_state.sum()
        with OperationCounter() as backward:
            loss.backward()
        counts.append((forward.total, backward.total))
    assert counts[0] == counts[1]
    return counts[1]


def step_counts(depth: int = 12, rank: int = 8) -> dict[str, tuple[float, float]]:
    """Return the additional operations (forward, backward) per adapted linear layer for several methods."""
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=depth, num_attention_heads=4, intermediate_size=128, image_size=32,
        patch_size=8,
    )  # fmt: skip
    torch.manual_seed(0)
    base = ViTModel(config, add_pooling_layer=False).train()
    images = torch.randn(2, 3, 32, 32)

    floor = copy.deepcopy(base).requires_grad_(False)
    floor.get_input_embeddings().requires_grad_(True)
    at_floor = count_step(floor, images)

    ours = copy.deepcopy(base)
    add_lora(ours, rank=rank, modules_to_save=[])
    # Versions of transformers name them differently.
    targets = sorted({name.rpartition(".")[2] for name in lora_layers(ours)})
    configs = {
        "PEFT LoRA": LoraConfig(r=rank, target_modules=targets),
        "PEFT AdaLoRA": AdaLoraConfig(init_r=rank, target_r=rank // 2, total_step=100, target_modules=targets),
    }
    models = {"ours": ours}
    for name, peft_config in configs.items():
        models[name] = get_peft_model(copy.deepcopy(base), peft_config).get_base_model()
    above = {}
    for name, model in models.items():
        forward, backward = count_step(model, images)
        above[name] = (forward - at_floor[0]) / (2 * depth), (backward - at_floor[1]) / (2 * depth)
    return above


def allocator_counts(depths: tuple[int, ...] = (6, 12, 24, 48)) -> dict[int, int]:
    """Return the operations of one ``RankAllocator.step()`` for models of several depths."""
    counts = {}
    for depth in depths:
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=depth, num_heads=2
        )
        add_lora(model, rank=8)
        allocator = RankAllocator(model)
        with OperationCounter() as counter:
            allocator.step()
        counts[depth] = counter.total
    return counts


def allocator_synchronizations() -> int:
    """Return how many operations of one ``RankAllocator.step()`` read a number from the device."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    add_lora(model, rank=8)
    allocator = RankAllocator(model)
    with OperationCounter() as counter:
        allocator.step()
    return sum(counter.counts[name] for name in SYNCHRONIZING)


def compiled_graphs(rank_changes: int = 50) -> tuple[int, float]:
    """Run a compiled model forward and backward, in training and evaluation, with other ranks every time.

    Returns:
        The number of compiled graphs, and the largest difference of outputs and gradients to the eager model, relative
        to the largest entry.
    """
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    add_lora(model, rank=8)
    RankAllocator(model)  # makes the ranks of all layers views of one tensor
    layers = list(lora_layers(model).values())
    for layer in layers:
        nn.init.normal_(layer.lora_B, std=0.1)
    trained = [p for p in model.parameters() if p.requires_grad]
    images = torch.randn(4, 3, 16, 16)
    backend = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    difference = 0.0
    for change in range(rank_changes):
        for i, layer in enumerate(layers):
            layer.set_rank(1 + (3 * change + i) % 8)
        model.train()
        outs = compiled(images), model(images)
        grads = [torch.autograd.grad(out.square().mean(), trained) for out in outs]
        model.eval()
        with torch.no_grad():
            evaluated = compiled(images), model(images)
        for pair in (outs, evaluated, *zip(*grads, strict=True)):
            difference = max(difference, ((pair[0] - pair[1]).abs().max() / pair[1].abs().max()).item())
    return backend.frame_count, difference


def main() -> None:
    """Print the counts."""
    rows = [[name, f"{forward:.2f}", f"{backward:.2f}"] for name, (forward, backward) in step_counts().items()]
    print("Operations per adapted linear layer in addition to the frozen backbone (ViT, 12 layers, query and value):\n")
    print(text_table(["method", "forward", "backward"], rows))
    print("\nOperations of one allocator step:\n")
    counts = allocator_counts((6, 12, 24, 48, 96))
    print(text_table(["layers", "operations"], [[str(layers), str(count)] for layers, count in counts.items()]))
    print(f"\nSynchronizations of one allocator step: {allocator_synchronizations()}")
    graphs, difference = compiled_graphs()
    print(f"\nCompiled graphs for training and evaluation over 50 changes of the ranks: {graphs}")
    print(f"Largest relative difference between compiled and eager outputs and gradients: {difference:.1e}")


if __name__ == "__main__":
    auto_cli(main)
