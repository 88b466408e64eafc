"""Common code of the benchmarks: models of the paper's shapes, copies with shared weights, fair timing."""

import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTModel,
)

__all__ = [
    "TARGETS",
    "Shape",
    "build_inputs",
    "build_model",
    "default_device",
    "interleave",
    "machine",
    "quartiles",
    "ratios",
    "share_weights",
    "spread",
    "write_json",
]

Shape = Literal["roberta-base", "vit-base", "llama-7b", "llama-small"]

TARGETS = {"roberta": ["query", "value"], "vit": ["q_proj", "v_proj"], "llama": ["q_proj", "v_proj"]}
"""Names of query and value for PEFT, by model type."""


def build_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Return a frozen model of this shape with random weights, in training mode without dropout.

    Speed and memory do not depend on the values of the weights. ``llama-small`` has 8 layers of width 512.
    """
    no_dropout: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    configs: dict[str, Callable[[], tuple[type[PreTrainedModel], PretrainedConfig]]] = {
        "roberta-base": lambda: (
            RobertaModel,
            RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, **no_dropout),
        ),
        "vit-base": lambda: (ViTModel, ViTConfig(**no_dropout)),
        "llama-7b": lambda: (LlamaForCausalLM, LlamaConfig()),
        "llama-small": lambda: (
            LlamaForCausalLM,
            LlamaConfig(hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8),
        ),
    }
    model_class, config = configs[shape]()
    with torch.device(device):
        model: Any = model_class(config)
    return model.to(dtype).requires_grad_(False).train()


def build_inputs(model: PreTrainedModel, batch_size: int, length: int) -> dict[str, Tensor]:
    """Return random images, or random texts of ``length`` tokens."""
    if model.config.model_type == "vit":
        side = model.config.image_size
        return {"pixel_values": torch.randn(batch_size, 3, side, side, device=model.device, dtype=model.dtype)}
    return {"input_ids": torch.randint(5, model.config.vocab_size, (batch_size, length), device=model.device)}


def share_weights(model: nn.Module) -> Any:
    """Return a copy that shares the weights of the model, so that many methods fit into memory at once."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


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
    for repeat in tqdm(range(-warmup, repeats), desc="repeats"):
        # Each repetition starts with another step, so that no step has a fixed position.
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            _synchronize(device)
            start = time.perf_counter()
            steps[name]()
            _synchronize(device)
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


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
