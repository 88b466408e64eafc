"""What only a GPU shows, in under ten minutes: times and peak memory in bfloat16, as one JSON file.

Training steps of RoBERTa-base, LLaMA-7B and ViT-B, eager and compiled, the allocator, condensing, and inference before
and after merging. All methods share one set of frozen weights and run in turn, a step each.

    python -m recipes.benchmarks.gpu --output gpu.json
    python -m recipes.benchmarks.gpu --render gpu.json               # the tables of the file, in Markdown
    python -m recipes.benchmarks.gpu --output tiny.json --tiny true  # tiny models, also on a CPU
"""

import functools
import gc
import json
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli

from lalora_lightning.files import replaced_when_complete
from lalora_lightning.memory import peak_memory_mib, reset_peak_memory
from lalora_lightning.tables import markdown_table
from recipes.benchmarks import allocator, condensing, inference
from recipes.benchmarks.common import (
    Shape,
    allocated_mib,
    build_inputs,
    build_model,
    default_device,
    interleave,
    machine,
    quartiles,
    ratios,
    spread,
    timed,
)
from recipes.benchmarks.training import BUILDERS, measure_memory, train_step

__all__ = ["FULL", "METHODS", "TINY", "Part", "Run", "Sizes", "main", "parts", "render_report"]

METHODS = {
    "eager": (
        "PEFT LoRA",
        "our layers",
        "our layers, not fused",
        "La-LoRA",
        "PEFT DoRA",
        "PEFT AdaLoRA",
        "our layers, float32",
        "floor",
    ),
    # The allocator runs outside of the compiled code, so that its time adds to that of our layers.
    "compiled": ("PEFT LoRA", "our layers", "our layers, not fused", "PEFT AdaLoRA"),
    # The code of DoRA breaks the graph. After that, torch compiles other models in other pieces, since they share code.
    "compiled, alone": ("PEFT DoRA",),
}
"""Methods of ``training.BUILDERS`` by mode, the most important first: the last ones are skipped if time runs out."""

