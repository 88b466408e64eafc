"""Lower the ranks of an adapter that PEFT trained: ``condense_lora`` beside PEFT's own conversion, at equal parameters.

PEFT trains LoRA on all linear layers of a text classifier. Then the adapter is converted, without further training: by
PEFT to one rank for all layers, by PEFT to a share of the energy of each layer, and by ``condense_lora``, which
compares the components of all layers.

    python -m recipes.benchmarks.conversion --task_settings.glue_path FOLDER --task_settings.model FOLDER
"""

import importlib.util
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from lalora_lightning import condense_lora, load_peft_adapter, lora_layers
from lalora_lightning.adapters import find_head
from lalora_lightning.tables import text_table
from recipes.benchmarks.common import machine, write_json
from recipes.comparison.ranks import adapter_parameters
from recipes.comparison.tasks import ComparisonTask, TaskSettings, build_task
from recipes.comparison.training import VERSIONS
from recipes.console import mean_and_spread, quiet
from recipes.methods.projections import find_projections

__all__ = ["CONVERSIONS", "main", "measure"]

CONVERSIONS = ("as trained", "PEFT, one rank", "PEFT, energy", "condense_lora")


def main(
    task_settings: TaskSettings,
    task: str = "glue/stsb",
    seeds: int = 3,
    learning_rate: float = 1e-3,
    rank: int = 64,
    to: int = 8,
    json: Path | None = None,
) -> None:
    """Train adapters, convert them and print a table.

    Args:
        task_settings: Settings of the task.
        task: A GLUE task of recipes.compare.
        seeds: Number of adapters.
        learning_rate: Peak learning rate of AdamW.
        rank: Rank of the trained adapter.
        to: The converted adapters have at most as many parameters as LoRA with this rank.
        json: File for the results.
    """
    if importlib.util.find_spec("peft.tuners.lora.conversion") is None:
        sys.exit(f"error: Expected peft with a conversion to LoRA but got {VERSIONS['peft']}; install a newer one.")
    quiet()
    built = build_task(task, task_settings)
    results = [result for seed in range(seeds) for result in measure(built, seed, learning_rate, rank, to)]
    rows = []
    for name in CONVERSIONS:
        own = [result for result in results if result["conversion"] == name]
        columns = [[result[key] for result in own] for key in ("parameters", "score", "error", "seconds")]
        parameters, score, error, seconds = columns
        rows.append(
            [
                name,
                f"{sum(parameters) / len(own):,.0f}",
                mean_and_spread([100 * value for value in score]),
                mean_and_spread([100 * value for value in error]),
                mean_and_spread(seconds),
            ]
        )
    device = machine(torch.device("cpu"))
    print(f"\nPEFT LoRA at rank {rank} on {task}, converted to the parameters of rank {to}; {device}\n")
    print(text_table(["adapter", "parameters", f"{built.metric}, %", "energy lost, %", "seconds"], rows))
    arguments = {"task": task, "learning_rate": learning_rate, "rank": rank, "to": to}
    settings = {**arguments, **built.settings}
    write_json(json, {"machine": device, "versions": VERSIONS, "settings": settings, "results": results})


def measure(task: ComparisonTask, seed: int, learning_rate: float, rank: int, to: int) -> list[dict[str, Any]]:
    """Train one adapter and convert it.

    Returns:
        For each of :data:`CONVERSIONS`: parameters, score, lost share of the squared Frobenius norm of all increments,
        and the seconds of the conversion.
    """
    from peft.tuners.lora.conversion import save_as_lora

    with tempfile.TemporaryDirectory() as folder:
        trained = Path(folder) / "trained"
        peft_model, cost = _train(task, seed, learning_rate, rank, trained)
        limit = to * cost
        whole = _loaded(task, trained)
        head = {name: whole.get_parameter(name) for name in find_head(whole, lora_layers(whole))}
        increments = _increments(whole)
        energy = sum(float(value.square().sum()) for value in increments.values())
        results = []

        def add(name: str, module: nn.Module, seconds: float) -> None:
            module.load_state_dict(head, strict=False)
            lost = sum(float((increments[key] - value).square().sum()) for key, value in _increments(module).items())
            score = _test(task, seed, module)
            parameters = adapter_parameters(module)
            results.append(
                {"conversion": name, "seed": seed, "parameters": parameters, "score": score, "error": lost / energy}
                | {"seconds": seconds}
            )

        add("as trained", whole, 0.0)

        start = time.perf_counter()
        save_as_lora(f"{folder}/rank", peft_model, to)
        seconds = time.perf_counter() - start
        add("PEFT, one rank", _loaded(task, Path(folder) / "rank"), seconds)

        # PEFT takes the share of the energy, not the parameters: the largest share that fits is searched.
        fits, fails = 0.0, 1.0
        for _ in range(8):
            share = (fits + fails) / 2
            start = time.perf_counter()
            save_as_lora(f"{folder}/{share}", peft_model, share)
            seconds = time.perf_counter() - start
            module = _loaded(task, Path(folder) / str(share))
            if adapter_parameters(module) <= limit:
                fits, best, best_seconds = share, module, seconds
            else:
                fails = share
        add("PEFT, energy", best, best_seconds)

        condensed = _loaded(task, trained)
        start = time.perf_counter()
        condense_lora(condensed, parameters=limit)
        add("condense_lora", condensed, time.perf_counter() - start)
    return results


def _train(task: ComparisonTask, seed: int, learning_rate: float, rank: int, folder: Path) -> tuple[Any, int]:
    """Train PEFT's LoRA on all linear layers and save it.

    Returns:
        The PEFT model, and the parameters of one rank on all layers.
    """
    from peft import LoraConfig, get_peft_model

    pl.seed_everything(seed, verbose=False)
    module = task.new_module(learning_rate)
    model = module.model
    targets = find_projections(model, "all-linear").names
    head = sorted({name.rpartition(".")[0] for name in find_head(model, targets)})
    config = LoraConfig(r=rank, lora_alpha=16, target_modules=targets, modules_to_save=head)
    module.model = get_peft_model(model, config)
    fit_data, _ = task.loaders(seed, "test")
    _trainer(max_steps=task.steps, max_epochs=task.epochs).fit(module, **fit_data)
    module.model.save_pretrained(folder)
    layers = [layer for layer in module.model.modules() if hasattr(layer, "lora_A")]
    return module.model, sum(layer.in_features + layer.out_features for layer in layers)


def _loaded(task: ComparisonTask, folder: Path) -> Any:
    """Return a new module of the task with an adapter."""
    module = task.new_module(1e-3)
    load_peft_adapter(module.model, folder)
    return module


def _increments(module: nn.Module) -> dict[str, Tensor]:
    """Return the increment of each layer, ``(m, d)``, by name."""
    return {name: layer.increment().detach() for name, layer in lora_layers(module).items()}


def _test(task: ComparisonTask, seed: int, module: Any) -> float:
    _, test_data = task.loaders(seed, "test")
    (scores,) = _trainer().test(module, **test_data, verbose=False)
    return scores[task.metric]


def _trainer(**settings: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **settings,
    )


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_class_arguments(TaskSettings, "task_settings")
    parser.add_function_arguments(main, skip={"task_settings"})
    arguments = parser.parse_args()
    main(TaskSettings(**vars(arguments.pop("task_settings"))), **vars(arguments))
