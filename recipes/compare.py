"""Compare methods on tasks and seeds, with the same data, order, schedule, head and evaluation for all methods.

    python -m recipes.compare --tasks digits --methods lora lalora lalora:gamma=4 --seeds 0 1 2 3 4
    python -m recipes.compare --tasks glue/mrpc --methods lora "lalora:growth=stored,contribution_scale=absolute"
    python -m recipes.compare --tasks digits --methods lora lalora --learning_rates 5e-3 --jobs 2

Each method is trained at its own learning rate, which is chosen on training rows that are held out, with two other
seeds: the best of five or more rates, see recipes/README.md. Each run is added to a JSON lines file as soon as it is
done. Runs in this file are not repeated. The tables are written next to this file as Markdown and CSV, with a figure
for each table. The exit status is 1 if a run has failed.
"""

import dataclasses
import functools
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
import transformers
from jsonargparse import ArgumentParser

from recipes.comparison import (
    REFERENCE,
    Record,
    append_record,
    figures,
    label,
    markdown,
    read_records,
    run_key,
    run_title,
    summarize,
    write_csv,
)
from recipes.comparison.selection import (
    SELECTION_SEEDS,
    ProtocolError,
    best_rate,
    new_protocol,
    next_runs,
    rate_grid,
    require_same_protocol,
    selection,
)
from recipes.comparison.tasks import TASKS, ComparisonTask, TaskSettings, build_task
from recipes.comparison.training import train
from recipes.console import quiet
from recipes.methods import METHODS, NotApplicableError, method_label, parse_method

__all__ = ["Comparison", "compare", "main", "write_report"]

# The options for the arguments that error messages of the package name.
_OPTIONS = (
    "Options of this recipe: --model or --language_model for name; --glue_path, --cifar10_path or --dialogsum_path "
    "for path"
)


def compare(
    tasks: list[str],
    methods: list[str],
    seeds: list[int],
    learning_rates: list[float],
    task_settings: TaskSettings,
    output: Path = Path("runs/compare.jsonl"),
    precision: str = "32-true",
    baseline: str = REFERENCE,
    jobs: int = 1,
    report_only: bool = False,
) -> int:
    """Do the missing runs and write the tables.

    Args:
        tasks: Names of tasks.
        methods: Methods, each as ``name`` or ``name:setting=value,setting=value``.
        seeds: Seeds of the head, the order of the rows and dropout; the pretrained backbone is the same for all.
        learning_rates: Peak learning rates, of which each method uses its best one. A single value is used for all
            methods, without a choice. Without a value, there are five, a factor of 2 apart.
        task_settings: Settings of the tasks.
        output: File for the runs; the tables are written next to it.
        precision: Precision of the Trainer.
        baseline: The method to which the others are compared in the tables.
        jobs: Number of runs at a time, each in a process with one thread; 1 uses this process and all its threads.
        report_only: Only read the file and write the tables.

    Returns:
        The number of planned runs that failed.

    Raises:
        ValueError: A method, a setting or a task is unknown, or a seed is one of those that choose learning rates.
        ProtocolError: The file has runs whose learning rates were chosen differently.
        FileNotFoundError: Data or model cannot be found or downloaded.
    """
    _quiet()
    planned = [parse_method(spec) for spec in methods]
    compared_to = method_label(*parse_method(baseline))
    if reserved := set(seeds) & set(SELECTION_SEEDS):
        raise ValueError(f"Expected seeds that do not choose learning rates but got {min(reserved)}; use another seed.")
    comparison = Comparison(output)
    for name in [] if report_only else tasks:
        task = build_task(name, task_settings)
        protocol = new_protocol(learning_rates or rate_grid(task.learning_rate))
        require_same_protocol(comparison.done.values(), task.name, protocol, task.backbone)
        plans: list[Record] = [
            {
                "task": task.name,
                "task_settings": task.settings,
                "method": method.name,
                "settings": {**method.defaults, **settings},
                "protocol": protocol,
                "precision": precision,
            }
            for method, settings in planned
        ]
        if jobs == 1:
            job: Callable[[Record], Record] = functools.partial(train, task, progress_bar=sys.stderr.isatty())
        else:
            job = functools.partial(_train_in_worker, name, task_settings)
        with _pool(jobs) as pool:
            comparison.run(plans, seeds, pool, job, jobs)
    write_report(list(comparison.done.values()), output, compared_to)
    return comparison.failed


