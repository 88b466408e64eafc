"""The planted test: damage known projections of a trained model, adapt it, and see which ranks they get.

A small vision transformer is trained on scikit-learn's 1,797 digits. Then the four largest singular values of a few of
its 36 projections change their sign, and the damaged model is adapted to the same digits. All its linear layers have
adapters, which together end with only as many parameters as rank 1 has. A good allocation gives the highest ranks to
the damaged projections.

    python -m recipes.planted --help
"""

import copy
import dataclasses
import functools
import itertools
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from jsonargparse import ArgumentParser
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lalora_lightning import LaLoraCallback, lora_layers
from lalora_lightning.adapters import find_targets
from lalora_lightning.intervals import confidence
from lalora_lightning.modules.image_classification import ImageClassificationModule
from lalora_lightning.names import blocks_by_kind, group_names
from lalora_lightning.plotting import plot_rank_map
from lalora_lightning.tables import block_table, text_table
from recipes.comparison.records import append_record, read_lines
from recipes.console import mean_and_spread, quiet
from recipes.digits import new_model, split_digits, upright_digits
from recipes.methods.fused_projections import split_fused

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "ALLOCATIONS",
    "DIRECTIONS",
    "Damage",
    "Outcome",
    "Place",
    "PlantedTest",
    "draw",
    "main",
    "rank_table",
    "ranked_above",
    "read_outcomes",
    "share_of_first",
    "summary",
    "turn_largest_directions",
]

Place = Literal["anywhere", "attention", "feed-forward", "early", "late"]

DIRECTIONS = 4
"""Number of singular directions of a projection that are damaged."""

ALLOCATIONS: dict[str, dict[str, Any]] = {
    "norms": {"contribution": "norm"},
    "Fisher": {"contribution": "fisher"},
    "condensed": {"fixed_ranks": True, "condense_to": True},
    "grown and condensed": {"condense_to": True},
}
"""Settings of LaLoraCallback. The first two grow to the final number of parameters; the others exceed it first."""


