"""What the benchmarks share: models in the shapes of the paper, methods over one set of frozen weights, fair timing."""

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

Shape = Literal["roberta-base", "vit-base", "llama-7b", "llama-small"]
# Query and value, by the names that PEFT has to be told.
TARGETS = {"roberta": ["query", "value"], "vit": ["q_proj", "v_proj"], "llama": ["q_proj", "v_proj"]}


def build_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model of this shape with random weights, frozen, in training mode without dropout.

    Speed and memory do not depend on what the weights are. ``llama-small`` has 8 layers of width 512.
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
    """Random images, or random texts of ``length`` tokens."""
    if model.config.model_type == "vit":
        side = model.config.image_size
        return {"pixel_values": torch.randn(batch_size, 3, side, side, device=model.device, dtype=model.dtype)}
    return {"input_ids": torch.randint(5, model.config.vocab_size, (batch_size, length), device=model.device)}


def share_weights(model: nn.Module) -> Any:
    """A copy with modules of its own over the same frozen weights, so that many methods fit into memory at once."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def interleave(
    steps: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds that each step takes, over and over in turn, so that a drift of the machine's speed hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for repeat in tqdm(range(-warmup, repeats), desc="repeats"):
        # Each repeat begins with another one: none always follows the same.
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            _synchronize(device)
            start = time.perf_counter()
            steps[name]()
            _synchronize(device)
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: Mapping[str, list[float]], reference: str) -> dict[str, tuple[float, float, float]]:
    """Lower quartile, median and upper quartile of the ratio to the reference within the same repeat."""
    out = {}
    for name, own in seconds.items():
        out[name] = quartiles([a / b for a, b in zip(own, seconds[reference], strict=True)])
    return out


def quartiles(numbers: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    lower, median, upper = statistics.quantiles(numbers, n=4) if len(numbers) > 1 else numbers * 3
    return lower, median, upper


def spread(triple: tuple[float, float, float]) -> str:
    """``median (lower quartile to upper quartile)``."""
    return f"{triple[1]:.3f} ({triple[0]:.3f} to {triple[2]:.3f})"


def machine(device: torch.device) -> str:
    """What the figures were measured on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def write_json(path: Path | None, results: Any) -> None:
    """Write the results where a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=2) + "\n")


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
