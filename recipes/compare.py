"""Compare methods on tasks over seeds: the same data, order, schedule, head and evaluation for all.

    python -m recipes.compare --tasks digits --methods lora lalora lalora:gamma=4 --seeds 0 1 2 3 4
    python -m recipes.compare --tasks glue/mrpc --methods lora "lalora:growth=stored,contribution_scale=absolute"
    python -m recipes.compare --tasks digits --methods lora lalora --learning_rates 1e-3 3e-3 1e-2

Each run is added to a file of JSON lines as soon as it is done, and is not done again. At the end the tables stand
beside it as Markdown and CSV, with a picture of each.
"""

import dataclasses
import gc
import importlib.metadata
import itertools
import math
import platform
import sys
from pathlib import Path

import lightning.pytorch as pl
import transformers
from jsonargparse import ArgumentParser

import lalora_lightning
from recipes.benchmarking import machine
from recipes.comparison import (
    Record,
    append_record,
    label,
    markdown,
    pictures,
    read_records,
    run_key,
    summarize,
    write_csv,
)
from recipes.digits import NamedProgressBar
from recipes.measuring import Costs
from recipes.methods import METHODS, parse_method
from recipes.ranks import layer_ranks, trimmed_parameters
from recipes.reporting import quiet
from recipes.tasks import TASKS, Task, TaskSettings, build_task

# The learning rate is searched with a seed that no comparison has.
SEARCH_SEED = 1_000_000
VERSIONS = {
    "python": platform.python_version(),
    "lalora-lightning": lalora_lightning.__version__,
    **{name: importlib.metadata.version(name) for name in ("torch", "lightning", "transformers", "timm", "peft")},
}


def compare(
    tasks: list[str],
    methods: list[str],
    seeds: list[int],
    learning_rates: list[float],
    task_settings: TaskSettings,
    output: Path = Path("runs/compare.jsonl"),
    precision: str = "32-true",
    report_only: bool = False,
) -> None:
    """Do the runs that are not done yet and write the tables.

    Args:
        tasks: Names of tasks.
        methods: Methods, each ``name`` or ``name:setting=value,setting=value``.
        seeds: Of the head, the order of the rows and dropout; the pretrained backbone is the same for all.
        learning_rates: Peaks of the schedule. One is shared by all methods; of several, each method takes the one that
            scores best with a seed held out. None: each task's own.
        task_settings: What the tasks are made of.
        output: File of the runs; the tables go beside it.
        precision: Of the Trainer.
        report_only: Only read the file and write the tables.

    Raises:
        ValueError: A method, a setting or a task is unknown.
        FileNotFoundError: Data or model cannot be reached or found.
    """
    quiet()
    # A new head is meant, and thousands of bars say nothing.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    planned = [parse_method(spec) for spec in methods]
    learning_rates = sorted(learning_rates)
    done = {run_key(record): record for record in read_records(output)}
    for name in [] if report_only else tasks:
        task = build_task(name, task_settings)
        rates = learning_rates or [task.learning_rate]
        # Seed by seed, so that what is there so far can be compared.
        runs = list(itertools.product(seeds, planned))
        for number, (seed, (method, settings)) in enumerate(runs, 1):
            plan = {
                "task": task.name,
                "task_settings": task.settings,
                "method": method.name,
                "settings": {**method.defaults, **settings},
                "learning_rates": rates,
                "precision": precision,
            }
            try:
                rate = rates[0] if len(rates) == 1 else search_learning_rate(task, plan, done, output)
                run = {**plan, "seed": seed, "searched": None, "learning_rate": rate}
                run_once(task, run, done, output, f"{number}/{len(runs)}")
            except ValueError as error:
                # The method does not apply, or its settings do not fit: the others go on.
                if seed == seeds[0]:
                    print(f"{task.name}, {label(plan)}: {error}", file=sys.stderr)

    rows = summarize(done.values())
    tables = markdown(rows)
    output.with_suffix(".md").write_text(tables)
    write_csv(output.with_suffix(".csv"), rows)
    files = [output.with_suffix(".md"), output.with_suffix(".csv")]
    for name, figure in pictures(rows).items():
        files.append(output.with_name(f"{output.stem}-{name}.png"))
        figure.savefig(files[-1], dpi=120)
    print(f"\n{tables}\n{output}, {', '.join(file.name for file in files)}")


