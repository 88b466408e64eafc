"""RankAllocator in a plain loop: hand-worked steps, every switch, state, and what is refused."""

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from lalora_lightning import (
    RankAllocator,
    TruncatedLoRALinear,
    add_lora,
    load_lora_state_dict,
    lora_layers,
    lora_state_dict,
    trim_lora,
)
from tests.helpers.models import TinyTransformer


class Projections(nn.Module):
    """Layers whose component norms are set by hand: ``layers[i]`` has the norms of A and of B by component."""

    def __init__(self, *layers: tuple[list[float], list[float]]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            TruncatedLoRALinear(nn.Linear(8, 8).requires_grad_(False), rank=len(a)) for a, _ in layers
        )
        for i, (a, b) in enumerate(layers):
            self.set(i, a, b)

    @torch.no_grad()
    def set(self, i: int, a: list[float], b: list[float]) -> None:
        layer = self.blocks[i]
        layer.lora_A.zero_()
        layer.lora_B.zero_()
        for k, (norm_a, norm_b) in enumerate(zip(a, b, strict=True)):
            layer.lora_A[k, k] = norm_a
            layer.lora_B[k, k] = norm_b

    def ranks(self) -> list[int]:
        return [int(layer.rank) for layer in self.blocks]


def test_a_step_by_hand():
    """Two layers at r = 4 and gamma 2, started at rank 1, worked through Eqs. 7, 6, 5, 10, 9, 8."""
    model = Projections(([1.0] * 4, [0.0] * 4), ([1.0] * 4, [0.0] * 4))
    allocator = RankAllocator(model, gamma=2.0)
    assert allocator.ranks.tolist() == [1, 1]
    assert allocator.budget.item() == 2.0
    # An optimizer step: B grows, in layer 0 to (3, 4, 0, 0), in layer 1 to (1, 0, 0, 0).
    model.set(0, [1.0] * 4, [3.0, 4.0, 0.0, 0.0])
    model.set(1, [1.0] * 4, [1.0, 0.0, 0.0, 0.0])
    allocator.step()
    # Values at rank 1: layer 0 from 1 to 1 + 3 = 4, growth 3; layer 1 from 1 to 1 + 1 = 2, growth 1; mean 2.
    # Budget: 2 * (1 + 2 * 2) = 10, clamped to r L = 8.
    assert allocator.budget.item() == 8.0
    # f_A = 1 / 2 in both. Layer 0: f_B = 3 / 5, c = 3 / 2 + 3 / 5 * 1 = 2.1. Layer 1: f_B = 1, c = 1 / 2 + 1 = 1.5.
    # Relative: 2.1 / 1.8, 1.5 / 1.8; softmax 1 / (1 + exp(-1/3)) = 0.58257, shares 4.6606 and 3.3394.
    # Deserved min(3.66, 3) = 3 and 2.3394; total floor(5.34) = 5; ranks 1 + 3 and 1 + 2.
    assert allocator.ranks.tolist() == [4, 3] == model.ranks()

    # Another step: only layer 0 changes, its first A component to 2.
    model.set(0, [2.0, 1.0, 1.0, 1.0], [3.0, 4.0, 0.0, 0.0])
    allocator.step()
    # Matched growth, layer 0 at rank 4: from (2 + 5) / 4 to (sqrt 7 + 5) / 4; layer 1 does not grow.
    # The budget is full already, so that it stays.
    assert allocator.budget.item() == 8.0


def test_matched_growth_compares_values_at_the_rank_in_force():
    model = Projections(([1.0] * 4, [0.0] * 4), ([1.0] * 4, [0.0] * 4))
    matched = RankAllocator(model, gamma=1.0)
    model.set(0, [1.0] * 4, [1.0] * 4)
    model.set(1, [1.0] * 4, [1.0] * 4)
    matched.step()
    # Values from 1 to 2, growth 1: budget 2 * 2 = 4, ranks 2 and 2.
    assert matched.budget.item() == 4.0
    assert model.ranks() == [2, 2]
    for i in (0, 1):
        model.set(i, [1.1] * 4, [1.1] * 4)
    matched.step()
    # Everything grew by a tenth, whatever the rank: 4 * 1.1.
    assert matched.budget.item() == pytest.approx(4.4)


