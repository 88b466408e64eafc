"""RankAllocator: reads the norms of the rank components, asks `functional` for ranks, writes them; any nn.Module."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lalora_lightning import functional
from lalora_lightning.adapters import GroupBy, group_names, lora_layers, require_lora_layers, require_unmerged
from lalora_lightning.layers import TruncatedLoRALinear, whole

Contribution = Literal["norm", "fisher"]
ContributionScale = Literal["relative", "absolute"]
Growth = Literal["matched", "stored"]

# Weight of the past in the moving average of squared gradients.
FISHER_DECAY = 0.9


class RankAllocator:
    """Decides after each optimizer step how much rank every layer of an adapted model may use.

    La-LoRA (Gu et al., Neural Networks 194, 2025, 108095): the Dynamic Contribution-Driven Parameter Budget (Eqs. 5-7)
    says how much rank the whole model may use now, the Truncated Norm Weighted Dynamic Rank Allocation (Eqs. 8-10)
    which layer gets it. The defaults depart from the letter where the letter is unstable; ``growth="stored"`` and
    ``contribution_scale="absolute"`` run the letter.

    ``step()`` never asks the device for a number, and launches as many operations for 96 layers as for 6.

    ::

        add_lora(model, rank=8)
        allocator = RankAllocator(model)
        for batch in batches:
            loss(model, batch).backward()
            optimizer.step()
            allocator.step()

    Args:
        model: A module with :class:`TruncatedLoRALinear` layers of one maximum rank. Their ranks start anew: at 1, with
            ``gradual_budget=False`` at the budget's end.
        gamma: How strongly growth of the values grows the budget (Eq. 5). The budget is about
            ``L * (s / s_0) ** gamma``, so that 8 fills it when the values have grown by ``r ** (1 / 8)``,
            at rank 8 by 30%. Zero keeps it.
        contribution: ``"norm"`` (Eq. 9) or ``"fisher"``, where the root of the averaged squared gradients takes the
            place of the norms in Eqs. 9 and 10; call :meth:`observe_gradients` before every optimizer step then.
        contribution_scale: ``"relative"`` divides contributions by their mean over layers, ``"absolute"`` does not.
        temperature: Above 1 makes the layers' shares more equal, below 1 less.
        growth: ``"matched"`` compares values at one rank; ``"stored"`` with the number stored under the previous rank.
        gradual_budget: False gives the whole budget from the start (Table 10).
        fidelity: False leaves the fidelities out of the contribution (Table 11).
        average_rank: The budget ends at ``average_rank * L``, by default at ``max_rank * L``.
        group_by: Which projections share a rank, see :func:`lalora_lightning.adapters.group_names`.
        interval: Act at every ``interval``-th call of :meth:`step`.
        freeze_after: Number of calls of :meth:`step` after which ranks and budget stay as they are.

    Attributes:
        layer_names: Name of each layer, in the order of ``ranks``.
        ranks: ``(L,)`` int64, the ranks in force.
        budget: Scalar in [L, average_rank * L].
        steps: Calls of :meth:`step` so far.
        skipped: Scalar int64, how many of them changed nothing because a norm was not finite.
        contributions: ``(L,)``, what the last decision shared the budget by (Eq. 9); NaN before the first one.
        growth_rates: ``(L,)``, growth of the values over the step before the last decision (Eq. 6); NaN likewise.

    Raises:
        ValueError: The model has no LoRA layers, layers of different maximum rank, on several devices or with flattened
            parameters (FSDP of the first generation, DeepSpeed stage 3), or an argument is out of range.
        RuntimeError: A layer is merged.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        gamma: float = 8.0,
        contribution: Contribution = "norm",
        contribution_scale: ContributionScale = "relative",
        temperature: float = 1.0,
        growth: Growth = "matched",
        gradual_budget: bool = True,
        fidelity: bool = True,
        average_rank: float | None = None,
        group_by: GroupBy = "block",
        interval: int = 1,
        freeze_after: int | None = None,
    ) -> None:
        check_settings(gamma, contribution, contribution_scale, temperature, growth, interval, freeze_after)
        layers = require_lora_layers(model)
        require_unmerged(layers)
        groups = group_names(layers, group_by)
        max_ranks = {layer.max_rank for layer in layers.values()}
        if len(max_ranks) > 1:
            raise ValueError(
                f"Expected all layers to have one maximum rank but got {sorted(max_ranks)}; "
                "ranks of a trimmed model, or of a rank_pattern, are final: train it without an allocator, with the "
                "callback by fixed_ranks=True."
            )
        self.max_rank = max_ranks.pop()
        for name, layer in layers.items():
            if layer.lora_A.ndim != 2 or layer.lora_B.ndim != 2:
                raise ValueError(
                    "Expected adapters to be whole on every process, or sharded by fully_shard (FSDP2, "
                    f"ModelParallelStrategy), but {name}.lora_A has the shape {tuple(layer.lora_A.shape)}: FSDP of the "
                    "first generation and DeepSpeed stage 3 flatten parameters."
                )
        devices = sorted({str(layer.lora_A.device) for layer in layers.values()})
        if len(devices) > 1:
            raise ValueError(
                f"Expected all adapters to be on one device but they are on {', '.join(devices)}; load the model "
                "without device_map, onto one."
            )
        if average_rank is not None and not 1 <= average_rank <= self.max_rank:
            raise ValueError(f"Expected average_rank to be in [1, {self.max_rank}] but got {average_rank}.")

        self.layer_names = list(groups)
        self.gamma = gamma
        self.contribution = contribution
        self.contribution_scale = contribution_scale
        self.temperature = temperature
        self.growth = growth
        self.fidelity = fidelity
        self.interval = interval
        self.freeze_after = freeze_after
        self.min_budget = float(len(groups))
        self.max_budget = float(len(groups) * (self.max_rank if average_rank is None else average_rank))
        self.steps = 0

        # Projections in the order of the layers they belong to.
        self._projections: list[TruncatedLoRALinear] = [layers[name] for names in groups.values() for name in names]
        self._index(groups, layers)
        device = self._projections[0].lora_A.device
        self.budget = torch.tensor(self.min_budget if gradual_budget else self.max_budget, device=device)
        even = torch.zeros(len(groups), device=device)
        self.ranks = functional.allocate_ranks(even, self.budget, self.max_rank)
        self.skipped = torch.zeros((), dtype=torch.long, device=device)
        self.contributions = self.growth_rates = torch.full_like(even, math.nan)
        squares = self._component_squares(_parameter)
        self._fisher = torch.zeros_like(squares) if contribution == "fisher" else None
        self._observed = False
        self._value = functional.values(
            functional.truncated_norms(functional.norms_by_rank(squares), self.ranks), self.ranks
        )
        self._bind()
        self._write()

    @torch.no_grad()
    def observe_gradients(self) -> None:
        """Take the gradients into the Fisher average; after unscaling, before clipping, before the optimizer step.

        A gradient that is not finite is passed over. Does nothing unless ``contribution="fisher"``.
        """
        if self._fisher is None:
            return
        self._follow_device()
        squares = self._component_squares(_gradient)
        average = torch.lerp(squares, self._fisher.to(squares.dtype), FISHER_DECAY)
        self._fisher = torch.where(squares.sum() < math.inf, average, self._fisher)
        self._observed = True

    @torch.no_grad()
    def step(self) -> None:
        """Decide the ranks of the next step from the weights after this one; call it after every optimizer step.

        Raises:
            RuntimeError: ``contribution="fisher"`` and :meth:`observe_gradients` was never called.
        """
        if self._fisher is not None and not self._observed:
            raise RuntimeError(
                'Expected observe_gradients() to be called before the optimizer step, since contribution="fisher" '
                "needs gradients, but it was not."
            )
        self.steps += 1
        if self.frozen or self.steps % self.interval:
            return
        self._follow_device()
        norms = functional.norms_by_rank(self._component_squares(_parameter))
        truncated = functional.truncated_norms(norms, self.ranks)
        value = functional.values(truncated, self.ranks)
        self.growth_rates = functional.growth_rates(value, self._value)
        self.contributions = self._contributions(norms, truncated)
        budget = functional.update_budget(self.budget, self.growth_rates, self.gamma, self.min_budget, self.max_budget)
        ranks = functional.allocate_ranks(self.contributions, budget, self.max_rank, self.temperature)
        if self.growth == "matched":
            value = functional.values(functional.truncated_norms(norms, ranks), ranks)

        # The norms at full rank hold every component, and no norm is negative: their sum tells of every NaN and Inf.
        finite = norms[..., -1].sum() < math.inf
        self.ranks = torch.where(finite, ranks, self.ranks)
        self.budget = torch.where(finite, budget, self.budget)
        self._value = torch.where(finite, value, self._value)
        self.skipped += ~finite
        self._write()

    def drives(self, model: nn.Module) -> bool:
        """Whether the model's LoRA layers are the ones that this allocator decides about."""
        return set(lora_layers(model).values()) == set(self._projections)

    @property
    def frozen(self) -> bool:
        """Whether the ranks are final."""
        return self.freeze_after is not None and self.steps > self.freeze_after

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs: tensors and plain types only."""
        return {
            "layer_names": list(self.layer_names),
            "max_rank": self.max_rank,
            "steps": self.steps,
            "ranks": self.ranks.clone(),
            "budget": self.budget.clone(),
            "value": self._value.clone(),
            "skipped": self.skipped.clone(),
            "fisher": None if self._fisher is None else self._fisher.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state that :meth:`state_dict` gave, and write its ranks into the model.

        Raises:
            ValueError: The state is of other layers, another maximum rank or another contribution; the message names
                all that differs, and nothing has changed.
        """
        problems = _mismatches(state, self)
        if problems:
            raise ValueError(f"Cannot load the state of the rank allocator: {'; '.join(problems)}.")
        device = self._projections[0].lora_A.device
        self.steps = state["steps"]
        self.ranks, self.budget, self.skipped, self._value = (
            state[key].to(device, copy=True) for key in ("ranks", "budget", "skipped", "value")
        )
        if self._fisher is not None:
            self._fisher = state["fisher"].to(device, copy=True)
            self._observed = True
        self._follow_device()
        self._write()

    def _contributions(self, norms: Tensor, truncated: Tensor) -> Tensor:
        if self._fisher is not None:
            norms = functional.norms_by_rank(self._fisher)
            truncated = functional.truncated_norms(norms, self.ranks)
        fidelity = functional.fidelities(truncated, norms[..., -1]) if self.fidelity else torch.ones_like(truncated)
        contribution = functional.contributions(truncated, fidelity)
        if self.contribution_scale == "relative":
            return functional.relative_contributions(contribution, self._matrices)
        return contribution

    def _index(self, groups: dict[str, list[str]], layers: dict[str, TruncatedLoRALinear]) -> None:
        """Lay down where each matrix's norms go: equations see (2, L, K, r), padded with a row of zeros."""
        device = self._projections[0].lora_A.device
        self._shapes: dict[tuple[int, torch.Size], list[int]] = {}
        slots = torch.full((2, len(groups), max(_count(layers[n] for n in names) for names in groups.values())), -1)
        matrix = 0
        layer_of: list[int] = []
        for i, names in enumerate(groups.values()):
            layer_of += [i] * len(names)
            factors = [pair for name in names for pair in layers[name].split(layers[name].lora_A, layers[name].lora_B)]
            for k, pair in enumerate(factors):
                for side in (0, 1):
                    self._shapes.setdefault((side, pair[side].shape), []).append(matrix)
                    slots[side, i, k] = 2 * matrix + side
                matrix += 1
        # Norms arrive shape by shape; -1 stays and picks the last row, the padding.
        arrival = [2 * m + side for (side, _), members in self._shapes.items() for m in members]
        position = torch.empty(2 * matrix + 1, dtype=torch.long)
        position[torch.tensor([*arrival, 2 * matrix])] = torch.arange(2 * matrix + 1)
        self._slots = position[slots].to(device)
        self._matrices = (slots[0] >= 0).sum(1).to(device)
        self._layer_of = torch.tensor(layer_of, device=device)
        self._padding = torch.zeros(1, self.max_rank, device=device)
        self._components = torch.arange(self.max_rank, device=device)

    @torch.no_grad()
    def _component_squares(self, read: Callable[[TruncatedLoRALinear], tuple[Tensor, Tensor]]) -> Tensor:
        """Squared norms of all rank components, (2, L, K, r); matrices of one shape are read in one go."""
        factors = [pair for layer in self._projections for pair in layer.split(*read(layer))]
        norms = [
            whole(functional.component_norms(torch.stack([factors[i][side] for i in members]), dim=(-1, -2)[side]))
            for (side, _), members in self._shapes.items()
        ]
        return torch.cat([*norms, self._padding])[self._slots].square()

    def _bind(self) -> None:
        """Make the layers' buffers views of two tensors, so that one operation writes the ranks of all layers."""
        device = self._projections[0].lora_A.device
        self._all_ranks = torch.empty(len(self._projections), dtype=torch.long, device=device)
        self._all_masks = torch.empty(len(self._projections), self.max_rank, dtype=torch.bool, device=device)
        self._bound = list(zip(self._all_ranks, self._all_masks, strict=True))
        for layer, (rank, rank_mask) in zip(self._projections, self._bound, strict=True):
            layer.rank, layer.rank_mask = rank, rank_mask

    def _follow_device(self) -> None:
        """Bind again where the model was moved or its buffers were replaced since."""
        if all(
            layer._buffers["rank"] is rank and layer._buffers["rank_mask"] is mask
            for layer, (rank, mask) in zip(self._projections, self._bound, strict=True)
        ):
            return
        if any(layer.max_rank != self.max_rank for layer in self._projections):
            raise RuntimeError("Expected the model to be as it was but it was trimmed; its ranks are final.")
        device = self._projections[0].lora_A.device
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        self._bind()
        self._write()

    def _write(self) -> None:
        torch.index_select(self.ranks, 0, self._layer_of, out=self._all_ranks)
        torch.lt(self._components, self._all_ranks[:, None], out=self._all_masks)


