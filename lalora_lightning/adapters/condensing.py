"""condense_lora: rewrite adapters along their singular directions and keep the components that carry the most."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lalora_lightning import functional
from lalora_lightning.adapters.inspection import require_lora_layers, require_unmerged
from lalora_lightning.layers import TruncatedLoRALinear
from lalora_lightning.names import GroupBy, group_names
from lalora_lightning.sharding import scatter_into

__all__ = [
    "Condensation",
    "component_costs",
    "condense_layers",
    "condense_lora",
    "condensed_parameters",
    "require_no_initial_factors",
    "require_room",
]


@dataclass(frozen=True)
class Condensation:
    """What :func:`condense_lora` kept; ``str`` returns it as one line.

    Attributes:
        ranks: Rank of each layer, by name.
        ranks_before: Rank of each layer before.
        energy: Share of the squared Frobenius norm of each layer's increment that was kept, in [0, 1].
        total_energy: Share of the sum over all layers that was kept, in [0, 1].
        parameters: Parameters of the adapters, trimmed to these ranks.
        parameters_before: Parameters of the adapters, trimmed to the ranks before.
    """

    ranks: dict[str, int]
    ranks_before: dict[str, int]
    energy: dict[str, float]
    total_energy: float
    parameters: int
    parameters_before: int

    def __str__(self) -> str:
        """Return the counts as one line."""
        ranks = self.ranks.values()
        return (
            f"{self.parameters:,} of {self.parameters_before:,} adapter parameters kept, with {self.total_energy:.2%} "
            f"of the energy; ranks {min(ranks)} to {max(ranks)}"
        )


def condense_lora(
    model: nn.Module,
    average_rank: float | None = None,
    *,
    parameters: int | None = None,
    energy: float | None = None,
    min_rank: int = 1,
    group_by: GroupBy = "module",
    agree: Callable[[Tensor], None] | None = None,
) -> Condensation:
    """Lower the ranks of a trained model: keep the components of the increments that carry the most per parameter.

    Each increment ``B A`` is rewritten by its singular value decomposition, which does not change the function of the
    model. Component ``j`` of a layer is worth the sum of ``(scaling * S_j) ** 2`` over its matrices, and costs their
    ``m + d`` parameters. The components of all layers with the largest worth per parameter are kept (difference 13 in
    docs/method.md). Ranks are masks as before: call :func:`lalora_lightning.trim_lora` to cut the adapters. Give one of
    ``average_rank``, ``parameters`` and ``energy``.

    ::

        print(condense_lora(model, average_rank=2))
        trim_lora(model)

    In a run, an optimizer that has a state needs :func:`lalora_lightning.allocator.reset_optimizer_state` afterwards,
    since its state belongs to the former directions. :meth:`lalora_lightning.RankAllocator.condense` does both.

    Args:
        model: An adapted model, trained here or loaded by :func:`lalora_lightning.load_peft_adapter`.
        average_rank: As many parameters as LoRA with this rank on the same projections.
        parameters: Largest number of parameters of the adapters.
        energy: Share of the sum of all squared Frobenius norms to keep, in (0, 1].
        min_rank: Rank that every layer keeps, 0 or 1.
        group_by: Which projections share a rank, see :func:`lalora_lightning.names.group_names`.
        agree: Called with each tensor of results, to make it the same on all processes.

    Returns:
        A summary to print.

    Raises:
        ValueError: Not exactly one size is given or it is out of range; the model has no LoRA layers; an adapter is not
            finite or has initial factors (PiSSA, OLoRA, MiLoRA). The model is left unchanged.
        RuntimeError: A layer is merged.
    """
    layers = require_lora_layers(model)
    groups = group_names(layers, group_by)
    size = {"average_rank": average_rank, "parameters": parameters, "energy": energy}
    return condense_layers(layers, groups, size, min_rank, agree)


@torch.no_grad()
def condense_layers(
    layers: Mapping[str, TruncatedLoRALinear],
    groups: Mapping[str, Sequence[str]],
    size: Mapping[str, float | None],
    min_rank: int,
    agree: Callable[[Tensor], None] | None,
) -> Condensation:
    """Condense layers by name in these groups; see :func:`condense_lora`, which has the arguments in ``size``, too."""
    require_unmerged(layers)
    costs = component_costs(layers, groups)
    limit = _require_size(costs, size, min_rank)
    factors = {name: _singular_factors(name, layer) for name, layer in layers.items()}
    if agree is not None:
        for tensors in factors.values():
            for tensor in tensors:
                agree(tensor)
    worth = _worths(layers, groups, {name: values for name, (_, _, values) in factors.items()})
    counts = functional.largest_components(
        worth, costs, parameters=limit, energy=size.get("energy") or 1.0, min_rank=min_rank
    )

    ranks = dict(zip(groups, counts.tolist(), strict=True))
    before = {group: max(int(layers[name].rank) for name in names) for group, names in groups.items()}
    parameters_before = sum(int(layer.rank) * _cost(layer) for layer in layers.values())
    for group, names in groups.items():
        for name in names:
            A, B, _ = factors[name]
            scatter_into(layers[name].lora_A, A)
            scatter_into(layers[name].lora_B, B)
            layers[name].set_rank(min(ranks[group], layers[name].max_rank))
    kept = torch.where(torch.arange(worth.shape[1], device="cpu") < counts[:, None], worth, 0.0).sum(1)
    totals = worth.sum(1)
    return Condensation(
        ranks=ranks,
        ranks_before=before,
        energy=dict(zip(groups, _shares(kept, totals), strict=True)),
        total_energy=_shares(kept.sum(), totals.sum()),
        parameters=sum(int(layer.rank) * _cost(layer) for layer in layers.values()),
        parameters_before=parameters_before,
    )


@torch.no_grad()
def condensed_parameters(model: nn.Module, energies: Sequence[float], group_by: GroupBy = "module") -> list[int]:
    """Return how many adapter parameters :func:`condense_lora` would keep, without changing the model.

    A sharded adapter is gathered, so every process has to call this.

    Args:
        model: An adapted model.
        energies: Shares of the energy to keep, each in (0, 1].
        group_by: Which projections share a rank.

    Raises:
        ValueError: The model has no LoRA layers, or an adapter cannot be condensed.
    """
    layers = require_lora_layers(model)
    groups = group_names(layers, group_by)
    costs = component_costs(layers, groups)
    worth = _worths(layers, groups, {name: _singular_factors(name, layer)[2] for name, layer in layers.items()})
    kept = [functional.largest_components(worth, costs, energy=energy) for energy in energies]
    return [int((counts * costs).sum()) for counts in kept]


def component_costs(layers: Mapping[str, TruncatedLoRALinear], groups: Mapping[str, Sequence[str]]) -> Tensor:
    """Return the parameters of one component of each layer, the sum of ``m + d`` over its matrices.

    Args:
        layers: Projections by name.
        groups: Names of the projections of each layer.

    Returns:
        ``(L,)`` int64 on the CPU.
    """
    return torch.tensor([sum(_cost(layers[name]) for name in names) for names in groups.values()], device="cpu")


def require_no_initial_factors(layers: Mapping[str, TruncatedLoRALinear]) -> None:
    """Check that the increments are products of two factors.

    Raises:
        ValueError: A layer has initial factors (PiSSA, OLoRA, MiLoRA).
    """
    for name, layer in layers.items():
        try:
            layer.require_no_initial_factors()
        except ValueError as error:
            raise ValueError(f"Cannot condense {name}. {error}") from error


def _cost(layer: TruncatedLoRALinear) -> int:
    """Return the parameters of one component of all slices."""
    return layer.lora_A.shape[1] * len(layer.out_slices) + layer.lora_B.shape[0]


def _require_size(costs: Tensor, size: Mapping[str, float | None], min_rank: int) -> float | None:
    """Check the size to condense to, and return it as a number of parameters; None if it is a share of the energy."""
    average_rank, parameters, energy = (size.get(name) for name in ("average_rank", "parameters", "energy"))
    given = [name for name, value in size.items() if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"Expected one of average_rank, parameters and energy but got {' and '.join(given) or 'none of them'}."
        )
    if min_rank not in (0, 1):
        raise ValueError(f"Expected min_rank to be 0 or 1 but got {min_rank!r}.")
    if energy is not None:
        if not 0 < energy <= 1:
            raise ValueError(f"Expected energy to be in (0, 1] but got {energy}.")
        return None
    if average_rank is not None:
        if not average_rank >= min_rank or average_rank <= 0:
            raise ValueError(f"Expected average_rank to be positive and at least {min_rank} but got {average_rank}.")
        parameters = average_rank * int(costs.sum())
    assert parameters is not None
    require_room(costs.tolist(), parameters, min_rank)
    return parameters


def require_room(costs: Sequence[int], parameters: float, min_rank: int) -> None:
    """Check that a limit on parameters leaves room for the minimum rank of all layers, and for some component.

    Args:
        costs: Parameters of one component of each layer.
        parameters: The limit.
        min_rank: Rank that every layer keeps, 0 or 1.

    Raises:
        ValueError: Nothing fits.
    """
    least, what = (sum(costs), "rank 1 for every layer") if min_rank else (min(costs), "rank 1 for the smallest layer")
    if not parameters >= least:
        raise ValueError(f"Expected at least {least:,} parameters, {what}, but got {parameters:,.0f}.")


def _singular_factors(name: str, layer: TruncatedLoRALinear) -> tuple[Tensor, Tensor, Tensor]:
    try:
        return layer.singular_factors()
    except (ValueError, torch.linalg.LinAlgError) as error:
        raise ValueError(f"Cannot condense {name}. {error}") from error


def _worths(
    layers: Mapping[str, TruncatedLoRALinear], groups: Mapping[str, Sequence[str]], values: Mapping[str, Tensor]
) -> Tensor:
    """Return the worth of each component of each layer, the sum over its matrices, as ``(L, r)`` on the CPU."""
    longest = max(layer.max_rank for layer in layers.values())
    worths = {
        name: F.pad((layer.scaling * values[name].double()).square().sum(0), (0, longest - layer.max_rank)).cpu()
        for name, layer in layers.items()
    }
    return torch.stack([torch.stack([worths[name] for name in names]).sum(0) for names in groups.values()])


def _shares(kept: Tensor, total: Tensor) -> Any:
    """Return the kept share of each total; 1 if there was nothing to keep."""
    return torch.where(total > 0, kept / total, 1.0).tolist()
