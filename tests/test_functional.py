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