def test_stored_growth_reads_a_raised_rank_as_shrinking():
    model = Projections(([1.0] * 4, [0.0] * 4), ([1.0] * 4, [0.0] * 4))
    stored = RankAllocator(model, gamma=1.0, growth="stored")
    for i in (0, 1):
        model.set(i, [1.0] * 4, [1.0] * 4)
    stored.step()
    assert stored.budget.item() == 4.0
    for i in (0, 1):
        model.set(i, [1.1] * 4, [1.1] * 4)
    stored.step()
    # At rank 2 the value is 2 * 1.1 * sqrt 2 / 2 = 1.556, against 2 stored at rank 1: growth -0.222.
    assert stored.budget.item() == pytest.approx(4 * (1.1 * math.sqrt(2) / 2))


def grow(model: nn.Module, allocator: RankAllocator, steps: int, speed: Callable[[int], float]) -> list[list[int]]:
    """Let B grow as an optimizer makes it grow, each layer at its own speed; ranks after each step."""
    generator = torch.Generator().manual_seed(0)
    layers = list(lora_layers(model).values())
    directions = [torch.randn(layer.lora_B.shape, generator=generator) for layer in layers]
    trajectory = []
    for _ in range(steps):
        with torch.no_grad():
            for i, (layer, direction) in enumerate(zip(layers, directions, strict=True)):
                # Gradients reach only the components in force.
                layer.lora_B += speed(i) * direction * layer.rank_mask
        allocator.step()
        trajectory.append(allocator.ranks.tolist())
    return trajectory


def test_the_letters_growth_falls_into_a_limit_cycle_and_matched_growth_does_not():
    """Reading 1: with a large gamma the stored values make the budget jump between its bounds."""
    jumps = {}
    for growth in ("stored", "matched"):
        torch.manual_seed(0)
        model = TinyTransformer(depth=6, width=16)
        add_lora(model, rank=8)
        allocator = RankAllocator(model, gamma=10.0, growth=growth)
        totals = [sum(ranks) for ranks in grow(model, allocator, 60, lambda i: 0.02)]
        jumps[growth] = sum(abs(b - a) > 24 for a, b in itertools.pairwise(totals[20:]))
    assert jumps["stored"] >= 20
    assert jumps["matched"] == 0


def test_the_letters_contribution_lets_one_layer_take_everything_and_the_relative_one_does_not():
    """Reading 2: absolute contributions grow with a layer's own rank, and the softmax feeds that back."""
    final = {}
    for scale in ("absolute", "relative"):
        torch.manual_seed(0)
        model = TinyTransformer(depth=12, width=16)
        add_lora(model, rank=8)
        allocator = RankAllocator(model, gamma=2.0, contribution_scale=scale)
        final[scale] = grow(model, allocator, 300, lambda i: 0.002 * (1 + 0.1 * i))[-1]
    assert sorted(final["absolute"]) == [1] * 11 + [8]
    assert min(final["relative"]) >= 4
    assert len(set(final["relative"])) > 1


def test_ranks_never_exceed_the_budget_and_every_layer_keeps_one():
    model = TinyTransformer(depth=5, width=16)
    add_lora(model, rank=6)
    allocator = RankAllocator(model, gamma=3.0)
    for ranks in grow(model, allocator, 100, lambda i: 0.005 * (i + 1)):
        assert min(ranks) >= 1
        assert max(ranks) <= 6
        assert sum(ranks) <= 30
    assert sum(ranks) > 20


def test_projections_of_a_layer_share_its_rank(adapted: TinyTransformer):
    allocator = RankAllocator(adapted, gamma=3.0)
    assert allocator.layer_names == ["blocks.0", "blocks.1", "blocks.2"]
    grow(adapted, allocator, 10, lambda i: 0.02)
    for block, rank in zip(adapted.blocks, allocator.ranks.tolist(), strict=True):
        assert int(block.query.rank) == int(block.value.rank) == rank
        assert block.query.rank_mask.tolist() == [k < rank for k in range(4)]