@dataclasses.dataclass(frozen=True)
class Damage:
    """What is done to a trained model.

    Attributes:
        number: Number of damaged projections.
        strength: The largest singular values are multiplied by ``1 - 2 * strength``: 0.5 removes them, 1 turns them
            around.
        where: Where the damaged projections are drawn: anywhere, in the attention or feed-forward modules, or in the
            first or last half of the blocks.
    """

    number: int = 2
    strength: float = 1.0
    where: Place = "anywhere"

    def draw(self, names: Sequence[str], depth: int, seed: int) -> list[str]:
        """Draw the projections to damage.

        Args:
            names: Names of all projections, such as ``model.blocks.0.attn.proj``.
            depth: Number of blocks.
            seed: Seed of the draw.
        """
        early = {f"blocks.{i}." for i in range(depth // 2)}
        selected = {
            "anywhere": lambda name: True,
            "attention": lambda name: ".attn." in name,
            "feed-forward": lambda name: ".mlp." in name,
            "early": lambda name: any(block in name for block in early),
            "late": lambda name: not any(block in name for block in early),
        }[self.where]
        return random.Random(seed).sample([name for name in names if selected(name)], self.number)

    def __str__(self) -> str:
        """Return a short description."""
        return f"{self.number} {self.where}, strength {self.strength:g}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A run.

    Attributes:
        damage: What was done to the model.
        seed: Seed of the damage and of the run.
        allocation: Key of :data:`ALLOCATIONS`.
        settings: Settings of the runs.
        damaged: Names of the damaged projections.
        ranks: Final rank of every projection, by name.
        accuracy: Test accuracy in percent of the model when it was ``"trained"``, ``"damaged"`` and ``"adapted"``.
        seconds: Duration of the adaptation.
    """

    damage: Damage
    seed: int
    allocation: str
    settings: dict[str, Any]
    damaged: list[str]
    ranks: dict[str, int]
    accuracy: dict[str, float]
    seconds: float


def main(
    number: tuple[int, ...] = (2,),
    strength: tuple[float, ...] = (1.0,),
    where: tuple[Place, ...] = ("anywhere",),
    seeds: int = 1,
    first_seed: int = 0,
    rank: int = 8,
    average_rank: float = 1.0,
    steps: int = 120,
    learning_rate: float = 1e-2,
    training_steps: int = 1000,
    output: Path = Path("runs/planted"),
    records: Path | None = None,
) -> None:
    """Damage projections of a trained model, adapt it, and compare the ranks of damaged and other projections.

    Args:
        number: Numbers of damaged projections; each is combined with each strength and place.
        strength: The largest singular values are multiplied by 1 - 2 * strength: 0.5 removes them, 1 turns them around.
        where: Where the damaged projections are: anywhere, attention, feed-forward, early or late.
        seeds: Number of runs of each allocation and damage; 0 only reads the records.
        first_seed: Seed of the first of these runs; the others have the next seeds.
        rank: Maximum rank of a projection.
        average_rank: The adapters end with as many parameters as LoRA with this rank.
        steps: Optimizer steps of a run.
        learning_rate: Peak learning rate of AdamW.
        training_steps: Optimizer steps in which the model is trained before it is damaged.
        output: Folder for the figure.
        records: A file of JSON lines to which each run is added. Runs that are in it are not repeated, and all of them
            with these settings are part of the table.
    """
    quiet()
    test = PlantedTest(rank, average_rank, steps, learning_rate, training_steps)
    outcomes = [] if records is None else [run for run in read_outcomes(records) if run.settings == vars(test)]
    done = {(run.damage, run.seed, run.allocation): run for run in outcomes}
    shown = outcomes[-len(ALLOCATIONS) :]
    for damage in itertools.starmap(Damage, itertools.product(number, strength, where)):
        for seed in range(first_seed, first_seed + seeds):
            shown = []
            for allocation in ALLOCATIONS:
                run = done.get((damage, seed, allocation))
                if run is None:
                    run = test.run(damage, seed, allocation)
                    print(f"{damage}, seed {seed}, {allocation}: {run.accuracy['adapted']:.1f} %", flush=True)
                    outcomes.append(run)
                    if records is not None:
                        append_record(records, dataclasses.asdict(run))
                shown.append(run)
    for run in shown:
        print(f"\nRanks, {run.allocation}; an asterisk marks the damaged projections:\n")
        print(rank_table(run))
    print(f"\n{summary(outcomes)}")
    output.mkdir(parents=True, exist_ok=True)
    for run in shown:
        if run.allocation == "condensed":
            draw(run).savefig(output / "ranks.png", dpi=150)
            print(f"\nMap of the ranks: {output / 'ranks.png'}")


@dataclasses.dataclass
class PlantedTest:
    """The settings of the runs; the model is trained when it is first needed.

    Attributes:
        rank: Maximum rank of a projection.
        average_rank: The adapters end with as many parameters as LoRA with this rank.
        steps: Optimizer steps of a run.
        learning_rate: Peak learning rate of AdamW.
        training_steps: Optimizer steps in which the model is trained before it is damaged.
    """

    rank: int = 8
    average_rank: float = 1.0
    steps: int = 120
    learning_rate: float = 1e-2
    training_steps: int = 1000

    def run(self, damage: Damage, seed: int, allocation: str) -> Outcome:
        """Damage a copy of the trained model and adapt it with one of the :data:`ALLOCATIONS`."""
        train, test = _digits()
        trained = _trained_model(self.training_steps)
        model = copy.deepcopy(trained)
        model.learning_rate = self.learning_rate
        names = list(find_targets(dict(model.named_modules()), "all-linear"))
        damaged = damage.draw(names, len(model.model.blocks), seed)
        for name in damaged:
            turn_largest_directions(model.get_parameter(f"{name}.weight"), damage.strength)
        accuracy = {"trained": _accuracy(trained, test), "damaged": _accuracy(model, test)}

        pl.seed_everything(seed, verbose=False)
        settings = dict(ALLOCATIONS[allocation])
        settings["condense_to" if settings.pop("condense_to", False) else "average_rank"] = self.average_rank
        callback = LaLoraCallback(
            rank=self.rank, target_modules="all-linear", modules_to_save=[], group_by="module", min_rank=0, **settings
        )
        start = time.perf_counter()
        _fit(model, train, self.steps, [callback])
        seconds = time.perf_counter() - start
        ranks = {name: int(layer.rank) for name, layer in lora_layers(model).items()}
        accuracy["adapted"] = _accuracy(model, test)
        return Outcome(damage, seed, allocation, vars(self), damaged, ranks, accuracy, seconds)


def turn_largest_directions(weight: Tensor, strength: float, directions: int = DIRECTIONS) -> None:
    """Multiply the largest singular values of a matrix by ``1 - 2 * strength``, in place.

    Args:
        weight: ``(m, d)``.
        strength: 0 changes nothing, 0.5 removes these directions, 1 turns them around.
        directions: How many singular values.
    """
    with torch.no_grad():
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        weight -= 2 * strength * (U[:, :directions] * S[:directions]) @ Vh[:directions]


def share_of_first(run: Outcome) -> float:
    """Return the share of the k damaged projections that are among the k highest ranks.

    Ties are broken at random, so this is an expectation. A random allocation has k / 36 for 36 projections.
    """
    ranks, k = list(run.ranks.values()), len(run.damaged)

    def chance(rank: int) -> float:
        higher, equal = sum(other > rank for other in ranks), ranks.count(rank)
        return min(1.0, max(0.0, (k - higher) / equal))

    return statistics.mean(chance(run.ranks[name]) for name in run.damaged)


def ranked_above(run: Outcome) -> float:
    """Return how often a damaged projection has a higher rank than another one of its kind; ties count as a half.

    A random allocation has 0.5. Projections are compared with those of their kind, since kinds have different costs.
    """
    pairs = [
        (run.ranks[damaged], rank)
        for damaged in run.damaged
        for name, rank in run.ranks.items()
        if name not in run.damaged and _kind(name) == _kind(damaged)
    ]
    return statistics.mean((rank > other) + 0.5 * (rank == other) for rank, other in pairs)


def read_outcomes(path: Path) -> list[Outcome]:
    """Read all complete records of a file; an empty list if there is no such file."""
    return [Outcome(**{**record, "damage": Damage(**record["damage"])}) for record in read_lines(path)]


def summary(outcomes: Sequence[Outcome]) -> str:
    """Return a table with a row for each damage and allocation, and with rows for all damages together.

    Shares have half the width of their 95% confidence interval over the runs, by Student's t.
    """
    header = ["damage", "allocation", "runs", "first", "above its kind", "rank of damaged", "of others", "accuracy"]
    damages = dict.fromkeys(str(run.damage) for run in outcomes)
    rows = []
    for damage in [*(["all"] if len(damages) > 1 else []), *damages]:
        for allocation in ALLOCATIONS:
            runs = [run for run in outcomes if run.allocation == allocation and damage in ("all", str(run.damage))]
            if runs:
                rows.append([damage, allocation, str(len(runs)), *_summary_cells(runs)])
    return text_table(header, rows, left=(0, 1))


def _summary_cells(runs: Sequence[Outcome]) -> list[str]:
    damaged = [rank for run in runs for name, rank in run.ranks.items() if name in run.damaged]
    others = [rank for run in runs for name, rank in run.ranks.items() if name not in run.damaged]
    shares = [[share_of_first(run) for run in runs], [ranked_above(run) for run in runs]]
    return [
        *(_share(values) for values in shares),
        f"{statistics.mean(damaged):.2f}",
        f"{statistics.mean(others):.2f}",
        " -> ".join(mean_and_spread([run.accuracy[stage] for run in runs]) for stage in ("damaged", "adapted")),
    ]


def _share(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.0%}"
    return mean if len(values) == 1 else f"{mean} +- {confidence(values):.0%}"


def rank_table(run: Outcome) -> str:
    """Return the ranks of a run as a table of blocks by kind of projection; damaged ones have an asterisk."""
    layout = blocks_by_kind(list(run.ranks))
    assert layout is not None
    ranks = [f"{rank}*" if name in run.damaged else f"{rank} " for name, rank in run.ranks.items()]
    header, *rows = block_table(layout, ranks)
    return text_table([f"{title} " for title in header], rows)


def draw(run: Outcome) -> "Figure":
    """Draw the ranks of a run as a map, with the damaged projections outlined."""
    number = len(run.damaged)
    title = (
        "Ranks after adapting a damaged model\n"
        f"outlined: the {number} damaged {'projection' if number == 1 else 'projections'} of {len(run.ranks)}"
    )
    return plot_rank_map(list(run.ranks), list(run.ranks.values()), outlined=run.damaged, title=title)


def _kind(name: str) -> str:
    (kind,) = group_names([name], "kind")
    return kind


@functools.cache
def _digits() -> tuple[TensorDataset, TensorDataset]:
    """Return the upright digits: two thirds for training and one third for testing."""
    return split_digits(*upright_digits())


@functools.cache
def _trained_model(steps: int) -> ImageClassificationModule:
    """Return the vision transformer trained on the digits, with separate projections for query, key and value."""
    pl.seed_everything(0, verbose=False)
    model = new_model(learning_rate=2e-3)
    _fit(model, _digits()[0], steps)
    split_fused(model, [name for name, _ in model.named_modules() if name.endswith("attn.qkv")])
    return model


def _fit(
    model: ImageClassificationModule, data: TensorDataset, steps: int, callbacks: Sequence[pl.Callback] = ()
) -> None:
    _trainer(steps, callbacks).fit(model, DataLoader(data, 64, shuffle=True, drop_last=True))


def _accuracy(model: ImageClassificationModule, data: TensorDataset) -> float:
    (scores,) = _trainer(1).test(model, DataLoader(data, len(data)), verbose=False)
    return 100 * scores["test/accuracy"]


def _trainer(steps: int, callbacks: Sequence[pl.Callback] = ()) -> pl.Trainer:
    return pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_function_arguments(main)
    main(**parser.parse_args().as_dict())
