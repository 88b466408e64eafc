"""The equations against hand-worked numbers, and the properties that hold for all inputs."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lalora_lightning import functional

# Two layers of two matrices at r = 3. Squared norms per component, chosen so that all norms are whole:
# layer 0: A = (9, 16, 144), (1, 0, 0); B = (4, 0, 0), (0, 0, 0)
# layer 1: A = (36, 64, 0), (25, 0, 144); B = (1, 0, 8), (9, 16, 0)
SQUARES = torch.tensor(
    [
        [[[9.0, 16.0, 144.0], [1.0, 0.0, 0.0]], [[36.0, 64.0, 0.0], [25.0, 0.0, 144.0]]],
        [[[4.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [[1.0, 0.0, 8.0], [9.0, 16.0, 0.0]]],
    ]
)
RANKS = torch.tensor([2, 1])
# |A|, |B| of the first r' components: layer 0 at rank 2, layer 1 at rank 1.
TRUNCATED = torch.tensor([[[5.0, 1.0], [6.0, 5.0]], [[2.0, 0.0], [1.0, 3.0]]])
FULL = torch.tensor([[[13.0, 1.0], [10.0, 13.0]], [[2.0, 0.0], [3.0, 5.0]]])


def test_sparsity_counts_entries_below_the_threshold():
    increment = torch.tensor([[1.0, -1.0, 9.9e-5], [0.0, 1.1e-4, -9.9e-5]])
    assert functional.sparsity(increment).item() == 0.5
    assert functional.sparsity(increment, threshold=2.0).item() == 1.0


def test_component_norms_of_rows_of_a_and_columns_of_b():
    a = torch.tensor([[[3.0, 4.0, 0.0], [1.0, 2.0, 2.0]]])
    assert functional.component_norms(a, dim=-1).tolist() == [[5.0, 3.0]]
    b = torch.tensor([[[3.0, 1.0], [4.0, 1.0]]])
    assert functional.component_norms(b, dim=-2).tolist() == [pytest.approx([5.0, 2**0.5])]


def test_component_norms_of_low_precision_are_summed_in_float32():
    ones = torch.ones(1, 1, 4096, dtype=torch.bfloat16)
    norms = functional.component_norms(ones, dim=-1)
    assert norms.dtype == torch.float32
    assert norms.item() == 64.0


def test_truncated_norms_at_each_layers_rank():
    norms = functional.norms_by_rank(SQUARES)
    assert torch.equal(functional.truncated_norms(norms, RANKS), TRUNCATED)
    assert torch.equal(norms[..., -1], FULL)


def test_value_eq_7():
    # Layer 0: (5 + 1 + 2 + 0) / 2; layer 1: (6 + 5 + 1 + 3) / 1.
    assert functional.values(TRUNCATED, RANKS).tolist() == [4.0, 15.0]


def test_growth_eq_6():
    growth = functional.growth_rates(torch.tensor([5.0, 12.0]), torch.tensor([4.0, 15.0]))
    assert growth.tolist() == pytest.approx([0.25, -0.2])


def test_growth_from_zero_is_zero():
    assert functional.growth_rates(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 0.0])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("growth", "expected"),
    [
        ([0.25, -0.2], 8.0 * (1 + 3 * 0.025)),  # mean growth 0.025, gamma 3
        ([10.0, 10.0], 24.0),  # clamped to r L
        ([-1.0, -1.0], 6.0),  # clamped to L
    ],
)
def test_budget_eq_5(growth: list[float], expected: float):
    budget = functional.update_budget(torch.tensor(8.0), torch.tensor(growth), gamma=3.0, minimum=6, maximum=24)
    assert budget.item() == pytest.approx(expected)


def test_fidelity_eq_10():
    fidelity = functional.fidelities(TRUNCATED, FULL)
    # A all-zero B (layer 0, second matrix) has fidelity 1.
    expected = torch.tensor([[[5 / 13, 1.0], [0.6, 5 / 13]], [[1.0, 1.0], [1 / 3, 0.6]]])
    torch.testing.assert_close(fidelity, expected)


def test_contribution_eq_9():
    contribution = functional.contributions(TRUNCATED, functional.fidelities(TRUNCATED, FULL))
    # f_A |B| + f_B |A|, matrix by matrix.
    layer_0 = (5 / 13 * 2 + 1 * 5) + (1 * 0 + 1 * 1)
    layer_1 = (0.6 * 1 + 1 / 3 * 6) + (5 / 13 * 3 + 0.6 * 5)
    assert contribution.tolist() == pytest.approx([layer_0, layer_1])


def test_relative_contribution_is_the_mean_over_matrices_over_that_of_all_layers():
    relative = functional.relative_contributions(torch.tensor([4.0, 12.0, 3.0]), torch.tensor([2, 4, 1]))
    # Means 2, 3, 3; their mean 8/3.
    assert relative.tolist() == pytest.approx([0.75, 1.125, 1.125])
    assert functional.relative_contributions(torch.zeros(2), torch.tensor([1, 1])).tolist() == [1.0, 1.0]


def logs(*shares: float) -> Tensor:
    """Contributions whose softmax is proportional to the given shares."""
    return torch.tensor(shares).log()


@pytest.mark.parametrize(
    ("shares", "budget", "max_rank", "expected"),
    [
        # shares of 12: 6, 4, 2, so 5 + 3 + 1 = 9 beyond the first are deserved and there: exactly the shares.
        ((6.0, 4.0, 2.0), 12.0, 8, [6, 4, 2]),
        # The cap cuts 6 down to 5; the rank cut off goes to nobody.
        ((6.0, 4.0, 2.0), 12.0, 5, [5, 4, 2]),
        # Shares 10.8, .6, .6: nobody goes below 1, so that 3 + 9.8 = 12.8 > 12; the first gets what is left.
        ((18.0, 1.0, 1.0), 12.0, 16, [10, 1, 1]),
        # Shares 3.5, 3.5, 3: deserved 2.5 + 2.5 + 2 = 7; the halves tie, and the earlier layer is rounded up.
        ((3.5, 3.5, 3.0), 10.0, 8, [4, 3, 3]),
        # floor(4.9) - 3 = 1 is left; deserved .633 each, scaled to 1/3 each: the first gets it.
        ((1.0, 1.0, 1.0), 4.9, 8, [2, 1, 1]),
        # The smallest and the largest budget.
        ((5.0, 1.0, 1.0), 3.0, 8, [1, 1, 1]),
        ((1.0, 1.0, 1.0), 24.0, 8, [8, 8, 8]),
    ],
)
def test_ranks_eq_8(shares: tuple[float, ...], budget: float, max_rank: int, expected: list[int]):
    ranks = functional.allocate_ranks(logs(*shares), torch.tensor(budget), max_rank)
    assert ranks.dtype == torch.long
    assert ranks.tolist() == expected


def test_temperature_flattens_and_sharpens():
    contribution, budget = torch.tensor([1.5, 1.0, 0.5]), torch.tensor(15.0)
    spread = [
        (ranks.max() - ranks.min()).item()
        for ranks in (functional.allocate_ranks(contribution, budget, 16, t) for t in (0.25, 1.0, 100.0))
    ]
    assert spread[0] > spread[1] > spread[2] == 0


contributions = st.lists(st.floats(0, 20, width=32), min_size=1, max_size=96)


@given(contributions, st.integers(1, 64), st.floats(0, 1), st.floats(0.1, 10))
@settings(max_examples=500, deadline=None)
def test_ranks_stay_in_bounds_and_budget(values: list[float], max_rank: int, fill: float, temperature: float):
    layers = len(values)
    budget = torch.tensor(layers + fill * layers * (max_rank - 1))
    ranks = functional.allocate_ranks(torch.tensor(values), budget, max_rank, temperature)
    assert ranks.shape == (layers,)
    assert ranks.min() >= 1
    assert ranks.max() <= max_rank
    assert ranks.sum() <= math.floor(budget)


def allocation_of_0_1_0(contribution: Tensor, budget: Tensor, max_rank: int, temperature: float) -> Tensor:
    """The function of version 0.1.0, which knew no costs."""
    layers = contribution.numel()
    contribution, order = contribution.sort(descending=True, stable=True)
    shares = (contribution / temperature).softmax(0) * budget
    claims = (shares - 1).clamp(0, max_rank - 1)
    available = budget.floor() - layers
    claims = claims * (available / claims.sum().clamp(min=1e-3)).clamp(max=1)
    floors = claims.floor()
    remainders = claims - floors
    left = (remainders.sum() + 1e-3).floor()
    rounded_up = torch.arange(layers, device=budget.device) < left
    falling = remainders.argsort(descending=True, stable=True)
    ranks = (1 + floors).index_add(0, falling, rounded_up.to(floors.dtype)).long()
    return ranks.index_copy(0, order, ranks)


@given(contributions, st.integers(1, 64), st.floats(0, 1), st.floats(0.1, 10))
@settings(max_examples=500, deadline=None)
def test_equal_costs_give_the_ranks_of_0_1_0(values: list[float], max_rank: int, fill: float, temperature: float):
    contribution = torch.tensor(values)
    budget = torch.tensor(len(values) * (1 + fill * (max_rank - 1)))
    expected = allocation_of_0_1_0(contribution, budget, max_rank, temperature)
    costs = torch.ones(len(values))
    for settings_ in ({}, {"costs": costs}):
        ranks = functional.allocate_ranks(contribution, budget, max_rank, temperature, **settings_)
        assert torch.equal(ranks, expected)


@given(
    st.lists(st.tuples(st.floats(-5, 5, width=32), st.integers(1, 10**6)), min_size=1, max_size=96),
    st.integers(1, 64),
    st.floats(0, 1),
    st.sampled_from([0, 1]),
)
@settings(max_examples=500, deadline=None)
def test_ranks_of_any_costs_stay_in_bounds_and_budget(
    layers: list[tuple[float, int]], max_rank: int, fill: float, min_rank: int
):
    contribution = torch.tensor([value for value, _ in layers])
    costs = torch.tensor([float(cost) for _, cost in layers], dtype=torch.float64)
    costs = (costs / costs.mean()).float()
    budget = torch.tensor(len(layers) * (1 + fill * (max_rank - 1)))
    ranks = functional.allocate_ranks(contribution, budget, max_rank, costs=costs, min_rank=min_rank)
    assert ranks.min() >= min_rank
    assert ranks.max() <= max_rank
    assert (ranks * costs.double()).sum() <= math.floor(budget) * (1 + 1e-5) + 1e-3
    # What is left does not buy a rank for the layer that was next.
    shares = contribution.softmax(0) * budget / costs
    assert (ranks <= (shares.clamp(min=min_rank) + 1)).all()


@given(st.integers(1, 96), st.integers(1, 64), st.floats(0, 1), st.floats(0, 20))
@settings(max_examples=300, deadline=None)
def test_equal_contributions_get_equal_ranks_up_to_rounding(layers: int, max_rank: int, fill: float, value: float):
    budget = torch.tensor(layers + fill * layers * (max_rank - 1))
    ranks = functional.allocate_ranks(torch.full((layers,), value), budget, max_rank)
    assert ranks.max() - ranks.min() <= 1
    # Nothing is cut off and nobody is held up: all of the budget is handed out.
    assert ranks.sum() == math.floor(budget + 1e-3) or ranks.sum() == math.floor(budget)


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=48, unique=True), st.floats(0, 1), st.randoms())
@settings(max_examples=300, deadline=None)
def test_order_of_layers_does_not_matter(values: list[int], fill: float, random):
    contribution = torch.tensor(values, dtype=torch.float64) / 10**6
    budget = torch.tensor(len(values) * (1 + 15 * fill), dtype=torch.float64)
    order = list(range(len(values)))
    random.shuffle(order)
    ranks = functional.allocate_ranks(contribution, budget, 16)
    permuted = functional.allocate_ranks(contribution[order], budget, 16)
    assert permuted.sum() == ranks.sum()
    # A last-bit difference of the softmax's sum may decide a tie of remainders otherwise.
    assert (permuted - ranks[order]).abs().max() <= 1
    assert (permuted != ranks[order]).sum() <= 2


@given(contributions, st.integers(1, 64), st.floats(0, 1))
# The cap makes the last two equal, and there is one rank for both.
@example([0.0, 0.0, 0.0, 0.0, 5.0, 6.0], 2, 0.25)
@settings(max_examples=300, deadline=None)
def test_a_larger_contribution_never_gets_a_smaller_rank(values: list[float], max_rank: int, fill: float):
    contribution = torch.tensor(sorted(values))
    budget = torch.tensor(len(values) * (1 + fill * (max_rank - 1)))
    ranks = functional.allocate_ranks(contribution, budget, max_rank)
    # Equal neighbours may differ by the rounding of one.
    rising = ranks.diff()[contribution.diff() > 1e-4]
    assert (rising >= 0).all()


@given(
    st.floats(1, 96, width=32),
    st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=96),
    st.floats(0, 100),
    st.integers(1, 64),
)
@settings(max_examples=300, deadline=None)
def test_budget_stays_in_its_bounds(budget: float, growth: list[float], gamma: float, max_rank: int):
    layers = len(growth)
    new = functional.update_budget(torch.tensor(budget), torch.tensor(growth), gamma, layers, layers * max_rank)
    assert layers <= new <= layers * max_rank


@given(st.integers(1, 8), st.integers(1, 40), st.integers(1, 40), st.integers(0, 8), st.randoms())
@settings(max_examples=200, deadline=None)
def test_singular_factors_have_the_same_product_and_the_singular_values(r: int, m: int, d: int, true_rank: int, random):
    r, true_rank = min(r, m, d), min(true_rank, r, m, d)
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    A = torch.randn(r, d, generator=generator, dtype=torch.float64)
    B = torch.randn(m, r, generator=generator, dtype=torch.float64)
    B[:, true_rank:] = 0
    new_A, new_B, values = functional.singular_factors(A, B)
    torch.testing.assert_close(new_B @ new_A, B @ A)
    expected = torch.linalg.svdvals(B @ A)[:r]
    torch.testing.assert_close(values, expected, atol=1e-9, rtol=1e-9)
    # Falling components, each with the same norm in both factors; those without worth can learn.
    assert (values.diff() <= 0).all()
    torch.testing.assert_close(new_B.norm(dim=0), values.sqrt(), atol=1e-7, rtol=1e-7)
    assert (values[true_rank:] == 0).all()
    assert (new_A.norm(dim=1) > 0).all()
    gram = new_A @ new_A.T
    torch.testing.assert_close(gram, gram.diag().diag(), atol=1e-7, rtol=1e-7)


worths = st.lists(
    st.tuples(st.lists(st.floats(0, 100), min_size=5, max_size=5), st.integers(1, 1000)), min_size=1, max_size=20
)


@given(worths, st.floats(0, 1), st.sampled_from([0, 1]))
@settings(max_examples=300, deadline=None)
def test_the_largest_components_fit_and_nothing_better_is_left_out(layers: list, fill: float, min_rank: int):
    worth = torch.tensor([sorted(values, reverse=True) for values, _ in layers], dtype=torch.float64)
    costs = torch.tensor([cost for _, cost in layers])
    least, most = min_rank * int(costs.sum()), 5 * int(costs.sum())
    parameters = least + fill * (most - least)
    ranks = functional.largest_components(worth, costs, parameters=parameters, min_rank=min_rank)
    assert (ranks * costs).sum() <= parameters
    assert ranks.min() >= min_rank
    ratio = worth / costs[:, None]
    kept = torch.arange(5) < ranks[:, None]
    chosen = kept & (torch.arange(5) >= min_rank)
    assert (ratio[chosen] > 0).all()
    # A better component was passed over only where it did not fit beside what was taken before it; none would fit now.
    for layer, component in (~kept & (ratio > 0)).nonzero().tolist():
        better = chosen & (ratio >= ratio[layer, component])
        used = least + (better.sum(1) * costs).sum()
        assert component > ranks[layer] or used + costs[layer] > parameters
        assert (ranks * costs).sum() + costs[layer] > parameters


@given(worths, st.floats(0.01, 1))
@settings(max_examples=300, deadline=None)
def test_a_share_of_the_energy_is_reached_and_not_exceeded_by_a_component(layers: list, energy: float):
    worth = torch.tensor([sorted(values, reverse=True) for values, _ in layers], dtype=torch.float64)
    costs = torch.tensor([cost for _, cost in layers])
    ranks = functional.largest_components(worth, costs, energy=energy, min_rank=0)
    kept = torch.arange(5) < ranks[:, None]
    total = worth.sum()
    assert worth[kept].sum() >= energy * total * (1 - 1e-12)
    if kept.any():
        ratio = torch.where(kept, worth / costs[:, None], torch.inf)
        least = ratio.min()
        assert (worth[kept & (ratio > least)]).sum() < energy * total