def test_fused_slices_count_as_two_matrices():
    """A fused projection gives the ranks that separate query and value with the same numbers give."""
    torch.manual_seed(0)
    fused = nn.ModuleList(
        TruncatedLoRALinear(nn.Linear(8, 24), rank=4, out_slices=[(0, 8), (16, 24)]) for _ in range(2)
    )
    separate = nn.ModuleList(
        nn.ModuleDict({name: TruncatedLoRALinear(nn.Linear(8, 8), rank=4) for name in ("query", "value")})
        for _ in range(2)
    )
    allocators = RankAllocator(fused, gamma=5.0), RankAllocator(separate, gamma=5.0)
    for scale in (1.0, 1.5, 2.0):
        with torch.no_grad():
            for i in range(2):
                nn.init.normal_(fused[i].lora_A)
                nn.init.normal_(fused[i].lora_B, std=scale + i)
                for j, name in enumerate(("query", "value")):
                    separate[i][name].lora_A.copy_(fused[i].lora_A[4 * j : 4 * j + 4])
                    separate[i][name].lora_B.copy_(fused[i].lora_B[8 * j : 8 * j + 8])
        for allocator in allocators:
            allocator.step()
    assert allocators[0].ranks.tolist() == allocators[1].ranks.tolist()
    torch.testing.assert_close(allocators[0].budget, allocators[1].budget)


def test_layers_of_unequal_shapes_and_numbers_of_matrices():
    """A layer of four matrices contributes as one of two with the same norms: relative contributions are means."""

    def block(*names: str, width: int) -> nn.ModuleDict:
        return nn.ModuleDict({name: TruncatedLoRALinear(nn.Linear(width, width), rank=4) for name in names})

    model = nn.ModuleList([block("q", "v", width=8), block("q", "v", "k", "o", width=12)])
    for layer in lora_layers(model).values():
        nn.init.zeros_(layer.lora_A)
        for k in range(4):
            layer.lora_A.data[k, k] = layer.lora_B.data[k, k] = 1.0
    allocator = RankAllocator(model, gamma=0.0)
    allocator.step()
    assert allocator.contributions.tolist() == [1, 1]


def test_a_rank_costs_its_parameters():
    """Two matrices of 8 x 8 cost 32 a rank, four of 12 x 12 cost 96: half and one and a half of the mean."""
    model = nn.ModuleList(
        nn.ModuleDict({name: TruncatedLoRALinear(nn.Linear(width, width), rank=8) for name in names})
        for names, width in (("qv", 8), ("qvko", 12))
    )
    allocator = RankAllocator(model, average_rank=3, gradual_budget=False)
    assert allocator.costs.tolist() == [0.5, 1.5]
    # Budget 6, 3 for each layer: ranks 3 / 0.5 and 3 / 1.5.
    assert allocator.ranks.tolist() == [6, 2]
    # As many parameters as rank 3 everywhere.
    assert 6 * 32 + 2 * 96 == 3 * (32 + 96)
    # A gradual budget begins with rank 1 for every layer.
    assert RankAllocator(model).read() == ([1, 1], 2.0, 0)
    # The budget of a loaded state is in ranks of mean cost.
    model[0]["q"].set_rank(5)
    model[0]["v"].set_rank(5)
    allocator = RankAllocator(model)
    for layer, rank in zip(lora_layers(model).values(), (5, 5, 2, 2, 2, 2), strict=True):
        layer.set_rank(rank)
    assert allocator.read() == ([5, 2], 5 * 0.5 + 2 * 1.5, 0)