# Whether a method computes with the fused kernels; no entry for what does not compute with this package's layers.
_FUSED = {
    "our layers": True,
    "our layers, not fused": False,
    "our layers, float32": True,
    "La-LoRA": True,
    "La-LoRA, not fused": False,
    "La-LoRA trimmed": True,
}


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        training: Shapes with batch size and tokens of a text.
        inference: Shape, tokens of a prompt, and generated tokens.
        condensing: Shapes with a rank.
        allocator: Numbers of blocks of LLaMA-70B with all projections adapted.
        repeats: Measured training steps of each method.
        compiler: Backend of ``torch.compile``.
    """

    training: tuple[tuple[Shape, int, int], ...]
    inference: tuple[Shape, int, int]
    condensing: tuple[tuple[Shape, int], ...]
    allocator: tuple[int, ...]
    repeats: int
    compiler: str = "inductor"


FULL = Sizes(
    training=(("roberta-base", 32, 128), ("vit-base", 32, 0), ("llama-7b", 2, 256)),
    inference=("llama-7b", 128, 32),
    condensing=(("roberta-base", 8), ("llama-7b", 8), ("llama-7b", 64)),
    allocator=(24, 96),
    repeats=30,
)
"""Meant to fit into 24 GB: about 16 GiB to train LLaMA-7B, about 19 GiB for all models of its inference."""

# Without code generation, which takes longer than all of the measurements.
TINY = Sizes(
    training=(("roberta-tiny", 2, 8), ("vit-tiny", 2, 0), ("llama-tiny", 2, 8)),
    inference=("llama-tiny", 8, 4),
    condensing=(("llama-tiny", 4),),
    allocator=(1,),
    repeats=5,
    compiler="eager",
)

# Frozen weights of 12.6 GiB, and activations of 3.4 GiB (DoRA) or three copies of query and value of 2 GiB each.
_NEEDED_GIB = {"llama-7b": 20.0}


def main(output: Path | None = None, render: Path | None = None, tiny: bool = False, minutes: float = 8.0) -> None:
    """Measure and write a JSON file, or print the tables of such a file. The exit status is 1 if a part failed.

    Args:
        output: File for the results. It is complete after each record.
        render: A file of results to print.
        tiny: Measure tiny models, on the GPU or on the CPU, to try the command.
        minutes: After this time nothing new is started. What is skipped is recorded.
    """
    if (output is None) == (render is None):
        sys.exit("error: Expected one of --output and --render.")
    if render is not None:
        print(render_report(json.loads(render.read_text())))
        return
    assert output is not None
    device = default_device()
    if device.type == "cpu" and not tiny:
        sys.exit(
            "error: Expected a GPU but torch finds none (torch.cuda.is_available() is False); use --tiny true to try "
            "this command with tiny models on the CPU."
        )
    torch.manual_seed(0)
    run = Run(output, device, TINY if tiny else FULL, minutes)
    for part in parts(run.sizes):
        torch.compiler.reset()  # compiled code keeps models of the part before in memory
        run.attempt(part.labels, functools.partial(part.measure, run), part.needed_gib)
    print(render_report(run.report))
    failed = sum(record["status"] == "failed" for record in run.report["records"])
    if failed:
        sys.exit(f"error: {failed} failed, see the reasons above")


class Run:
    """The records of a run, written to its file as they come.

    Args:
        output: The file.
        device: The device of all measurements.
        sizes: What is measured.
        minutes: After this time nothing new is started.
    """

    def __init__(self, output: Path, device: torch.device, sizes: Sizes, minutes: float) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        self.output = output
        self.device = device
        self.sizes = sizes
        self.minutes = minutes
        self.stop = time.monotonic() + 60 * minutes
        self.report: dict[str, Any] = {
            "machine": _machine(device),
            "settings": {
                **asdict(sizes),
                "precision": "bf16: frozen weights in bfloat16, adapters in float32",
                "order": "methods share the frozen weights and run in turn, a step each; ratios within a repetition; "
                "no ratio of what is compiled alone",
                "times": "[lower quartile, median, upper quartile] of synchronized wall time",
                "memory": "peak MiB" if device.type == "cuda" else "MiB saved for backward",
                "minutes": minutes,
            },
            "records": [],
        }

    def attempt(self, labels: Mapping[str, Any], measure: Callable[[], Any], needed_gib: float = 0.0) -> None:
        """Measure, and record if there was no time or memory to do so, or an error.

        Args:
            labels: What is measured, for the record.
            measure: The measurement, which adds its own records.
            needed_gib: The free memory of a GPU that it needs.
        """
        _free()
        if time.monotonic() > self.stop:
            self.add(labels, status="skipped", reason=f"the time of {self.minutes:g} minutes was over")
            return
        free_gib = torch.cuda.mem_get_info(self.device)[0] / 2**30 if self.device.type == "cuda" else needed_gib
        if free_gib < needed_gib:
            self.add(labels, status="skipped", reason=f"needs {needed_gib:g} GiB, {free_gib:.1f} GiB are free")
            return
        try:
            measure()
        except Exception as error:
            traceback.print_exc()
            self.add(labels, status="failed", reason=f"{type(error).__name__}: {error}")

    def add(self, labels: Mapping[str, Any], **values: Any) -> None:
        """Add a record and write the file."""
        self.report["records"].append({**labels, **values})
        with replaced_when_complete(self.output) as path:
            path.write_text(json.dumps(self.report, indent=2) + "\n")

    def add_series(
        self,
        labels: Mapping[str, Any],
        series: Mapping[str, list[float]],
        references: Sequence[str] = (),
        details: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Add a record for each method of interleaved measurements.

        Args:
            labels: What is measured.
            series: Seconds of each repetition, by the name of the method.
            references: Methods to give ratios to, in the same repetition.
            details: Other values of a record, by the name of the method.
        """
        relative = {reference: ratios(series, reference) for reference in references if reference in series}
        for name, seconds in series.items():
            self.add(
                {**labels, "method": name, "fused": _FUSED.get(name)},
                status="measured",
                milliseconds=quartiles([1000 * s for s in seconds]),
                number=len(seconds),
                ratios={reference: relative[reference][name] for reference in relative},
                **(details or {}).get(name, {}),
            )


