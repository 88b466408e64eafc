"""Common code of the benchmarks: models of the paper's shapes, copies with shared weights, fair timing."""

import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    ViTConfig,
)

from lalora_lightning import lora_layers

__all__ = [
    "TARGETS",
    "Shape",
    "allocated_mib",
    "build_inputs",
    "build_model",
    "call_base_layers",
    "default_device",
    "interleave",
    "machine",
    "quartiles",
    "ratios",
    "share_weights",
    "spread",
    "timed",
    "write_json",
]

Shape = Literal["roberta-base", "vit-base", "llama-7b", "llama-small", "roberta-tiny", "vit-tiny", "llama-tiny"]

TARGETS = {"roberta": ["query", "value"], "vit": ["q_proj", "v_proj"], "llama": ["q_proj", "v_proj"]}
"""Names of query and value for PEFT, by model type."""


def build_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Return a frozen model of this shape with random weights, in training mode without dropout.

    Speed and memory do not depend on the values of the weights. They are created on the device in the given type.
    ``llama-small`` has 8 layers of width 512. The shapes called tiny are for trying a benchmark.
    """
    no_dropout: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    tiny: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    }  # fmt: skip
    configs: dict[str, Callable[[], PretrainedConfig]] = {
        "roberta-base": lambda: RobertaConfig(
            vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, **no_dropout
        ),
        "vit-base": lambda: ViTConfig(**no_dropout),
        "llama-7b": lambda: LlamaConfig(use_cache=False),
        "llama-small": lambda: LlamaConfig(
            hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8, use_cache=False
        ),
        "roberta-tiny": lambda: RobertaConfig(vocab_size=100, **tiny, **no_dropout),
        "vit-tiny": lambda: ViTConfig(image_size=16, patch_size=8, **tiny, **no_dropout),
        "llama-tiny": lambda: LlamaConfig(vocab_size=100, use_cache=False, **tiny),
    }
    config = configs[shape]()
    model_class: Any = AutoModelForCausalLM if config.model_type == "llama" else AutoModel
    with torch.device(device):
        model = model_class.from_config(config, dtype=dtype)
    return model.requires_grad_(False).train()


def build_inputs(model: PreTrainedModel, batch_size: int, length: int) -> dict[str, Tensor]:
    """Return random images, or random texts of ``length`` tokens."""
    if model.config.model_type == "vit":
        side = model.config.image_size
        return {"pixel_values": torch.randn(batch_size, 3, side, side, device=model.device, dtype=model.dtype)}
    return {"input_ids": torch.randint(5, model.config.vocab_size, (batch_size, length), device=model.device)}


def share_weights(model: nn.Module, own: Collection[Tensor] = ()) -> Any:
    """Return a copy that shares the weights of the model, so that many methods fit into memory at once.

    Args:
        model: The model.
        own: Weights that the copy does not share, because they will be changed.
    """
    copied = {id(p) for p in own}
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if id(p) not in copied})


def call_base_layers(model: nn.Module) -> None:
    """Let adapted layers call their base layer and add the adapter in plain autograd, without the fused kernels.

    They do the same for base layers that are not plain.
    """
    for layer in lora_layers(model).values():
        layer.forward = layer._call_base_layer  # type: ignore[method-assign]


def interleave(
    steps: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device, warmup: int = 1
) -> dict[str, list[float]]:
    """Run all steps in turn, repeatedly, so that changes of the machine's speed affect all of them equally.

    Args:
        steps: The steps by name.
        repeats: Measured runs of each step.
        device: The device, which is synchronized before and after each run.
        warmup: Runs of each step before the measured ones.

    Returns:
        The seconds of each measured run, by the name of the step.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    if not names:
        return {}
    for repeat in tqdm(range(-warmup, repeats), desc="repeats"):
        # Each repetition starts with another step, so that no step has a fixed position.
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            took = timed(steps[name], device)
            if repeat >= 0:
                seconds[name].append(took)
    return seconds


def timed(step: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds that a step takes; the device is synchronized before and after it."""
    _synchronize(device)
    start = time.perf_counter()
    step()
    _synchronize(device)
    return time.perf_counter() - start


def allocated_mib(device: torch.device) -> float:
    """Return the memory of a GPU that tensors take now, in MiB; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0


def ratios(seconds: Mapping[str, list[float]], reference: str) -> dict[str, tuple[float, float, float]]:
    """Return the quartiles of the ratio to the reference's time in the same repetition."""
    out = {}
    for name, own in seconds.items():
        out[name] = quartiles([a / b for a, b in zip(own, seconds[reference], strict=True)])
    return out


def quartiles(numbers: list[float]) -> tuple[float, float, float]:
    """Return lower quartile, median and upper quartile."""
    lower, median, upper = statistics.quantiles(numbers, n=4) if len(numbers) > 1 else numbers * 3
    return lower, median, upper


def spread(triple: tuple[float, float, float]) -> str:
    """Return ``median (lower quartile to upper quartile)``."""
    return f"{triple[1]:.3f} ({triple[0]:.3f} to {triple[2]:.3f})"


def machine(device: torch.device) -> str:
    """Return a description of the hardware and of the version of torch."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def write_json(path: Path | None, results: Any) -> None:
    """Write the results to a file, if a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=2) + "\n")


def default_device() -> torch.device:
    """Return the GPU if there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