class Comparison:
    """The runs of a comparison, in a file to which new runs are added.

    Args:
        output: The file.

    Attributes:
        done: The records of all runs by key. Those of failed runs have the reason as ``failed``, and no score.
        failed: Number of planned runs that failed, and of methods without a learning rate.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.done = {run_key(record): record for record in read_records(output)}
        self.failed = 0

    def run(
        self, plans: list[Record], seeds: list[int], pool: Executor, train: Callable[[Record], Record], jobs: int = 1
    ) -> None:
        """Choose the learning rate of each plan, and run it with each seed.

        Args:
            plans: The methods, with everything that identifies a run except for seed and learning rate.
            seeds: The seeds.
            pool: Executes the runs.
            train: A function from a planned run to what it measures.
            jobs: Number of runs at a time.
        """
        plans = list(plans)
        running: dict[Future[Record], Record] = {}
        # Without the runs that failed earlier, which are repeated.
        outcomes = {key: record for key, record in self.done.items() if "failed" not in record}
        while True:
            started = {run_key(run) for run in running.values()}
            for run in next_runs(plans, seeds, outcomes):
                if len(running) == jobs:
                    break
                if run_key(run) not in started:
                    started.add(run_key(run))
                    running[pool.submit(train, run)] = run
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                try:
                    measured = future.result()
                except BrokenProcessPool:
                    raise
                except NotApplicableError as error:
                    # The other runs of this plan may have started already.
                    if same := [plan for plan in plans if plan.items() <= run.items()]:
                        print(f"{run['task']}, {label(run)}: {error}", file=sys.stderr)
                        plans = [plan for plan in plans if plan not in same]
                    continue
                except Exception as error:
                    # At some learning rates, a method may diverge.
                    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                    measured = {"failed": f"{kind}{error}"}
                outcomes[run_key(run)] = {**run, **measured}
                self.add(outcomes[run_key(run)])
        for plan in plans:
            scores, _ = selection(plan, outcomes)
            compared = [outcomes.get(run_key({**plan, "seed": seed, "searched": None})) for seed in seeds]
            self.failed += sum(run is not None and "failed" in run for run in compared)
            if scores and best_rate(scores) is None:
                self.failed += 1
                print(
                    f"{plan['task']}, {label(plan)}: skipped, because it has no score at any learning rate.",
                    file=sys.stderr,
                )

    def add(self, record: Record) -> None:
        """Add the record of a run to the file, and print its score or why it failed."""
        self.done[run_key(record)] = record
        append_record(self.output, record)
        if "failed" in record:
            print(f"{run_title(record)}: {record['failed']}", file=sys.stderr)
            return
        rows = "" if record["searched"] is None else "selection: "
        print(f"{rows}{run_title(record)}: {100 * record['score']:.1f} in {record['seconds']:.0f} s", flush=True)


def write_report(records: list[Record], output: Path, baseline: str = REFERENCE) -> None:
    """Write the tables and figures next to the file of the runs, and print the tables."""
    rows = summarize(records, baseline)
    tables = markdown(rows, baseline)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".md").write_text(tables)
    write_csv(output.with_suffix(".csv"), rows)
    files = [output.with_suffix(".md"), output.with_suffix(".csv")]
    for name, figure in figures(rows).items():
        files.append(output.with_name(f"{output.stem}-{name}.png"))
        figure.savefig(files[-1], dpi=120)
    print(f"\n{tables}\n{output}, {', '.join(file.name for file in files)}")


class _InThisProcess(Executor):
    """Does each run when it is submitted."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _pool(jobs: int) -> Executor:
    if jobs == 1:
        return _InThisProcess()
    # A process that was forked from one with threads of torch can block.
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, spawn, initializer=_start_worker)


def _start_worker() -> None:
    torch.set_num_threads(1)
    _quiet()


def _train_in_worker(name: str, settings: TaskSettings, run: Record) -> Record:
    return train(_task(name, settings), run)


@functools.cache
def _task(name: str, settings: TaskSettings) -> ComparisonTask:
    return build_task(name, settings)


def _quiet() -> None:
    quiet()
    # The warning about a new head is expected, and thousands of progress bars would be printed.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def main() -> None:
    """Run the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["digits"], help="The tasks to train on.")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["lora", "lalora"],
        help=f"One or more of {', '.join(METHODS)}; with settings as name:setting=value,setting=value.",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Seeds of the runs of each method.")
    parser.add_argument(
        "--learning_rates",
        nargs="+",
        type=float,
        default=[],
        help="Several values to choose from, or one for all methods; by default five values around the task's own.",
    )
    parser.add_class_arguments(TaskSettings)
    parser.add_function_arguments(compare, skip={"tasks", "methods", "seeds", "learning_rates", "task_settings"})
    arguments = parser.parse_args().as_dict()
    names = [field.name for field in dataclasses.fields(TaskSettings)]
    settings = TaskSettings(**{name: arguments.pop(name) for name in names})
    try:
        for spec in (*arguments["methods"], arguments["baseline"]):
            parse_method(spec)
    except ValueError as error:
        parser.error(str(error))
    try:
        failed = compare(task_settings=settings, **arguments)
    except FileNotFoundError as error:
        sys.exit(f"error: {error}\n{_OPTIONS}")
    except ProtocolError as error:
        sys.exit(f"error: {error}\nOption of this recipe: --output for the file")
    except ValueError as error:
        sys.exit(f"error: {error}")
    if failed:
        sys.exit(f"error: {failed} {'run' if failed == 1 else 'runs'} failed, see the messages above")


if __name__ == "__main__":
    main()