def check_settings(
    gamma: float,
    contribution: str,
    contribution_scale: str,
    temperature: float,
    growth: str,
    interval: int,
    freeze_after: float | None,
) -> None:
    """Check the arguments that need no model.

    Raises:
        ValueError: An argument is out of range.
    """
    for name, given, kinds in (
        ("contribution", contribution, Contribution),
        ("contribution_scale", contribution_scale, ContributionScale),
        ("growth", growth, Growth),
    ):
        if given not in get_args(kinds):
            raise ValueError(f"Expected {name} to be one of {get_args(kinds)} but got {given!r}.")
    if contribution == "fisher" and contribution_scale == "absolute":
        raise ValueError(
            'Expected contribution_scale="relative" with contribution="fisher", whose scale is that of the gradients, '
            'but got "absolute".'
        )
    if not 0 <= gamma < math.inf:
        raise ValueError(f"Expected gamma to be finite and at least 0 but got {gamma}.")
    # What float32 can divide by; below that one layer has everything long since.
    if not 1e-6 <= temperature < math.inf:
        raise ValueError(f"Expected temperature to be positive, at least 1e-6, and finite but got {temperature}.")
    if not isinstance(interval, int) or interval < 1:
        raise ValueError(f"Expected interval to be at least 1 step, and whole, but got {interval}.")
    if freeze_after is not None and not freeze_after >= 0:
        raise ValueError(f"Expected freeze_after to be at least 0 but got {freeze_after}.")


