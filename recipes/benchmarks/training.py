"""Time and memory of a training step of La-LoRA and of PEFT's methods (Table 12 of the paper).

All methods share one set of frozen weights and run in turn in one process. Ratios compare steps of the same repetition.

    python -m recipes.benchmarks.training --shape roberta-base --batch_size 32 --length 128
    python -m recipes.benchmarks.training --shape llama-7b --precision bf16 --batch_size 4 --length 256 --json out.json
"""

import functools
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from lalora_lightning import RankAllocator, add_lora
from lalora_lightning.memory import peak_memory_mib, reset_peak_memory
from lalora_lightning.tables import text_table
from recipes.benchmarks.common import (
    TARGETS,
    Shape,
    build_inputs,
    build_model,
    call_base_layers,
    default_device,
    interleave,
    machine,
    quartiles,
    ratios,
    share_weights,
    spread,
    write_json,
)

__all__ = [
    "BUILDERS",
    "Built",
    "Precision",
    "build_adalora",
    "build_floor",
    "build_ours",
    "build_peft",
    "main",
    "measure_memory",
    "train_step",
]

Precision = Literal["fp32", "bf16", "autocast"]


def main(
    shape: Shape = "roberta-base",
    batch_size: int = 8,
    length: int = 128,
    rank: int = 8,
    dropout: float = 0.0,
    precision: Precision = "fp32",
    compile: bool = False,
    repeats: int = 11,
    json: Path | None = None,
) -> None:
    """Measure training steps of all methods and print a table.

    Args:
        shape: The model.
        batch_size: Texts or images in a step.
        length: Tokens of a text.
        rank: Rank of all adapters.
        dropout: Dropout of all adapters.
        precision: "fp32"; "bf16" for frozen weights in bfloat16; "autocast" for autocast to bfloat16.
        compile: Whether to compile the models.
        repeats: Measured steps of each method.
        json: File for the results.
    """
    torch.manual_seed(0)
    device = default_device()
    model = build_model(shape, device, torch.bfloat16 if precision == "bf16" else torch.float32)
    inputs = build_inputs(model, batch_size, length)
    built = {name: build(model, rank, dropout, compile) for name, build in BUILDERS.items()}
    steps = {
        name: functools.partial(train_step, *parts, inputs, precision == "autocast") for name, parts in built.items()
    }
    memory = {name: measure_memory(steps[name], built[name][0], device) for name in BUILDERS}
    seconds = interleave(steps, repeats, device, warmup=1)
    relative = ratios(seconds, "PEFT LoRA")
    items = inputs["input_ids"].numel() if "input_ids" in inputs else batch_size
    results: dict[str, Any] = {
        name: {
            "seconds": seconds[name],
            "per second": items / statistics.median(seconds[name]),
            "ratio to PEFT LoRA": relative[name],
            "memory MiB": memory[name],
        }
        for name in BUILDERS
    }
    # The allocator is timed alone, because its time is smaller than the spread of a whole step.
    allocate = built["La-LoRA"][2]
    allocator = quartiles(interleave({"allocator": allocate}, 50, device, warmup=5)["allocator"])
    share = allocator[1] / statistics.median(seconds["our layers"])

    unit = "tokens" if "input_ids" in inputs else "images"
    kind = "peak MiB" if device.type == "cuda" else "MiB saved for backward"
    rows = [
        [name, f"{1000 * statistics.median(r['seconds']):.1f}", f"{r['per second']:,.0f}",
         spread(r["ratio to PEFT LoRA"]), f"{r['memory MiB']:,.0f}"]
        for name, r in results.items()
    ]  # fmt: skip
    print(
        f"\n{shape}, batch {batch_size}, rank {rank}, {precision}{', compiled' if compile else ''}; {machine(device)}\n"
    )
    print(text_table(["method", "ms per step", f"{unit} per second", "ratio to PEFT LoRA", kind], rows))
    milliseconds = (1000 * allocator[0], 1000 * allocator[1], 1000 * allocator[2])
    print(f"\nThe allocator alone: {spread(milliseconds)} ms, {share:.2%} of a step of our layers.")
    settings = {
        "shape": shape,
        "batch_size": batch_size,
        "length": length,
        "rank": rank,
        "dropout": dropout,
        "precision": precision,
        "compile": compile,
        "machine": machine(device),
    }
    write_json(json, {"settings": settings, "allocator seconds": allocator, "methods": results})


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    after: Callable[[], None],
    inputs: dict[str, Tensor],
    autocast: bool,
) -> None:
    """Do a forward pass, a backward pass, an optimizer step, and the method's own update after it."""
    with torch.autocast(next(iter(inputs.values())).device.type, torch.bfloat16, enabled=autocast):
        loss = model(**inputs)[0].float().square().mean()
    loss.backward()
    optimizer.step()
    after()
    optimizer.zero_grad()


