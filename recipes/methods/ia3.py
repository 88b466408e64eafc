"""(IA)^3 (arXiv 2205.05638) with the peft library: trained factors on keys, values and hidden units."""

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
from torch import nn
from torch.optim import Optimizer

from recipes.methods.bottleneck import block_layout
from recipes.methods.peft_layers import insert_peft_layers, whole_projections
from recipes.methods.projections import find_projections

__all__ = ["KEY_NAMES", "UndecayedFactors", "add_ia3", "exempt_from_decay"]

# Names of the key projections, by the names of the query projections.
KEY_NAMES = {"query": "key", "q_proj": "k_proj", "q": "k", "query_proj": "key_proj", "q_lin": "k_lin"}


def add_ia3(module: nn.Module) -> list[pl.Callback]:
    """Insert factors on the keys, the values and the hidden units of the feed-forward network."""
    from peft import IA3Config

    targets = whole_projections(module, None)
    blocks = find_projections(module).blocks
    hidden = [f"{block}.{block_layout(module.get_submodule(block)).feed_forward_out}" for block in blocks]
    factors = []
    for name in targets:
        prefix, _, child = name.rpartition(".")
        factors.append(f"{prefix}.{KEY_NAMES[child]}" if child in KEY_NAMES else name)
    insert_peft_layers(module, IA3Config(target_modules=factors + hidden, feedforward_modules=hidden), targets)
    return [UndecayedFactors()]


class UndecayedFactors(pl.Callback):
    """Exempts the factors from weight decay, which would pull them from 1, their initial value, to 0."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Regroup the parameters of the optimizers, before a checkpoint restores the states of the optimizers."""
        order = list(pl_module.parameters())
        factors = [p for name, p in pl_module.named_parameters() if "ia3_l" in name and p.requires_grad]
        for optimizer in trainer.optimizers:
            exempt_from_decay(optimizer, factors, order)


def exempt_from_decay(optimizer: Optimizer, exempt: Iterable[nn.Parameter], order: Iterable[nn.Parameter]) -> None:
    """Move parameters to a group of the optimizer with the same settings but without weight decay.

    The number of groups does not change, because learning rate schedulers have one value per group.

    Args:
        optimizer: The optimizer; parameters that it does not contain are ignored.
        exempt: The parameters to move.
        order: All parameters of the model; each group keeps this order.

    Raises:
        ValueError: The optimizer has no group to move them to.
    """
    exempt_ids = {id(p) for p in exempt}
    position = {id(p): i for i, p in enumerate(order)}
    for group in optimizer.param_groups:
        moved = [p for p in group["params"] if id(p) in exempt_ids]
        if not moved or not group.get("weight_decay"):
            continue
        if len(moved) == len(group["params"]):
            group["weight_decay"] = 0.0
            continue
        undecayed = [g for g in optimizer.param_groups if g["weight_decay"] == 0 and _settings(g) == _settings(group)]
        if not undecayed:
            raise ValueError(
                "Expected the optimizer to have a parameter group without weight decay and otherwise the same settings "
                "but it has none; add one in configure_optimizers()."
            )
        group["params"][:] = [p for p in group["params"] if id(p) not in exempt_ids]
        undecayed[0]["params"].extend(moved)
        undecayed[0]["params"].sort(key=lambda p: position[id(p)])


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "weight_decay")}
