"""Compare methods on tasks and seeds, with the same data, order, schedule, head and evaluation for all methods.

    python -m recipes.compare --tasks digits --methods lora lalora lalora:gamma=4 --seeds 0 1 2 3 4
    python -m recipes.compare --tasks glue/mrpc --methods lora "lalora:growth=stored,contribution_scale=absolute"
    python -m recipes.compare --tasks digits --methods lora lalora --learning_rates 1e-3 3e-3 1e-2

Each run is added to a JSON lines file as soon as it is done. Runs in this file are not repeated. The tables are written
next to this file as Markdown and CSV, with a figure for each table. The exit status is 1 if a run has failed.
"""

import dataclasses
import itertools
import math
import sys
from pathlib import Path

import transformers
from jsonargparse import ArgumentParser

from recipes.comparison import (
    Record,
    append_record,
    figures,
    label,
    markdown,
    read_records,
    run_key,
    summarize,
    write_csv,
)
from recipes.comparison.tasks import TASKS, ComparisonTask, TaskSettings, build_task
from recipes.comparison.training import train
from recipes.console import quiet
from recipes.methods import METHODS, NotApplicableError, parse_method

__all__ = ["SEARCH_SEED", "Comparison", "compare", "main", "write_report"]

SEARCH_SEED = 1_000_000
"""Seed for the search of learning rates; the compared runs do not use it."""

# The options for the arguments that error messages of the package name.
_OPTIONS = "Options of this recipe: --model for name, --glue_path or --cifar10_path for path"


def compare(
    tasks: list[str],
    methods: list[str],
    seeds: list[int],
    learning_rates: list[float],
    task_settings: TaskSettings,
    output: Path = Path("runs/compare.jsonl"),
    precision: str = "32-true",
    report_only: bool = False,
) -> int:
    """Do the missing runs and write the tables.

    Args:
        tasks: Names of tasks.
        methods: Methods, each as ``name`` or ``name:setting=value,setting=value``.
        seeds: Seeds of the head, the order of the rows and dropout; the pretrained backbone is the same for all.
        learning_rates: Peak learning rates. A single value is used for all methods. With several values, each method
            uses the one that scores best with a held-out seed. Without a value, each task's default is used.
        task_settings: Settings of the tasks.
        output: File for the runs; the tables are written next to it.
        precision: Precision of the Trainer.
        report_only: Only read the file and write the tables.

    Returns:
        The number of runs that failed.

    Raises:
        ValueError: A method, a setting or a task is unknown.
        FileNotFoundError: Data or model cannot be found or downloaded.
    """
    quiet()
    # The warning about a new head is expected, and thousands of progress bars would be printed.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    planned = [parse_method(spec) for spec in methods]
    comparison = Comparison(output)
    for name in [] if report_only else tasks:
        task = build_task(name, task_settings)
        rates = sorted(learning_rates) or [task.learning_rate]
        plans: list[Record] = [
            {
                "task": task.name,
                "task_settings": task.settings,
                "method": method.name,
                "settings": {**method.defaults, **settings},
                "learning_rates": rates,
                "precision": precision,
            }
            for method, settings in planned
        ]
        comparison.run(task, plans, seeds)
    write_report(list(comparison.done.values()), output)
    return comparison.failed


class Comparison:
    """The runs of a comparison, in a file to which new runs are added.

    Args:
        output: The file.

    Attributes:
        done: The records of all runs by key.
        failed: Number of runs that failed.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.done = {run_key(record): record for record in read_records(output)}
        self.failed = 0

    def run(self, task: ComparisonTask, plans: list[Record], seeds: list[int]) -> None:
        """Run each plan with each seed.

        All plans are run with one seed before the next, so that methods can be compared before all seeds are done.

        Args:
            task: The task.
            plans: The methods, with everything that identifies a run except for seed and learning rate.
            seeds: The seeds.
        """
        # The learning rate of each plan by its index; None for a plan that cannot be run.
        chosen: dict[int, float | None] = {}
        runs = list(itertools.product(seeds, enumerate(plans)))
        for number, (seed, (index, plan)) in enumerate(runs, 1):
            try:
                if index not in chosen:
                    chosen[index] = self.choose_learning_rate(task, plan)
                rate = chosen[index]
                if rate is not None:
                    run = {**plan, "seed": seed, "searched": None, "learning_rate": rate}
                    self.run_once(task, run, f"{number}/{len(runs)}")
            except NotApplicableError as error:
                print(f"{task.name}, {label(plan)}: {error}", file=sys.stderr)
                chosen[index] = None

    def choose_learning_rate(self, task: ComparisonTask, plan: Record) -> float | None:
        """Find the learning rate that scores best with the held-out seed.

        Returns:
            The learning rate; None if a run of the search failed. A score of NaN counts as the worst.
        """
        rates = plan["learning_rates"]
        if len(rates) == 1:
            return rates[0]
        scores = {}
        for rate in rates:
            # The other rates are not part of the key, so that a search over other rates can use the same runs.
            search = {**plan, "learning_rates": [rate], "seed": SEARCH_SEED, "searched": rate, "learning_rate": rate}
            record = self.run_once(task, search, f"learning rate {rate:g}")
            if record is not None:
                scores[rate] = -math.inf if math.isnan(record["score"]) else record["score"]
        if len(scores) < len(rates):
            print(
                f"{task.name}, {label(plan)}: skipped, because the search of its learning rate failed.", file=sys.stderr
            )
            return None
        return max(scores, key=scores.__getitem__)

    def run_once(self, task: ComparisonTask, plan: Record, title: str) -> Record | None:
        """Do a run, unless its record exists, and add its record to the file.

        Args:
            task: The task.
            plan: Everything that identifies the run.
            title: Start of the text in front of the progress bar.

        Returns:
            The record; None if the run failed. The error is then printed and counted.

        Raises:
            NotApplicableError: The method cannot adapt the task's model.
        """
        key = run_key(plan)
        if key not in self.done:
            try:
                measured = train(task, plan, title)
            except NotApplicableError:
                raise
            except ValueError as error:
                self.failed += 1
                run = f"{task.name}, {label(plan)}, seed {plan['seed']}, learning rate {plan['learning_rate']:g}"
                print(f"{run}: {error}", file=sys.stderr)
                return None
            self.done[key] = {**plan, **measured}
            append_record(self.output, self.done[key])
        return self.done[key]


def write_report(records: list[Record], output: Path) -> None:
    """Write the tables and figures next to the file of the runs, and print the tables."""
    rows = summarize(records)
    tables = markdown(rows)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".md").write_text(tables)
    write_csv(output.with_suffix(".csv"), rows)
    files = [output.with_suffix(".md"), output.with_suffix(".csv")]
    for name, figure in figures(rows).items():
        files.append(output.with_name(f"{output.stem}-{name}.png"))
        figure.savefig(files[-1], dpi=120)
    print(f"\n{tables}\n{output}, {', '.join(file.name for file in files)}")


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
        help="One value for all methods, or several values to search; by default, each task has its own.",
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
        failed = compare(task_settings=settings, **arguments)
    except FileNotFoundError as error:
        sys.exit(f"error: {error}\n{_OPTIONS}")
    if failed:
        sys.exit(f"error: {failed} {'run' if failed == 1 else 'runs'} failed, see the messages above")


if __name__ == "__main__":
    main()