def test_a_layer_may_end_with_nothing():
    """Worked by hand: contributions far apart, no growth, budget 3."""
    model = Projections(([1.0] * 4, [30.0] * 4), ([1.0] * 4, [0.0] * 4), ([1.0] * 4, [0.0] * 4))
    allocator = RankAllocator(model, gamma=0.0, min_rank=0)
    assert allocator.ranks.tolist() == [1, 1, 1]
    allocator.step()
    # f_A = 1 / 2 and f_B = 1 / 2 in layer 0: c = 30 / 2 + 1 / 2 = 15.5; the others: f_B = 1, c = 0 / 2 + 1 = 1.
    # Relative to the mean 5.833: 2.657 and 0.171; softmax 0.857 and 0.0714; shares 2.571, 0.214, 0.214 of 3.
    # Rounded down 2, 0, 0; the one rank that is left goes to the largest remainder.
    assert allocator.ranks.tolist() == [3, 0, 0] == model.ranks()
    x = torch.randn(2, 8)
    torch.testing.assert_close(model.blocks[1](x), model.blocks[1].base_layer(x))
    # It is measured at rank 1 and comes back when others contribute less.
    model.set(0, [1.0] * 4, [0.0] * 4)
    allocator.step()
    assert allocator.growth_rates.isfinite().all()
    assert allocator.ranks.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("settings", "ranks", "budget"),
    [
        ({}, [1, 1, 1], 3.0),
        ({"gradual_budget": False}, [4, 4, 4], 12.0),
        ({"gradual_budget": False, "average_rank": 2}, [2, 2, 2], 6.0),
        ({"gradual_budget": False, "average_rank": 1.5}, [2, 1, 1], 4.5),
    ],
)
def test_start(adapted: TinyTransformer, settings: dict, ranks: list[int], budget: float):
    allocator = RankAllocator(adapted, **settings)
    assert allocator.ranks.tolist() == ranks
    assert [int(block.query.rank) for block in adapted.blocks] == ranks
    assert allocator.budget.item() == budget


def test_the_allocator_holds_no_graph(adapted: TinyTransformer):
    allocator = RankAllocator(adapted)
    allocator.step()
    assert not any(value.requires_grad for value in vars(allocator).values() if isinstance(value, torch.Tensor))
    assert not RankAllocator(adapted).state_dict()["value"].requires_grad


def test_average_rank_caps_the_budget_and_not_a_layer():
    model = Projections(*[([1.0] * 8, [0.1] * 8)] * 4)
    allocator = RankAllocator(model, gamma=50.0, average_rank=3, temperature=0.2)
    model.set(0, [1.0] * 8, [4.0] * 8)
    for _ in range(3):
        allocator.step()
        model.set(1, [1.0] * 8, [1.0] * 8)
    assert allocator.budget.item() == 12.0
    assert allocator.ranks.sum() <= 12
    assert allocator.ranks[0] > 3


def test_gamma_zero_keeps_the_budget(adapted: TinyTransformer):
    allocator = RankAllocator(adapted, gamma=0.0)
    grow(adapted, allocator, 5, lambda i: 0.1)
    assert allocator.budget.item() == 3.0
    assert allocator.ranks.tolist() == [1, 1, 1]


def test_fidelity_switch_changes_the_contribution():
    ranks = {}
    for fidelity in (True, False):
        # Layer 0 has all its norm in the first component, layer 1 spreads it; the truncated norms are the same.
        model = Projections(([1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]), ([1.0] * 4, [1.0] * 4))
        allocator = RankAllocator(model, gamma=2.0, fidelity=fidelity)
        model.set(0, [1.5, 0.0, 0.0, 0.0], [1.5, 0.0, 0.0, 0.0])
        model.set(1, [1.5] * 4, [1.5] * 4)
        allocator.step()
        ranks[fidelity] = allocator.ranks.tolist()
    # Budget 2 * (1 + 2 * 0.5) = 4 in both. With fidelity 1 and 1/2 the contributions are 2 : 1, else equal.
    assert ranks == {True: [3, 1], False: [2, 2]}


