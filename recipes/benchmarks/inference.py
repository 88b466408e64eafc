"""Latency of generation and memory of the weights, before and after merging (Table 13 of the paper).

python -m recipes.benchmarks.inference
python -m recipes.benchmarks.inference --shape llama-7b --precision bf16 --json out.json
"""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from lalora_lightning import add_lora, lora_layers, merge_lora, trim_lora
from lalora_lightning.layers.linear_kinds import linear_parameter
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
    ratios,
    share_weights,
    spread,
    write_json,
)

__all__ = ["build_models", "build_ours", "build_peft", "generate", "held_mib", "main", "measure"]


def main(
    shape: Shape = "llama-small",
    batch_size: int = 1,
    prompt: int = 128,
    tokens: int = 32,
    rank: int = 16,
    precision: Literal["fp32", "bf16"] = "fp32",
    repeats: int = 10,
    json: Path | None = None,
) -> None:
    """Generate with the base model, PEFT's LoRA and La-LoRA before and after trimming and merging; print a table.

    Args:
        shape: The model, a LLaMA.
        batch_size: Number of prompts.
        prompt: Tokens of a prompt.
        tokens: Generated tokens.
        rank: Maximum rank; the current ranks of La-LoRA rise from 1 in the first layer to this rank in the last.
        precision: Precision of the weights.
        repeats: Measured runs of each model.
        json: File for the results.
    """
    torch.manual_seed(0)
    device = default_device()
    model = build_model(shape, device, torch.bfloat16 if precision == "bf16" else torch.float32).eval()
    inputs = build_inputs(model, batch_size, prompt)["input_ids"]
    models = build_models(model, rank)
    series = measure(models, inputs, tokens, repeats, device)
    relative = ratios(series["whole"], "base")
    results: dict[str, dict[str, Any]] = {
        name: {
            "time to first token": series["first token"][name],
            "inter-token latency": series["later token"][name],
            "tokens per second": batch_size * tokens / statistics.median(series["whole"][name]),
            "ratio to base": relative[name],
            "weights MiB": held_mib(models[name]),
        }
        for name in models
    }
    rows = [
        [
            name,
            f"{1000 * statistics.median(result['time to first token']):.1f}",
            f"{1000 * statistics.median(result['inter-token latency']):.1f}",
            f"{result['tokens per second']:.1f}",
            spread(result["ratio to base"]),
            f"{result['weights MiB']:.0f}",
        ]
        for name, result in results.items()
    ]
    print(
        f"\n{shape}, {batch_size} x {prompt} tokens, {tokens} generated, rank {rank}, {precision}; {machine(device)}\n"
    )
    header = ["model", "first token ms", "later tokens ms", "tokens per second", "ratio to base", "weights MiB"]
    print(text_table(header, rows))
    settings = {"shape": shape, "batch_size": batch_size, "prompt": prompt, "tokens": tokens, "rank": rank}
    write_json(json, {"settings": {**settings, "precision": precision, "machine": machine(device)}, "models": results})


def build_models(model: PreTrainedModel, rank: int) -> dict[str, nn.Module]:
    """Return the base model, PEFT's LoRA, and La-LoRA as it is, without the fused kernels, trimmed and merged.

    They share the weights of the base model. Merged models have adapted weights of their own.
    """
    models: dict[str, nn.Module] = {"base": model, "PEFT LoRA": build_peft(model, rank)}
    models["La-LoRA"] = ours = build_ours(model, rank)
    models["La-LoRA, not fused"] = build_ours(model, rank)
    call_base_layers(models["La-LoRA, not fused"])
    models["La-LoRA trimmed"] = build_ours(model, rank)
    trim_lora(models["La-LoRA trimmed"])
    adapted = [linear_parameter(layer.base_layer) for layer in lora_layers(ours).values()]
    for name, remove in (("La-LoRA merged", False), ("La-LoRA merged, remove=True", True)):
        models[name] = share_weights(ours, own=adapted)
        merge_lora(models[name], remove=remove)
    return models


def measure(
    models: Mapping[str, nn.Module], inputs: torch.Tensor, tokens: int, repeats: int, device: torch.device
) -> dict[str, dict[str, list[float]]]:
    """Generate with all models in turn.

    Args:
        models: The models by name.
        inputs: Prompts.
        tokens: Generated tokens.
        repeats: Measured runs of each model.
        device: The device of the models.

    Returns:
        Seconds of each run by the name of the model: of the "first token", of a "later token", and of the "whole" run.
    """
    latencies: dict[str, list[tuple[float, float]]] = {name: [] for name in models}

    def run(name: str) -> Callable[[], None]:
        return lambda: latencies[name].append(generate(models[name], inputs, tokens))

    whole = interleave({name: run(name) for name in models}, repeats, device)
    first, later = ({name: [run[i] for run in latencies[name][-repeats:]] for name in models} for i in (0, 1))
    return {"first token": first, "later token": later, "whole": whole}


@torch.inference_mode()
def generate(model: nn.Module, inputs: torch.Tensor, tokens: int) -> tuple[float, float]:
    """Generate greedily with a cache; return the seconds to the first token and the mean of each later one."""
    start = time.perf_counter()
    out = model(input_ids=inputs, use_cache=True)
    token = out.logits[:, -1:].argmax(-1)
    token.cpu()
    first = time.perf_counter() - start
    for _ in range(tokens - 1):
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    token.cpu()
    return first, (time.perf_counter() - start - first) / (tokens - 1)


def held_mib(model: nn.Module) -> float:
    """Return the memory of all tensors that a model holds, in MiB.

    These are parameters, buffers and other attributes of its modules, such as the copy of the base weight in a merged
    layer. Tensors that share memory are counted once.
    """
    storages = {}
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values()) / 2**20


def build_ours(model: PreTrainedModel, rank: int) -> nn.Module:
    """Return a copy with nonzero adapters at ranks that rise over the layers."""
    ours = share_weights(model)
    add_lora(ours, rank=rank, modules_to_save=[])
    layers = list(lora_layers(ours).values())
    for i, layer in enumerate(layers):
        nn.init.normal_(layer.lora_B, std=0.01)
        layer.set_rank(1 + i * (rank - 1) // max(1, len(layers) - 1))
    return ours.eval()


def build_peft(model: PreTrainedModel, rank: int) -> nn.Module:
    """Return a copy with nonzero adapters of PEFT's LoRA."""
    config = LoraConfig(r=rank, target_modules=TARGETS[model.config.model_type], init_lora_weights=False)
    return get_peft_model(share_weights(model), config).eval()


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
