"""Damaged projections get the highest ranks: a small version of the planted test, and its recipe cut short."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from lalora_lightning import RankAllocator, add_lora, lora_layers
from recipes.planted import (
    Damage,
    Outcome,
    ranked_above,
    read_outcomes,
    share_of_first,
    summary,
    turn_largest_directions,
)
from tests.helpers.models import TinyTransformer
from tests.recipes.test_recipes import recipe


@pytest.mark.parametrize("damaged", [("blocks.0.value", "blocks.2.value"), ("blocks.1.value",)])
def test_condensing_finds_the_damaged_projections(damaged: tuple[str, ...]):
    torch.manual_seed(0)
    intact = TinyTransformer(depth=4, width=16, classes=8)
    for name, p in intact.named_parameters():
        if name.endswith("weight"):
            nn.init.orthogonal_(p)
    model = copy.deepcopy(intact)
    for name in damaged:
        turn_largest_directions(model.get_parameter(f"{name}.weight"), strength=1.0)
    add_lora(model, rank=8, target_modules="all-linear", modules_to_save=[])
    allocator = RankAllocator(model, group_by="module", freeze_after=0, min_rank=0)
    for layer in lora_layers(model).values():
        layer.set_rank(8)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(80):
        x = torch.randn(32, 5, 16)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), intact(x)).backward()
        optimizer.step()
    ranks = allocator.condense(average_rank=1).ranks
    assert len(ranks) == 12
    others = [rank for name, rank in ranks.items() if name not in damaged]
    assert min(ranks[name] for name in damaged) > max(others)


def test_largest_directions_are_turned():
    weight = torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]))
    turn_largest_directions(weight, strength=1.0)
    assert weight.diag().tolist() == pytest.approx([-5, -4, -3, -2, 1])
    turn_largest_directions(weight, strength=0.5, directions=2)
    assert weight.diag().tolist() == pytest.approx([0, 0, -3, -2, 1], abs=1e-5)


def test_damage_is_drawn_where_it_should_be():
    names = [f"model.blocks.{i}.{kind}" for i in range(6) for kind in ("attn.proj", "mlp.fc1")]
    for where, expected in {"attention": ".attn.", "feed-forward": ".mlp."}.items():
        assert all(expected in name for name in Damage(4, where=where).draw(names, 6, seed=0))
    assert {name.split(".")[2] for name in Damage(6, where="early").draw(names, 6, seed=0)} == {"0", "1", "2"}
    assert {name.split(".")[2] for name in Damage(6, where="late").draw(names, 6, seed=0)} == {"3", "4", "5"}


@pytest.mark.parametrize(
    ("ranks", "first", "above"),
    [
        # blocks.0 to blocks.3 of q, then of up; q of blocks 0 and 1 is damaged.
        ([4, 3, 1, 1, 2, 2, 2, 2], 1.0, 1.0),
        # A tie for the second place, broken at random.
        ([4, 3, 3, 1, 2, 2, 2, 2], 0.75, 0.875),
        # up has higher ranks, but q of the damaged blocks has the highest of its kind.
        ([4, 3, 1, 1, 8, 8, 8, 8], 0.0, 1.0),
        ([1, 1, 1, 1, 1, 1, 1, 1], 0.25, 0.5),
    ],
)
def test_what_counts_as_found(ranks: list[int], first: float, above: float):
    names = [f"blocks.{i}.{kind}" for kind in ("q", "up") for i in range(4)]
    run = Outcome(Damage(), 0, "norms", {}, names[:2], dict(zip(names, ranks, strict=True)), {}, 1.0)
    assert share_of_first(run) == first
    assert ranked_above(run) == above


def test_the_recipe(tmp_path: Path):
    options = ("--training_steps", "3", "--steps", "4", "--records", "runs.jsonl")
    out = recipe("planted", *options, cwd=tmp_path).stdout
    assert (tmp_path / "runs" / "planted" / "ranks.png").stat().st_size > 10_000
    outcomes = read_outcomes(tmp_path / "runs.jsonl")
    assert [run.allocation for run in outcomes] == ["norms", "Fisher", "condensed", "grown and condensed"]
    assert {len(run.ranks) for run in outcomes} == {36}
    assert out.count("*") == 4 * 2
    rows = [line.split("  ")[1].strip() for line in out[out.index("damage  ") :].splitlines()[2:6]]
    assert rows == [run.allocation for run in outcomes]
    # Recorded runs are not repeated.
    again = recipe("planted", *options, cwd=tmp_path).stdout
    assert again[again.index("\nRanks") :] == out[out.index("\nRanks") :]
    assert len(read_outcomes(tmp_path / "runs.jsonl")) == 4
    # Nothing is run, and all records with these settings are in the table.
    table = recipe("planted", *options, "--seeds", "0", cwd=tmp_path).stdout
    assert table[table.index("damage  ") :] == out[out.index("damage  ") :]


def test_all_damages_together():
    names = [f"blocks.{i}.q" for i in range(4)]

    def run(damage: Damage, seed: int, ranks: list[int]) -> Outcome:
        accuracy = {"trained": 94.0, "damaged": 50.0, "adapted": 90.0}
        return Outcome(damage, seed, "norms", {}, names[:1], dict(zip(names, ranks, strict=True)), accuracy, 1.0)

    found, missed = [2, 1, 1, 1], [1, 1, 1, 2]
    runs = [run(Damage(1), 3, found), run(Damage(1), 4, missed), run(Damage(1, 0.5), 3, found)]
    rows = [line.split() for line in summary(runs).splitlines()[2:]]
    # Of the missed one, a third is above its kind: two ties of three pairs.
    assert rows[0][:10] == ["all", "norms", "3", "67%", "+-", "143%", "78%", "+-", "96%", "1.67"]
    assert rows[1][:6] == ["1", "anywhere,", "strength", "1", "norms", "2"]
    # A single run says nothing about the spread.
    assert rows[2][:9] == ["1", "anywhere,", "strength", "0.5", "norms", "1", "100%", "100%", "2.00"]