def test_fisher_follows_squared_gradients_and_not_norms():
    model = Projections(([1.0] * 4, [1.0] * 4), ([1.0] * 4, [1.0] * 4))
    allocator = RankAllocator(model, gamma=0.0, contribution="fisher", gradual_budget=False, average_rank=2)
    with pytest.raises(RuntimeError, match="observe_gradients"):
        allocator.step()
    assert allocator.steps == 0
    for gradient in (1.0, 2.0):
        for layer, factor in zip(model.blocks, (3.0, 1.0), strict=True):
            layer.lora_A.grad = torch.full_like(layer.lora_A, gradient * factor)
            layer.lora_B.grad = None
        allocator.observe_gradients()
    # 8 entries in a component: 0.9 * 0.1 * 8 g_1^2 + 0.1 * 8 g_2^2 = 8 * (0.09 + 0.4) = 3.92 for the second layer.
    torch.testing.assert_close(allocator._fisher[0, 1, 0], torch.full((4,), 3.92))
    torch.testing.assert_close(allocator._fisher[0, 0, 0], torch.full((4,), 9 * 3.92))
    assert not allocator._fisher[1].any()
    allocator.step()
    # The norms are equal, the roots of the squared gradients 3 : 1: relative 1.5 and 0.5, shares 4 * 0.731, 4 * 0.269.
    assert allocator.ranks.tolist() == [3, 1]