def _parameter(layer: TruncatedLoRALinear) -> tuple[Tensor, Tensor]:
    return layer.lora_A, layer.lora_B


def _gradient(layer: TruncatedLoRALinear) -> tuple[Tensor, Tensor]:
    A, B = (torch.zeros_like(p) if p.grad is None else p.grad for p in _parameter(layer))
    return A, B


def _count(layers: Iterable[TruncatedLoRALinear]) -> int:
    return sum(len(layer.out_slices) for layer in layers)


def _mismatches(state: Any, allocator: RankAllocator) -> list[str]:
    """A line for everything that keeps a state from being loaded."""
    own = allocator.state_dict()
    if not isinstance(state, Mapping):
        return [f"expected a dict but got {type(state).__name__}"]
    missing = sorted(own.keys() - state.keys())
    if missing:
        return [f"expected the keys {', '.join(own)} but {', '.join(missing)} are missing"]
    problems = []
    own_names, names = own["layer_names"], state["layer_names"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        problems.append(f"expected layer_names to be a list of names but got {names!r}")
    elif own_names != names:
        absent = [name for name in own_names if name not in names]
        unknown = [name for name in names if name not in own_names]
        if absent:
            problems.append(f"the state lacks the layers {', '.join(absent)}")
        if unknown:
            problems.append(f"the state has unknown layers {', '.join(unknown)}")
        if not absent and not unknown:
            problems.append("the state has the layers in another order")
    # The type first: a tensor's comparison is a tensor, which need not be true or false.
    if type(state["max_rank"]) is not int or state["max_rank"] != own["max_rank"]:
        problems.append(f"expected max_rank {own['max_rank']} but got {state['max_rank']!r}")
    if (state["fisher"] is None) != (own["fisher"] is None):
        problems.append(
            f'expected a state of contribution="{allocator.contribution}" but got one of the other contribution'
        )
    if problems:
        return problems
    if type(state["steps"]) is not int or state["steps"] < 0:
        problems.append(f"expected steps to be a number of steps but got {state['steps']!r}")
    for key in ("ranks", "budget", "value", "skipped", "fisher"):
        if own[key] is not None:
            problems += _misfit(key, state[key], own[key])
    if problems:
        return problems
    if not (state["ranks"].min() >= 1 and state["ranks"].max() <= allocator.max_rank):
        problems.append(f"expected ranks in [1, {allocator.max_rank}] but got {state['ranks'].tolist()}")
    # Above max_budget it comes from a run of another average_rank, and the next step mends it.
    full = len(own_names) * allocator.max_rank
    if not allocator.min_budget <= state["budget"] <= full:
        problems.append(f"expected the budget to be in [{len(own_names)}, {full}] but got {float(state['budget'])}")
    problems += [
        f"expected {key} to be finite and not negative but it is not"
        for key in ("value", "fisher")
        if own[key] is not None and not (state[key].min() >= 0 and state[key].max() < math.inf)
    ]
    return problems


def _misfit(key: str, given: Any, own: Tensor) -> list[str]:
    if not isinstance(given, Tensor) or given.is_complex() or given.is_floating_point() != own.is_floating_point():
        kind = "floating-point" if own.is_floating_point() else "integer"
        return [f"expected {key} to be a {kind} tensor but got {getattr(given, 'dtype', type(given).__name__)}"]
    if given.shape != own.shape:
        return [f"expected {key} of shape {tuple(own.shape)} but got {tuple(given.shape)}"]
    return []