@dataclass(frozen=True)
class Part:
    """A part of a run.

    Attributes:
        labels: What is measured.
        measure: Measures it and adds records to a run.
        needed_gib: The free memory of a GPU that it needs.
    """

    labels: dict[str, Any]
    measure: Callable[[Run], None]
    needed_gib: float = 0.0


def parts(sizes: Sizes) -> list[Part]:
    """Return all parts of a run, the most important first."""
    return [
        *(_training_part("eager", *size) for size in sizes.training),
        Part({"quantity": "allocator step"}, _measure_allocator),
        Part({"quantity": "condensing"}, _measure_condensing),
        Part({"quantity": "inference"}, _measure_inference, _NEEDED_GIB.get(sizes.inference[0], 0.0)),
        *(_training_part(mode, *size) for mode in ("compiled", "compiled, alone") for size in sizes.training),
    ]


def _training_part(mode: str, shape: Shape, batch: int, length: int) -> Part:
    size = f"{batch} x {length} tokens" if length else f"{batch} images"
    labels = {"quantity": "training step", "shape": shape, "size": size, "mode": mode}
    return Part(labels, functools.partial(_measure_training, labels, shape, batch, length), _NEEDED_GIB.get(shape, 0.0))


def _measure_training(labels: dict[str, Any], shape: Shape, batch: int, length: int, run: Run) -> None:
    """Time training steps of all methods, and the allocator alone."""
    model = build_model(shape, run.device, torch.bfloat16)
    inputs = build_inputs(model, batch, length)
    # The first training step creates handles and workspaces of the device, which belong to no method.
    built, optimizer, after = BUILDERS["floor"](model, 8, 0.0, False)
    train_step(built, optimizer, after, inputs, False)
    del built, optimizer, after
    _free()
    shared = allocated_mib(run.device)
    steps: dict[str, Callable[[], None]] = {}
    allocate: dict[str, Callable[[], None]] = {}
    details: dict[str, dict[str, float]] = {}

    def start(name: str) -> None:
        # The other methods' adapters and optimizers are no part of this method's memory.
        others = allocated_mib(run.device) - shared
        built, optimizer, after = BUILDERS[name](model, 8, 0.0, False)
        if labels["mode"] != "eager":
            built.compile(backend=run.sizes.compiler)
        step = functools.partial(train_step, built, optimizer, after, inputs, False)
        first = timed(step, run.device)
        details[name] = {
            "first step seconds": first,
            "memory MiB": measure_memory(step, built, run.device) - others,
        }
        steps[name] = step
        if name == "La-LoRA":
            allocate["RankAllocator.step"] = after

    # Every method needs a graph of its own. By default, torch runs the ninth of the same code without compiling it.
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        for name in METHODS[labels["mode"]]:
            run.attempt({**labels, "method": name}, functools.partial(start, name))
        try:
            series = interleave(steps, run.sizes.repeats, run.device, warmup=3)
        except Exception:
            # What each method has shown so far is kept.
            for name, values in details.items():
                run.add({**labels, "method": name}, status="not timed", **values)
            raise
        run.add_series(labels, series, ("PEFT LoRA", "our layers"), details)
    if labels["mode"] == "eager":
        run.add_series({**labels, "quantity": "allocator step"}, interleave(allocate, 50, run.device, warmup=5))


def _measure_allocator(run: Run) -> None:
    """Time the allocator with the shapes of LLaMA-70B."""
    for layers in run.sizes.allocator:
        step = allocator.build(layers, len(allocator.PROJECTIONS), 16, run.device)[0].step
        labels = {"quantity": "allocator step", "shape": "llama-70b", "size": f"{layers} blocks", "mode": "eager"}
        run.add_series(labels, interleave({"RankAllocator.step": step}, 20, run.device, warmup=3))