def test_fisher_passes_over_gradients_that_are_not_finite(adapted: TinyTransformer):
    allocator = RankAllocator(adapted, contribution="fisher")
    for value in (1.0, float("inf"), float("nan")):
        for layer in lora_layers(adapted).values():
            layer.lora_A.grad, layer.lora_B.grad = torch.full_like(layer.lora_A, value), None
        allocator.observe_gradients()
    torch.testing.assert_close(allocator._fisher[0], torch.full((3, 2, 4), 0.1 * 8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_change_nothing(adapted: TinyTransformer, bad: float):
    allocator = RankAllocator(adapted, gamma=3.0)
    grow(adapted, allocator, 5, lambda i: 0.05)
    before = allocator.state_dict()
    weight = adapted.blocks[1].value.lora_B
    good = weight[2, 3].item()
    weight.data[2, 3] = bad
    allocator.step()
    after = allocator.state_dict()
    for key in ("ranks", "budget", "value"):
        assert torch.equal(after[key], before[key])
    assert after["skipped"] == 1
    weight.data[2, 3] = good
    allocator.step()
    assert allocator.skipped == 1


def test_interval_acts_at_every_nth_step(adapted: TinyTransformer):
    allocator = RankAllocator(adapted, gamma=3.0, interval=3)
    budgets = []
    for _ in range(7):
        grow(adapted, allocator, 1, lambda i: 0.05)
        budgets.append(allocator.budget.item())
    assert budgets[0] == budgets[1] == 3.0
    assert budgets[2] == budgets[3] == budgets[4] > 3.0
    assert budgets[5] == budgets[6] > budgets[4]


def test_freeze_after_keeps_the_ranks(adapted: TinyTransformer):
    allocator = RankAllocator(adapted, gamma=3.0, freeze_after=2)
    grow(adapted, allocator, 2, lambda i: 0.05)
    assert not allocator.frozen
    state = allocator.state_dict()
    grow(adapted, allocator, 3, lambda i: 0.05)
    assert allocator.frozen
    assert torch.equal(allocator.ranks, state["ranks"])
    assert torch.equal(allocator.budget, state["budget"])


@pytest.mark.parametrize("contribution", ["norm", "fisher"])
def test_a_restored_allocator_goes_on_as_if_nothing_had_happened(contribution: str):
    def new() -> tuple[nn.Module, RankAllocator, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = TinyTransformer()
        add_lora(model, rank=4)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        return model, RankAllocator(model, gamma=3.0, contribution=contribution), optimizer

    def train(model, allocator, optimizer, steps: range) -> list[list[int]]:
        trajectory = []
        for step in steps:
            x = torch.randn(8, 5, 8, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            allocator.observe_gradients()
            optimizer.step()
            allocator.step()
            trajectory.append([*allocator.ranks.tolist(), allocator.budget.item()])
        return trajectory

    whole = train(*new(), range(20))
    first = new()
    head = train(*first, range(10))
    second = new()
    for restored, original in zip(second, first, strict=True):
        restored.load_state_dict(original.state_dict())
    assert head + train(*second, range(10, 20)) == whole


def test_ranks_follow_a_model_that_is_moved_or_reloaded(adapted: TinyTransformer):
    allocator = RankAllocator(adapted, gamma=3.0)
    grow(adapted, allocator, 3, lambda i: 0.05)
    adapted.double()
    adapted.load_state_dict({key: value.clone() for key, value in adapted.state_dict().items()}, assign=True)
    grow(adapted, allocator, 3, lambda i: 0.05)
    for block, rank in zip(adapted.blocks, allocator.ranks.tolist(), strict=True):
        assert int(block.query.rank) == rank
        assert block.query.rank_mask.sum() == rank


def test_a_model_trimmed_under_its_allocator(adapted: TinyTransformer):
    allocator = RankAllocator(adapted)
    trim_lora(adapted)
    with pytest.raises(RuntimeError, match="it was trimmed; its ranks are final"):
        allocator.step()


def test_fisher_follows_a_model_to_double_precision(adapted: TinyTransformer):
    allocator = RankAllocator(adapted, contribution="fisher")
    adapted.double()
    for layer in lora_layers(adapted).values():
        layer.lora_A.grad = torch.ones_like(layer.lora_A)
    allocator.observe_gradients()
    allocator.step()
    assert allocator._fisher.dtype == torch.float64


def test_group_by_module_gives_each_projection_its_own_rank(adapted: TinyTransformer):
    allocator = RankAllocator(adapted, gamma=3.0, group_by="module")
    assert len(allocator.layer_names) == 6
    grow(adapted, allocator, 10, lambda i: 0.01 * (i + 1))
    assert [int(layer.rank) for layer in lora_layers(adapted).values()] == allocator.ranks.tolist()
    assert len(set(allocator.ranks.tolist())) > 1


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("gamma", -1.0, "gamma to be finite and at least 0 but got -1.0"),
        ("gamma", math.inf, "gamma to be finite"),
        ("gamma", math.nan, "gamma to be finite"),
        ("contribution", "gradient", r"contribution to be one of \('norm', 'fisher'\) but got 'gradient'"),
        ("contribution_scale", "log", "contribution_scale to be one of"),
        ("growth", "letter", "growth to be one of"),
        ("group_by", "layer", "group_by to be"),
        ("temperature", 0.0, "temperature to be finite"),
        ("temperature", 1e-119, "temperature to be finite and at least 1e-6"),
        ("interval", 0, "interval to be an integer of at least 1"),
        ("freeze_after", -1, "freeze_after to be at least 0"),
        ("average_rank", 0.5, r"average_rank to be in \[1, 4\] but got 0.5"),
        ("average_rank", 5, r"average_rank to be in \[1, 4\]"),
    ],
)
def test_arguments_out_of_range(adapted: TinyTransformer, argument: str, value: object, message: str):
    before = [int(layer.rank) for layer in lora_layers(adapted).values()]
    with pytest.raises(ValueError, match=f"Expected {message}"):
        RankAllocator(adapted, **{argument: value})
    assert [int(layer.rank) for layer in lora_layers(adapted).values()] == before


def test_fisher_has_no_absolute_scale(adapted: TinyTransformer):
    with pytest.raises(ValueError, match='contribution_scale="relative"'):
        RankAllocator(adapted, contribution="fisher", contribution_scale="absolute")


def test_a_model_without_layers(model: TinyTransformer):
    with pytest.raises(ValueError, match=r"call add_lora\(model\) first"):
        RankAllocator(model)


def test_a_trimmed_model(adapted: TinyTransformer):
    adapted.blocks[0].query.set_rank(2)
    trim_lora(adapted)
    with pytest.raises(ValueError, match=r"one maximum rank but got \[2, 4\]"):
        RankAllocator(adapted)


def test_a_state_of_another_model_lists_all_that_differs(adapted: TinyTransformer):
    other = TinyTransformer(depth=2)
    add_lora(other, rank=2)
    state = RankAllocator(other, contribution="fisher").state_dict()
    allocator = RankAllocator(adapted)
    before = allocator.state_dict()
    with pytest.raises(ValueError, match=r"lacks the layers blocks.2; expected max_rank 4 but got 2; .*contribution"):
        allocator.load_state_dict(state)
    with pytest.raises(ValueError, match=r"unknown layers blocks\.9"):
        allocator.load_state_dict({**before, "layer_names": [*before["layer_names"], "blocks.9"]})
    with pytest.raises(ValueError, match="in another order"):
        allocator.load_state_dict({**before, "layer_names": before["layer_names"][::-1]})
    with pytest.raises(ValueError, match=r"ranks of shape \(3,\) but got \(2,\)"):
        allocator.load_state_dict({**before, "ranks": before["ranks"][:2]})
    with pytest.raises(ValueError, match="budget, value are missing"):
        allocator.load_state_dict({key: before[key] for key in before if key not in ("budget", "value")})
    after = allocator.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in ("ranks", "budget", "value", "skipped"))


def test_adapters_on_several_devices_are_refused(adapted: TinyTransformer):
    layer = adapted.blocks[1].value
    layer.lora_A = nn.Parameter(layer.lora_A.to("meta"))
    with pytest.raises(ValueError, match=r"to be on one device but they are on cpu, meta; load .* onto one"):
        RankAllocator(adapted)


def test_a_default_type_of_bfloat16_does_not_change_the_ranks(default_bfloat16: None):
    """A budget of 74 * 6.945 = 513.93 has 513 whole ranks; bfloat16 rounds it to 512."""
    model = nn.ModuleList(nn.ModuleDict({"query": nn.Linear(8, 8)}) for _ in range(74))
    add_lora(model, rank=7, target_modules=["query"], modules_to_save=[])
    for layer in lora_layers(model).values():
        # Like layers contribute equally, so none of them reaches its maximum early.
        nn.init.ones_(layer.lora_A)
    allocator = RankAllocator(model, gamma=0.0, gradual_budget=False, average_rank=6.945)
    allocator.step()
    assert float(allocator.budget) == pytest.approx(513.93)
    assert allocator.ranks.sum() == 513


def test_a_fraction_of_a_run_is_refused_without_a_run(adapted: TinyTransformer):
    with pytest.raises(ValueError, match=r"freeze_after to be a number of steps but got 0\.5"):
        RankAllocator(adapted, freeze_after=0.5)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in lora_state_dict(model).items()}