Built = tuple[nn.Module, torch.optim.Optimizer, Callable[[], None]]
"""A model, its optimizer, and a function that is called after each optimizer step."""


def build_floor(model: PreTrainedModel, rank: int, dropout: float, compile: bool) -> Built:
    """Build the frozen backbone, with gradients that flow through it to its first layer."""
    floor = share_weights(model)
    shift = nn.Parameter(torch.zeros(model.config.hidden_size, device=model.device, dtype=model.dtype))
    floor.register_parameter("shift", shift)
    floor.get_input_embeddings().register_forward_hook(lambda module, args, out: out + shift)
    return _finish(floor, compile)


def build_ours(
    model: PreTrainedModel,
    rank: int,
    dropout: float,
    compile: bool,
    allocate: bool = False,
    compute_dtype: torch.dtype | None = None,
    fused: bool = True,
) -> Built:
    """Build LoRA with this package's layers.

    Args:
        model: The base model.
        rank: Rank of the adapters.
        dropout: Dropout of the adapters.
        compile: Whether to compile the model.
        allocate: Whether the rank allocator runs after each step.
        compute_dtype: Data type in which the adapters are computed.
        fused: Whether the layers use the fused kernels.
    """
    ours = share_weights(model)
    add_lora(ours, rank=rank, dropout=dropout, modules_to_save=[], compute_dtype=compute_dtype)
    if not fused:
        call_base_layers(ours)
    return _finish(ours, compile, RankAllocator(ours).step if allocate else _nothing)


def build_peft(model: PreTrainedModel, rank: int, dropout: float, compile: bool, use_dora: bool = False) -> Built:
    """Build PEFT's LoRA or DoRA."""
    config = LoraConfig(
        r=rank, lora_dropout=dropout, target_modules=TARGETS[model.config.model_type], use_dora=use_dora
    )
    return _finish(get_peft_model(share_weights(model), config), compile)


def build_adalora(model: PreTrainedModel, rank: int, dropout: float, compile: bool) -> Built:
    """Build PEFT's AdaLoRA with its allocator and, as in its paper, an initial rank of 1.5 times the rank."""
    config = AdaLoraConfig(
        init_r=rank * 3 // 2, target_r=rank, lora_dropout=dropout, total_step=10_000, tinit=0, tfinal=100,
        target_modules=TARGETS[model.config.model_type],
    )  # fmt: skip
    adalora = get_peft_model(share_weights(model), config)
    step = iter(range(1, 10_000))
    tuner: Any = adalora.base_model
    return _finish(adalora, compile, lambda: tuner.update_and_allocate(next(step)))


BUILDERS: dict[str, Callable[[PreTrainedModel, int, float, bool], Built]] = {
    "floor": build_floor,
    "our layers": build_ours,
    "our layers, not fused": functools.partial(build_ours, fused=False),
    "our layers, float32": functools.partial(build_ours, compute_dtype=torch.float32),
    "La-LoRA": functools.partial(build_ours, allocate=True),
    "PEFT LoRA": build_peft,
    "PEFT AdaLoRA": build_adalora,
    "PEFT DoRA": functools.partial(build_peft, use_dora=True),
}


def measure_memory(step: Callable[[], None], model: nn.Module, device: torch.device) -> float:
    """Measure the memory of a training step.

    Args:
        step: The training step.
        model: The model.
        device: Its device.

    Returns:
        The memory in MiB: on a GPU, the peak of a step; on a CPU, the tensors saved for the backward pass.
    """
    step()
    if device.type == "cuda":
        reset_peak_memory(device)
        step()
        peak = peak_memory_mib(device)
        assert peak is not None
        return peak
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    # Weights and buffers exist in any case.
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(saved.values()) / 2**20


def _finish(model: nn.Module, compile: bool, after: Callable[[], None] | None = None) -> Built:
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4)
    if compile:
        model.compile()
    return model, optimizer, after or _nothing


def _nothing() -> None:
    pass


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