def search_learning_rate(task: Task, plan: Record, done: dict[str, Record], output: Path) -> float:
    """The learning rate that scores best with the held-out seed; a score that is not a number is the worst."""
    scores = {}
    for rate in plan["learning_rates"]:
        # The same run in a grid of other rates.
        search = {**plan, "learning_rates": [rate], "seed": SEARCH_SEED, "searched": rate, "learning_rate": rate}
        score = run_once(task, search, done, output, f"learning rate {rate:g}")["score"]
        scores[rate] = -math.inf if math.isnan(score) else score
    return max(scores, key=scores.__getitem__)


def run_once(task: Task, plan: Record, done: dict[str, Record], output: Path, title: str) -> Record:
    """The record of a run; unless it is in ``done``, the run is done and added there and to the file."""
    key = run_key(plan)
    if key not in done:
        done[key] = {**plan, **train(task, plan, title)}
        append_record(output, done[key])
    return done[key]


def train(task: Task, plan: Record, title: str) -> Record:
    """Train and test once; what was measured. The title goes before the progress bar.

    Raises:
        ValueError: The method cannot adapt the task's model, a setting is out of range, or there are no batches.
    """
    pl.seed_everything(plan["seed"], verbose=False)
    module = task.new_module(plan["learning_rate"])
    callbacks = METHODS[plan["method"]].adapt(module, **plan["settings"])
    costs = Costs()
    bar = NamedProgressBar(f"{title} {task.name}, {label(plan)}, seed {plan['seed']}")
    trainer = pl.Trainer(
        max_steps=task.steps,
        max_epochs=task.epochs,
        accelerator="auto",
        devices=1,
        precision=plan["precision"],
        callbacks=[*callbacks, costs, bar],
        logger=False,
        # Nothing is chosen by them, and on a CPU they can take longer than training.
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    fit_data, test_data = task.loaders(plan["seed"])
    gc.collect()
    trainer.fit(module, **fit_data)
    if trainer.global_step == 0:
        raise ValueError("Expected at least one batch of training rows but there is none; lower --batch_size.")
    (scores,) = trainer.test(module, **test_data, verbose=False)
    return {
        "metric": task.metric,
        "score": scores[task.metric],
        "scores": dict(scores),
        "trainable_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "final_parameters": trimmed_parameters(module),
        "ranks": (ranks := layer_ranks(module)),
        "total_rank": sum(ranks.values()) if ranks else None,
        "seconds": costs.seconds,
        "memory_mib": costs.mebibytes,
        "steps": trainer.global_step,
        "device": machine(trainer.strategy.root_device),
        "versions": VERSIONS,
    }


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["digits"], help="What is trained for.")
    parser.add_argument(
        "--methods", nargs="+", default=["lora", "lalora"], help=f"Of {', '.join(METHODS)}; name:setting=value,..."
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Of the runs of each method.")
    parser.add_argument(
        "--learning_rates",
        nargs="+",
        type=float,
        default=[],
        help="One that all methods share, or several to search; by default each task's own.",
    )
    parser.add_class_arguments(TaskSettings)
    parser.add_function_arguments(compare, skip={"tasks", "methods", "seeds", "learning_rates", "task_settings"})
    arguments = parser.parse_args().as_dict()
    names = [field.name for field in dataclasses.fields(TaskSettings)]
    settings = TaskSettings(**{name: arguments.pop(name) for name in names})
    try:
        for spec in arguments["methods"]:
            parse_method(spec)
    except ValueError as error:
        parser.error(str(error))
    try:
        compare(task_settings=settings, **arguments)
    except FileNotFoundError as error:
        sys.exit(f"error: {error} Here the options are --model, --glue_path and --cifar10_path.")