@pytest.mark.parametrize(
    "load", [load_lora_state_dict, lambda model, state: model.load_state_dict(state, strict=False)]
)
def test_a_state_loaded_beside_an_allocator_is_where_it_continues(adapted: TinyTransformer, load: Callable):
    """The best weights are loaded back, as early stopping does: ranks and budget are theirs, and nothing shrinks."""
    allocator = RankAllocator(adapted, gamma=3.0)
    grow(adapted, allocator, 2, lambda i: 0.05 * (i + 1))
    best, ranks = state_of(adapted), allocator.ranks.tolist()
    grow(adapted, allocator, 20, lambda i: 0.05 * (i + 1))
    assert sum(ranks) < int(allocator.ranks.sum())
    load(adapted, best)
    allocator.step()
    assert allocator.growth_rates.tolist() == [0, 0, 0]
    assert allocator.budget.item() == sum(ranks)
    assert allocator.ranks.tolist() == [int(block.query.rank) for block in adapted.blocks]
    assert grow(adapted, allocator, 3, lambda i: 0.05)[-1] == [int(block.query.rank) for block in adapted.blocks]
    assert allocator.budget > sum(ranks)


def test_weights_loaded_at_the_same_ranks_are_not_compared_with_the_old_ones(adapted: TinyTransformer):
    allocator = RankAllocator(adapted, gamma=3.0, temperature=1000.0)
    grow(adapted, allocator, 20, lambda i: 0.05)
    full, ranks = state_of(adapted), allocator.ranks.tolist()
    grow(adapted, allocator, 20, lambda i: 0.5)
    assert (allocator.ranks.tolist(), allocator.budget.item()) == (ranks, 12.0)
    load_lora_state_dict(adapted, full)
    allocator.step()
    # The adapters are much smaller than in the step before, which is no reason to shrink the budget.
    assert (allocator.ranks.tolist(), allocator.budget.item()) == (ranks, 12.0)