def _measure_condensing(run: Run) -> None:
    """Time ``condense_lora`` of all linear layers to half of the ranks."""
    for shape, rank in run.sizes.condensing:
        result = condensing.measure(shape, rank, 5, run.device)
        labels = {"quantity": "condensing", "shape": shape, "size": f"rank {rank}", "mode": "eager"}
        memory = {"memory MiB": result["adapter MiB"] + result["additional MiB"]} if run.device.type == "cuda" else {}
        run.add_series(labels, {"condense_lora": result["seconds"]}, details={"condense_lora": memory})


def _measure_inference(run: Run) -> None:
    """Time the first and the later tokens of a generated text, before and after merging."""
    shape, prompt, tokens = run.sizes.inference
    model = build_model(shape, run.device, torch.bfloat16).eval()
    inputs = build_inputs(model, 1, prompt)["input_ids"]
    models = inference.build_models(model, 16)
    series = inference.measure(models, inputs, tokens, 7, run.device)
    details = {}
    if run.device.type == "cuda":
        for name, own in models.items():
            # All models are in memory, but only this one's is counted.
            others = allocated_mib(run.device) - inference.held_mib(own)
            reset_peak_memory(run.device)
            inference.generate(own, inputs, tokens)
            details[name] = {"memory MiB": (peak_memory_mib(run.device) or 0.0) - others}
    for token in ("first token", "later token"):
        labels = {"quantity": token, "shape": shape, "size": f"{prompt} + {tokens} tokens", "mode": "eager"}
        run.add_series(labels, series[token], ("PEFT LoRA", "base"), details)


def render_report(report: Mapping[str, Any]) -> str:
    """Return the tables of a report in Markdown, one for each quantity and mode, and what was not measured."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    missing = []
    for record in report["records"]:
        if record["status"] == "measured":
            groups.setdefault((record["quantity"], record["mode"]), []).append(record)
        else:
            missing.append(record)
    lines = [", ".join(f"{key} {value}" for key, value in report["machine"].items()) + "."]
    for (quantity, mode), records in groups.items():
        rows = [_cells(record, report["settings"]["memory"]) for record in records]
        header = list(dict.fromkeys(title for row in rows for title in row))
        table = markdown_table(header, [[row.get(title, "") for title in header] for row in rows])
        lines += ["", f"{quantity}, {mode}:".capitalize(), "", table]
    if missing:
        keys = ("quantity", "shape", "size", "mode", "method", "status", "reason")
        reasons = [[str(record.get(key, ""))[:300] for key in keys] for record in missing]
        lines += ["", "Not measured:", "", markdown_table(keys, reasons)]
    return "\n".join(lines)


def _cells(record: Mapping[str, Any], memory: str) -> dict[str, str]:
    cells = {
        "shape": f"{record['shape']}, {record['size']}",
        "method": record["method"],
        "ms": spread(record["milliseconds"]),
        **{f"ratio to {name}": spread(ratio) for name, ratio in record["ratios"].items()},
    }
    if "memory MiB" in record:
        cells[memory] = f"{record['memory MiB']:,.1f}"
    if "first step seconds" in record:
        cells["first step, s"] = f"{record['first step seconds']:.1f}"
    return cells


def _machine(device: torch.device) -> dict[str, str]:
    """Return the names of the device and of its driver, and the versions of the libraries."""
    smi = shutil.which("nvidia-smi")
    driver = ["--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "device": machine(device),
        "driver": subprocess.run([smi, *driver], capture_output=True, text=True).stdout.strip() if smi else "unknown",
        "CUDA": str(torch.version.cuda),
        **{name: version(name) for name in ("peft", "transformers", "lalora-lightning")},
    }


def _free() -> None:
    """Free the memory of what was measured before."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
