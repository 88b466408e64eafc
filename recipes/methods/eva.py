"""EVA (arXiv 2410.07170): LoRA initialized with, and ranks distributed by, the directions of the layers' inputs."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from recipes.methods.peft_layers import insert_peft_layers, whole_projections

__all__ = ["EvaCallback", "add_eva"]


def add_eva(
    module: nn.Module,
    rank: int = 8,
    alpha: float = 1.0,
    dropout: float = 0.0,
    target_modules: Sequence[str] | str | None = None,
    rho: float = 2.0,
    whiten: bool = False,
) -> list[pl.Callback]:
    """Return the callback that inserts the layers at the start of training, since they depend on the training data.

    Args:
        module: The module to adapt.
        rank: Mean rank of the projections.
        alpha: All adapters are scaled by ``alpha / rank``, whatever their own rank is. The directions have norm 1 and
            follow the inputs, so their outputs are large. PEFT's example of EVA uses an alpha of 1, at rank 16.
        dropout: Dropout on the adapters' input.
        target_modules: Names or a regular expression; by default query and value.
        rho: The rank of a projection is at most ``rho * rank``; with 1, all ranks are equal.
        whiten: Divide each direction by the square root of its singular value.
    """
    targets = whole_projections(module, target_modules)
    return [EvaCallback(targets, rank, alpha, dropout, rho, whiten)]


class EvaCallback(pl.Callback):
    """Decomposes the inputs of the projections with peft and inserts peft's layers, before the optimizer is created.

    The ranks follow the explained variance of the directions. A projection may get none, and then stays as it is. The
    order of the training batches does not change.

    Args:
        targets: Names of the linear modules to adapt.
        rank: Mean rank of the projections.
        alpha: All adapters are scaled by ``alpha / rank``.
        dropout: Dropout on the adapters' input.
        rho: The rank of a projection is at most ``rho * rank``.
        whiten: Divide each direction by the square root of its singular value.
    """

    def __init__(
        self, targets: Sequence[str], rank: int, alpha: float, dropout: float, rho: float, whiten: bool
    ) -> None:
        self.targets = targets
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.rho = rho
        self.whiten = whiten
        self._is_done = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Insert the layers when a module is fitted for the first time."""
        if stage != "fit" or self._is_done:
            return
        from peft import LoraConfig, get_eva_state_dict
        from peft.tuners.lora import EvaConfig

        trainer.fit_loop.setup_data()
        pl_module.to(trainer.strategy.root_device)
        config = LoraConfig(
            r=self.rank,
            init_lora_weights="eva",
            eva_config=EvaConfig(rho=self.rho, whiten=self.whiten),
            target_modules=list(self.targets),
        )
        with _same_order_again(trainer.train_dataloader) as batches:
            directions = get_eva_state_dict(
                pl_module,
                batches,
                config,
                forward_fn=lambda module, batch: module.loss(batch),
                prepare_model_inputs_fn=_attention_mask,
                prepare_layer_inputs_fn=functools.partial(_tokens, set(), round(self.rho * self.rank)),
                show_progress_bar=False,
            )
        directions = {name: rows for name, rows in directions.items() if len(rows)}
        adapted = LoraConfig(
            r=self.rank,
            rank_pattern={name: len(rows) for name, rows in directions.items()},
            alpha_pattern={name: self.alpha / self.rank * len(rows) for name, rows in directions.items()},
            lora_dropout=self.dropout,
            target_modules=list(directions),
        )
        insert_peft_layers(pl_module, adapted, list(directions))
        with torch.no_grad():
            for name, rows in directions.items():
                pl_module.get_parameter(f"{name}.lora_A.default.weight").copy_(rows)
        self._is_done = True


@contextmanager
def _same_order_again(loader: Any) -> Iterator[Any]:
    """Let the batches be read without a change of their order in the run."""
    generator = loader.generator
    state = None if generator is None else generator.get_state()
    with isolate_rng():
        yield loader
    if generator is not None and state is not None:
        generator.set_state(state)


def _attention_mask(batch: Any, config: Any) -> Tensor | None:
    """Return the mask ``(N, S)`` of the tokens that are no padding; None for images."""
    return batch["attention_mask"].bool() if isinstance(batch, Mapping) else None


def _tokens(checked: set[str], components: int, layer_input: Any, mask: Tensor | None, name: str) -> Tensor:
    """Return the inputs of a projection as rows, ``(tokens, d)``, without padding.

    Args:
        checked: Names of the projections whose first rows were enough, to which this name is added.
        components: Number of directions.
        layer_input: The projection's input.
        mask: ``(N, S)``, of the tokens that are no padding; None for images.
        name: The name of the projection.

    Raises:
        ValueError: The first batch has too few rows; peft would pass over such batches, and never end.
    """
    inputs = layer_input[0] if isinstance(layer_input, tuple) else layer_input
    rows = inputs[mask] if mask is not None and inputs.shape[:-1] == mask.shape else inputs.flatten(0, -2)
    if name not in checked and min(rows.shape) < components:
        raise ValueError(
            f"Expected batches with at least {components} tokens and features at {name}, the number of directions that "
            f"EVA computes, but got {tuple(rows.shape)}; raise the batch size, or lower `rank` or rho."
        )
    checked.add(name)
    # The input of a pooler is a strided view, and peft requires contiguous rows.
    return rows.contiguous()