@pytest.mark.parametrize("read", [RankAllocator.read, RankAllocator.state_dict])
def test_a_frozen_allocator_tells_the_ranks_of_the_model(adapted: TinyTransformer, read: Callable):
    allocator = RankAllocator(adapted, freeze_after=0)
    for block, rank in zip(adapted.blocks, (2, 3, 4), strict=True):
        block.query.set_rank(rank)
    read(allocator)
    assert allocator.ranks.tolist() == [2, 3, 4]
    adapted.blocks[0].query.set_rank(1)
    adapted.blocks[0].value.set_rank(1)
    allocator.step()
    assert allocator.ranks.tolist() == [1, 3, 4]
    assert allocator.budget == 8


@pytest.mark.parametrize("read", [RankAllocator.read, RankAllocator.state_dict, RankAllocator.observe_gradients])
def test_reading_does_not_change_an_averaged_model(adapted: TinyTransformer, read: Callable):
    """The masks of an average lie between 0 and 1. Only a rank update writes others."""
    allocator = RankAllocator(adapted, contribution="fisher")
    masks = [layer.rank_mask for layer in lora_layers(adapted).values()]
    for mask in masks:
        mask.copy_(torch.tensor([1, 1, 0.5, 0.25]))
    read(allocator)
    assert [mask.tolist() for mask in masks] == [[1, 1, 0.5, 0.25]] * 6
    assert allocator.ranks.tolist() == [4, 4, 4]
    allocator.observe_gradients()
    allocator.step()
    assert all(mask.tolist() in ([1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]) for mask in masks)


def test_projections_share_a_rank_again_after_a_step(adapted: TinyTransformer):
    allocator = RankAllocator(adapted, gamma=3.0)
    adapted.blocks[0].query.set_rank(3)
    allocator.step()
    assert [int(b.query.rank) for b in adapted.blocks] == [int(b.value.rank) for b in adapted.blocks]


def test_the_whole_budget_stays_when_other_ranks_are_found(adapted: TinyTransformer):
    allocator = RankAllocator(adapted, gradual_budget=False)
    adapted.blocks[0].query.set_rank(2)
    adapted.blocks[0].value.set_rank(2)
    assert allocator.read() == ([2, 4, 4], 12.0, 0)


def test_masks_that_are_written_with_the_same_values_change_nothing(adapted: TinyTransformer):
    """As DDP does before each forward pass."""
    trajectories = []
    for rewritten in (False, True):
        model = copy.deepcopy(adapted)
        allocator = RankAllocator(model, gamma=1.0)
        ranks = []
        for _ in range(10):
            ranks += grow(model, allocator, 1, lambda i: 0.02 * (i + 1))
            if rewritten:
                for layer in lora_layers(model).values():
                    layer.rank_mask.copy_(layer.rank_mask.clone())
        trajectories.append((ranks, allocator.budget.item()))
    assert trajectories[0] == trajectories[1]
    assert trajectories[0][0][-1] != [1, 1, 1]


def test_the_layers_own_their_masks(adapted: TinyTransformer, tmp_path: Path):
    """No buffer is a view of the allocator's tensors, which formats such as safetensors refuse to save."""
    RankAllocator(adapted).step()
    masks = [layer.rank_mask for layer in lora_layers(adapted).values()]
    assert len({mask.untyped_storage().data_ptr() for mask in masks}) == len(masks)
    assert all(mask.untyped_storage().nbytes() == mask.nbytes for mask in masks)
    safetensors.torch.save_model(adapted, tmp_path / "model.safetensors")
