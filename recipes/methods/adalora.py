"""AdaLoRA (arXiv 2303.10512): the layers of the peft library, and a callback with the penalty and the allocator."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lalora_lightning.adapters import find_head
from recipes.methods.peft_layers import train_head, whole_projections

__all__ = ["AdaLoraCallback", "add_adalora", "orthogonality_penalty"]


def add_adalora(
    module: nn.Module,
    rank: int = 8,
    init_rank: int = 12,
    alpha: float = 16.0,
    dropout: float = 0.0,
    target_modules: Sequence[str] | str | None = None,
    initial: float = 0.15,
    final: float = 0.5,
    interval: int = 1,
    orthogonality: float = 0.1,
) -> list[pl.Callback]:
    """Insert layers with singular triplets; the returned callback prunes the less important ones.

    Args:
        module: The module to adapt.
        rank: Mean rank of the projections after training.
        init_rank: Initial rank of every projection, larger than ``rank``.
        alpha: The adapters are scaled by ``alpha / init_rank``.
        dropout: Dropout on the adapters' input.
        target_modules: Names or a regular expression; by default query and value.
        initial: Fraction of the run before pruning begins. Like ``final``, close to the paper's settings for GLUE.
        final: Fraction of the run at its end, during which the ranks are fixed.
        interval: Optimizer steps between prunings.
        orthogonality: Weight of the penalty; the paper uses 0.1 to 0.5.

    Raises:
        ValueError: init_rank is not larger than rank, or initial and final leave no time for pruning.
    """
    from peft import AdaLoraConfig
    from peft.tuners.adalora import AdaLoraModel

    if init_rank <= rank:
        raise ValueError(f"Expected init_rank to be above the final rank of {rank} but got {init_rank}.")
    if not 0 <= initial < 1 - final <= 1:
        raise ValueError(
            "Expected initial and final to be fractions of the run that leave time to prune between them but got "
            f"{initial} and {final}."
        )
    targets = whole_projections(module, target_modules)
    head = find_head(module, targets)
    config = AdaLoraConfig(
        init_r=init_rank,
        target_r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=targets,
        deltaT=interval,
        orth_reg_weight=orthogonality,
        # The callback sets the length of the run when training starts.
        total_step=1,
    )
    tuner = AdaLoraModel(module, config, "default")
    train_head(module, head)
    return [AdaLoraCallback(tuner, initial, final)]


class AdaLoraCallback(pl.Callback):
    """AdaLoRA's part of the training loop: the orthogonality penalty and the rank allocator.

    The penalty is that of peft's ``AdaLoraModel``: the mean over all matrices P and Q of ``|P P^T - I|_F``, times its
    weight. Its gradient is added before each optimizer step, so it also applies to models that do not return their
    loss. The allocator runs after every optimizer step, while the gradients that it reads still exist.

    Args:
        tuner: peft's ``AdaLoraModel``.
        initial: Fraction of the run before pruning begins.
        final: Fraction of the run at its end, during which the ranks are fixed.
    """

    # State of peft's allocator: the importance of entries, and moving averages of it and of its uncertainty.
    _AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")

    def __init__(self, tuner: Any, initial: float, final: float) -> None:
        self.tuner = tuner
        self.initial = initial
        self.final = final
        self._last_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the schedule for the length of the run, and move restored averages to the device."""
        steps = int(trainer.estimated_stepping_batches)
        config = self.tuner.peft_config["default"]
        config.total_step = steps
        config.tinit, config.tfinal = int(self.initial * steps), int(self.final * steps)
        self._last_step = trainer.global_step
        allocator = self.tuner.rankallocator
        for name in self._AVERAGES:
            averages = getattr(allocator, name)
            setattr(allocator, name, {key: value.to(pl_module.device) for key, value in averages.items()})

    def state_dict(self) -> dict[str, Any]:
        """Return the part of the allocator's state that is not in the model's parameters."""
        averages = {name: dict(getattr(self.tuner.rankallocator, name)) for name in self._AVERAGES}
        return {"rank_pattern": self.tuner.peft_config["default"].rank_pattern, "averages": averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the allocator's state."""
        self.tuner.peft_config["default"].rank_pattern = state_dict["rank_pattern"]
        for name, averages in state_dict["averages"].items():
            setattr(self.tuner.rankallocator, name, averages)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Add the gradient of the penalty."""
        weight = self.tuner.peft_config["default"].orth_reg_weight
        (weight * orthogonality_penalty(dict(pl_module.named_parameters()))).backward()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Allocate the ranks after an optimizer step."""
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self.tuner.update_and_allocate(trainer.global_step)


def orthogonality_penalty(parameters: Mapping[str, Tensor]) -> Tensor:
    """Return the mean of ``|A A^T - I|_F`` and ``|B^T B - I|_F`` over all ``lora_A`` (r x d) and ``lora_B`` (m x r)."""
    grams = [p @ p.T for name, p in parameters.items() if "lora_A" in name]
    grams += [p.T @ p for name, p in parameters.items() if "lora_B" in name]
    return torch.stack([torch.linalg.norm(gram - torch.eye(len(gram)).to(gram)) for gram in grams]).mean()
