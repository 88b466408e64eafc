"""RankAllocator: computes ranks from the norms of the rank components and writes them into the layers."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lalora_lightning import functional
from lalora_lightning.adapters import (
    Condensation,
    component_costs,
    condense_layers,
    lora_layers,
    require_lora_layers,
    require_no_initial_factors,
    require_room,
    require_unmerged,
)
from lalora_lightning.allocator.broadcasts import leave_masks_out_of_broadcasts
from lalora_lightning.allocator.checks import require_allocatable_layers, require_matching_allocator_state
from lalora_lightning.allocator.component_norms import ComponentNorms
from lalora_lightning.allocator.optimizer_state import reset_optimizer_state
from lalora_lightning.allocator.settings import AllocationSettings, Contribution, ContributionScale, Growth
from lalora_lightning.names import GroupBy, group_names

__all__ = ["FISHER_DECAY", "RankAllocator"]

FISHER_DECAY = 0.9
"""Weight of the past in the moving average of squared gradients."""


class RankAllocator:
    """Updates the rank of every layer of an adapted model after each optimizer step.

    La-LoRA (Gu et al., Neural Networks 194, 2025, 108095): the Dynamic Contribution-Driven Parameter Budget (Eqs. 5-7)
    limits the sum of the ranks of all layers. The Truncated Norm Weighted Dynamic Rank Allocation (Eqs. 8-10) divides
    it among the layers. The published equations are unstable, so the defaults differ from them. The published form is
    ``growth="stored"`` with ``contribution_scale="absolute"``.

    :meth:`step` does not synchronize with the device, and its number of operations does not depend on the number of
    layers. If the ranks of the model are not the allocator's, because a state was loaded or a rank was set, the
    allocator continues with those of the model.

    ::

        add_lora(model, rank=8)
        allocator = RankAllocator(model)
        for batch in batches:
            loss(model, batch).backward()
            optimizer.step()
            allocator.step()

    Args:
        model: A module with :class:`TruncatedLoRALinear` layers of one maximum rank. Their ranks are reset: to 1,
            or to the ranks of the full budget with ``gradual_budget=False``.
        gamma: How strongly growth of the values increases the budget (Eq. 5). All settings are explained at
            :class:`lalora_lightning.allocator.AllocationSettings`.
        contribution: ``"norm"`` (Eq. 9), or ``"fisher"``, which replaces the norms by averaged squared gradients and
            requires a call of :meth:`observe_gradients` before every optimizer step.
        contribution_scale: ``"relative"`` to the mean of all layers, or ``"absolute"``.
        temperature: Values above 1 make the layers' shares more equal, values below 1 less equal.
        growth: ``"matched"`` compares values at the same rank, ``"stored"`` with the value at the previous rank.
        gradual_budget: With False, the whole budget is available from the first step (Table 10).
        fidelity: With False, contributions do not contain the fidelities (Table 11).
        average_rank: The maximum of the budget is ``average_rank * L``; by default it is ``max_rank * L``.
        group_by: Which projections share a rank, see :func:`lalora_lightning.names.group_names`.
        min_rank: Minimum rank of a layer, 1 or 0.
        interval: Update the ranks at every ``interval``-th call of :meth:`step`.
        freeze_after: Number of calls of :meth:`step` after which ranks and budget stay fixed.

    Attributes:
        settings: The arguments as :class:`lalora_lightning.allocator.AllocationSettings`.
        layer_names: Name of each layer, in the order of ``ranks``.
        max_rank: Maximum rank of a layer.
        parameters_per_rank: L numbers of parameters of one rank of each layer.
        costs: ``(L,)`` the same, divided by their mean (difference 12 in docs/method.md).
        ranks: ``(L,)`` int64, the current ranks.
        budget: Scalar in [L, average_rank * L], a number of ranks of mean cost.
        condensed: Whether :meth:`condense` was called.
        steps: Calls of :meth:`step` so far.
        skipped: Scalar int64, number of steps without an update because a norm was not finite.
        contributions: ``(L,)`` contributions in the last update (Eq. 9); NaN before the first update.
        growth_rates: ``(L,)`` growth rates in the last update (Eq. 6); NaN before the first update.

    Raises:
        ValueError: The model has no LoRA layers, or its LoRA layers have different maximum ranks, several devices or
            flattened parameters (FSDP1, DeepSpeed stage 3), or an argument is out of range.
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
        min_rank: int = 1,
        interval: int = 1,
        freeze_after: int | None = None,
    ) -> None:
        self.settings = AllocationSettings(
            gamma=gamma,
            contribution=contribution,
            contribution_scale=contribution_scale,
            temperature=temperature,
            growth=growth,
            gradual_budget=gradual_budget,
            fidelity=fidelity,
            average_rank=average_rank,
            group_by=group_by,
            min_rank=min_rank,
            interval=interval,
            freeze_after=freeze_after,
        )
        if isinstance(freeze_after, float) and not freeze_after.is_integer():
            raise ValueError(
                f"Expected freeze_after to be a number of steps but got {freeze_after}; only LaLoraCallback knows the "
                "length of the run and accepts a fraction of it."
            )
        layers = require_lora_layers(model)
        require_unmerged(layers)
        leave_masks_out_of_broadcasts(model)
        self.max_rank = require_allocatable_layers(layers, average_rank)
        groups = group_names(layers, group_by)
        self.layer_names = list(groups)
        self.min_budget = float(len(groups))
        self.max_budget = float(len(groups) * (self.max_rank if average_rank is None else average_rank))
        self.steps, self.condensed = 0, False

        # Sorted by layer, like `layer_names`.
        self._layers, self._groups = layers, groups
        self._projections = [layers[name] for names in groups.values() for name in names]
        self._norms = ComponentNorms(groups, layers)
        device = self._projections[0].lora_A.device
        layer_of = [i for i, names in enumerate(groups.values()) for _ in names]
        self._layer_of = torch.tensor(layer_of, device=device)
        self._components = torch.arange(self.max_rank, device=device)
        self._masks = torch.empty(len(self._projections), self.max_rank, dtype=torch.float32, device=device)
        costs = component_costs(layers, groups)
        self.parameters_per_rank: list[int] = costs.tolist()
        self.costs = (costs / costs.double().mean()).to(device, torch.float32)
        # Not the default type, which cannot count a large budget if it is bfloat16.
        budget = self.min_budget if gradual_budget else self.max_budget
        self.budget = torch.tensor(budget, dtype=torch.float32, device=device)
        even = torch.zeros(len(groups), dtype=torch.float32, device=device)
        if gradual_budget:
            self.ranks = torch.ones_like(even, dtype=torch.long)
        else:
            self.ranks = functional.allocate_ranks(
                even, self.budget, self.max_rank, costs=self.costs, min_rank=min_rank
            )
        self.skipped = torch.zeros((), dtype=torch.long, device=device)
        self.contributions = self.growth_rates = torch.full_like(even, math.nan)
        squares = self._norms.of_parameters()
        self._fisher = torch.zeros_like(squares) if contribution == "fisher" else None
        self._observed = False
        self._value = functional.values(
            functional.truncated_norms(functional.norms_by_rank(squares), self.ranks), self.ranks
        )
        self._write()

    @torch.no_grad()
    def observe_gradients(self) -> None:
        """Add the current gradients to the Fisher average, if ``contribution="fisher"``.

        Call this after unscaling the gradients, and before clipping them and the optimizer step. Gradients that are not
        finite are skipped.
        """
        if self._fisher is None:
            return
        self.follow_model()
        squares = self._norms.of_gradients()
        average = torch.lerp(squares, self._fisher.to(squares.dtype), FISHER_DECAY)
        self._fisher = torch.where(squares.sum() < math.inf, average, self._fisher)
        self._observed = True

    @torch.no_grad()
    def step(self) -> None:
        """Update the ranks from the current weights; call this after every optimizer step.

        Raises:
            RuntimeError: ``contribution="fisher"`` and :meth:`observe_gradients` was never called.
        """
        if self._fisher is not None and not self._observed:
            raise RuntimeError(
                'Expected observe_gradients() to be called before the optimizer step with contribution="fisher" '
                "but it was not."
            )
        self.steps += 1
        self.follow_model()
        if self.frozen or self.steps % self.settings.interval:
            return
        norms = functional.norms_by_rank(self._norms.of_parameters())
        measured = self._measured(self.ranks)
        truncated = functional.truncated_norms(norms, measured)
        value = functional.values(truncated, measured)
        self.growth_rates = functional.growth_rates(value, self._value)
        self.contributions = self._compute_contributions(norms, truncated)
        budget = functional.update_budget(
            self.budget, self.growth_rates, self.settings.gamma, self.min_budget, self.max_budget
        )
        ranks = functional.allocate_ranks(
            self.contributions,
            budget,
            self.max_rank,
            self.settings.temperature,
            costs=self.costs,
            min_rank=self.settings.min_rank,
        )
        if self.settings.growth == "matched":
            measured = self._measured(ranks)
            value = functional.values(functional.truncated_norms(norms, measured), measured)

        # The norms at full rank include every component and are not negative, so any NaN or Inf shows in their sum.
        finite = norms[..., -1].sum() < math.inf
        self.ranks = torch.where(finite, ranks, self.ranks)
        self.budget = torch.where(finite, budget, self.budget)
        self._value = torch.where(finite, value, self._value)
        self.skipped += ~finite
        self._write()

    def drives(self, model: nn.Module) -> bool:
        """Return whether the model's LoRA layers are exactly those of this allocator."""
        return set(lora_layers(model).values()) == set(self._projections)

    def read(self) -> tuple[list[int], float, int]:
        """Copy ranks, budget and the number of skipped steps from the device, in one transfer."""
        rows, skipped = self.read_steps([])
        return *rows[-1], skipped

    def read_steps(self, earlier: Sequence[tuple[Tensor, Tensor]]) -> tuple[list[tuple[list[int], float]], int]:
        """Copy ranks and budgets of several steps and the number of skipped steps from the device, in one transfer.

        Args:
            earlier: ``ranks`` and ``budget`` as they were after earlier steps.

        Returns:
            Ranks and budget of each of them and of the present, and the number of skipped steps.
        """
        self.follow_model()
        steps = [*earlier, (self.ranks, self.budget)]
        ranks = torch.stack([ranks for ranks, _ in steps]).double()
        budgets = torch.stack([budget for _, budget in steps]).double()
        values = torch.cat([ranks.flatten(), budgets, self.skipped.double().view(1)]).tolist()
        layers = len(self.layer_names)
        rows = [
            ([int(rank) for rank in values[i * layers : (i + 1) * layers]], values[len(steps) * layers + i])
            for i in range(len(steps))
        ]
        return rows, int(values[-1])

    @property
    def frozen(self) -> bool:
        """Whether the ranks stay fixed from now on."""
        past = self.settings.freeze_after is not None and self.steps > self.settings.freeze_after
        return self.condensed or past

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a run needs to resume, as tensors and plain types."""
        self.follow_model()
        return {
            "layer_names": list(self.layer_names),
            "max_rank": self.max_rank,
            "steps": self.steps,
            "condensed": self.condensed,
            "ranks": self.ranks.clone(),
            "budget": self.budget.clone(),
            "value": self._value.clone(),
            "skipped": self.skipped.clone(),
            "fisher": None if self._fisher is None else self._fisher.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state that :meth:`state_dict` returned, and write its ranks into the model.

        Raises:
            ValueError: The state has other layers, another maximum rank or another contribution; the message lists
                everything that differs. The allocator is left unchanged.
        """
        require_matching_allocator_state(state, self.state_dict(), self.settings.contribution)
        device = self._layer_of.device
        self.steps, self.condensed = state["steps"], bool(state.get("condensed", False))
        self.ranks, self.budget, self.skipped, self._value = (
            state[key].to(device, copy=True) for key in ("ranks", "budget", "skipped", "value")
        )
        if self._fisher is not None:
            self._fisher = state["fisher"].to(device, copy=True)
            self._observed = True
        self._write()

    def require_condensable(self, average_rank: float) -> None:
        """Check, before training, that :meth:`condense` will be able to drop components.

        Raises:
            ValueError: ``average_rank`` is not below the maximum rank, or so low that nothing would be left; or an
                adapter has initial factors.
        """
        if average_rank >= self.max_rank:
            raise ValueError(
                f"Expected the average rank to condense to, to be below the maximum rank {self.max_rank} but got "
                f"{average_rank}; raise the rank of the adapters."
            )
        require_room(self.parameters_per_rank, average_rank * sum(self.parameters_per_rank), self.settings.min_rank)
        require_no_initial_factors(self._layers)

    def condense(
        self,
        average_rank: float,
        optimizers: Iterable[Optimizer] = (),
        agree: Callable[[Tensor], None] | None = None,
    ) -> Condensation:
        """Condense the adapters once, and keep their ranks from now on; see :func:`lalora_lightning.condense_lora`.

        Args:
            average_rank: As many parameters as LoRA with this rank on the same projections.
            optimizers: Optimizers of the adapters, whose state for them is reset.
            agree: Called with each tensor of results, to make it the same on all processes.

        Returns:
            A summary to print.

        Raises:
            ValueError: ``average_rank`` is out of range, or an adapter cannot be condensed. Nothing is changed.
            RuntimeError: A layer is merged.
        """
        size = {"average_rank": average_rank}
        condensation = condense_layers(self._layers, self._groups, size, self.settings.min_rank, agree)
        for optimizer in optimizers:
            reset_optimizer_state(optimizer, [p for layer in self._projections for p in (layer.lora_A, layer.lora_B)])
        self.condensed = True
        self.follow_model()
        self.budget = (self.ranks * self.costs).sum()
        return condensation

    def _measured(self, ranks: Tensor) -> Tensor:
        """Return the ranks at which layers are measured; a layer of rank 0 is measured at rank 1."""
        return ranks.clamp(min=1) if self.settings.min_rank == 0 else ranks

    def _compute_contributions(self, norms: Tensor, truncated: Tensor) -> Tensor:
        if self._fisher is not None:
            norms = functional.norms_by_rank(self._fisher)
            truncated = functional.truncated_norms(norms, self._measured(self.ranks))
        if self.settings.fidelity:
            fidelity = functional.fidelities(truncated, norms[..., -1])
        else:
            fidelity = torch.ones_like(truncated)
        contribution = functional.contributions(truncated, fidelity)
        if self.settings.contribution_scale == "relative":
            return functional.relative_contributions(contribution, self._norms.matrices)
        return contribution

    @torch.no_grad()
    def follow_model(self) -> None:
        """Continue with the ranks and on the device of the model, if its masks are not those that were noted.

        The other methods do this first. Masks that were changed in place often have the same values, for example when
        DDP sends buffers. They are compared on the device. Masks that were replaced belong to another state of the
        model, so the values of its layers are not compared with the old ones, and growth is zero in the next step.
        """
        masks = [layer.rank_mask for layer in self._projections]
        replaced = any(mask is not noted for mask, (noted, _) in zip(masks, self._noted, strict=True))
        if not replaced and all(_version(mask) == version for mask, version in self._noted):
            return
        if any(layer.max_rank != self.max_rank for layer in self._projections):
            raise RuntimeError("Expected a model that was not trimmed but it was trimmed; its ranks are final.")
        device = masks[0].device
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        self._norms.to(device)
        # Projections that share a rank may have got different ones.
        found = torch.stack(masks).count_nonzero(1)
        ranks = torch.zeros_like(self.ranks).scatter_reduce(0, self._layer_of, found, "amax")
        changed = (found != self.ranks[self._layer_of]).any()
        self.ranks = torch.where(changed, ranks, self.ranks)
        if self.settings.gradual_budget:
            budget = (ranks * self.costs).sum().clamp(self.min_budget, self.max_budget)
            self.budget = torch.where(changed, budget, self.budget)
        self._value = torch.zeros_like(self._value) if replaced else torch.where(changed, 0.0, self._value)
        self._note_masks(masks)

    def _write(self) -> None:
        """Write the masks of all layers."""
        masks = [layer.rank_mask for layer in self._projections]
        torch.lt(self._components, self.ranks[self._layer_of][:, None], out=self._masks)
        torch._foreach_copy_(masks, list(self._masks.unbind()))
        self._note_masks(masks)

    def _note_masks(self, masks: Sequence[Tensor]) -> None:
        """Note the masks whose ranks are those of the allocator."""
        self._noted = [(mask, _version(mask)) for mask in masks]


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place; 0 if torch does not count it."""
    return 0 if tensor.is_inference() else tensor._version
