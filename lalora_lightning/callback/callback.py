"""LaLoraCallback: runs the rank allocator during training, logs the ranks and saves its state in checkpoints."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lalora_lightning import log_keys
from lalora_lightning.adapters import (
    AdapterSettings,
    add_lora,
    find_targets,
    linear_layers_seen,
    lora_layers,
    named_modules,
    summarize,
)
from lalora_lightning.allocator import (
    AllocationSettings,
    Contribution,
    ContributionScale,
    Growth,
    RankAllocator,
    RankHistory,
    Reading,
    broadcast_masks,
    leave_masks_out_of_broadcasts,
)
from lalora_lightning.callback import compatibility
from lalora_lightning.callback.checkpoint_hooks import AdapterCheckpoints
from lalora_lightning.callback.checks import LearningChecks
from lalora_lightning.callback.condensing import CondensingSchedule, steps_of
from lalora_lightning.callback.loggers import RunLog, costs
from lalora_lightning.callback.precision import keep_adapters_in_float32, warn_about_half_precision
from lalora_lightning.callback.pruning import leave_adapters_unpruned, require_unpruned_adapters
from lalora_lightning.callback.state import random_state, require_callback_state, set_random_state
from lalora_lightning.initialization import Init
from lalora_lightning.layers import TruncatedLoRALinear
from lalora_lightning.memory import reset_peak_memory
from lalora_lightning.names import GroupBy, blocks_by_kind
from lalora_lightning.report.console import rank_report
from lalora_lightning.sparsity import layer_sparsity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LaLoraCallback"]


class LaLoraCallback(AdapterCheckpoints):
    """Layer-wise adaptive low-rank fine-tuning of any LightningModule: ``Trainer(callbacks=[LaLoraCallback()])``.

    La-LoRA (Gu et al., Neural Networks 194, 2025, 108095). At ``setup``, the callback adds low-rank adapters to the
    query and value projections, freezes the backbone and keeps the task head trainable. A module that is already
    adapted with :func:`lalora_lightning.add_lora` is not changed. After every optimizer step, a :class:`RankAllocator`
    updates the rank of every layer.

    At the Trainer's logging steps, ``rank/<layer>``, ``rank/total`` and ``rank/budget`` are logged to all its loggers,
    and the total rank to the progress bar. Values are copied from the device at these steps only. The settings are
    logged as hyperparameters ``lalora/...``. After training, ``fit/seconds`` and ``fit/peak_memory_mib`` are logged,
    and a table of the ranks is printed unless the Trainer has ``enable_model_summary=False``. TensorBoard loggers also
    get charts of all layers (custom scalars) and a figure of the trajectories.

    A LightningModule that builds its model in ``setup`` or ``configure_model`` has to call ``add_lora`` in that method.
    With manual optimization, the ranks are updated once for each batch in which an optimizer stepped. Callbacks that
    average weights have to come after this one.

    Args:
        rank: Maximum rank of a projection.
        alpha: The adapters are scaled by ``alpha / rank``.
        dropout: Dropout on the adapters' input.
        target_modules: Names or a regular expression, see :func:`lalora_lightning.add_lora`; by default query and
            value.
        modules_to_save: Names of the modules trained in full; by default the task head.
        gamma: How strongly growth of the adapters increases the budget. With 8 the budget is full when they have grown
            by a factor of ``rank ** (1 / 8)``. :class:`lalora_lightning.allocator.AllocationSettings` explains the
            arguments from here to ``freeze_after``.
        contribution: Measure of a layer's contribution: "norm", or "fisher" (averaged squared gradients).
        contribution_scale: "relative", or "absolute" as in the published equations, where one layer tends to take the
            whole budget.
        temperature: Values above 1 make the layers' shares more equal, values below 1 less equal.
        growth: "matched", or "stored" as in the published equations, where the budget can oscillate.
        gradual_budget: With False, the whole budget is available from the first step.
        fidelity: With False, contributions do not contain the fidelities.
        average_rank: The maximum of the budget, in ranks per layer; by default the maximum rank.
        group_by: Projections that share a rank: "block", "parent" (an attention module), "module", "kind" (of one name
            in all blocks), or a function from the name of a projection to the name of its layer.
        min_rank: Minimum rank of a layer: 1, or 0 to let a layer end with nothing.
        interval: Optimizer steps between rank updates.
        freeze_after: Number of optimizer steps (an integer) or fraction of the run (a float in [0, 1]) after which the
            ranks stay fixed.
        save_adapter_only: Keep the frozen backbone out of the Trainer's checkpoints. Checkpoints of a model with 4-bit
            layers never contain it.
        log_sparsity: Also log ``sparsity/<layer>`` (Eq. 1). This computes the increment of every weight at each logging
            step.
        init: Initialization of the adapters, see :func:`lalora_lightning.add_lora`.
        use_rslora: Scale by ``alpha / sqrt(rank)``.
        freeze_A: Train ``lora_B`` only (LoRA-FA).
        condense_to: Condense the adapters once in the run, to as many parameters as LoRA with this average rank, and
            keep their ranks from then on; see :func:`lalora_lightning.condense_lora`.
        condense_at: Number of optimizer steps (an integer) or fraction of the run (a float in (0, 1]) after which to
            condense.
        fixed_ranks: True trains every layer at the maximum rank (LoRA). A dict such as ``{"layer.3": 2}`` sets other
            fixed ranks, see ``rank_pattern`` of :func:`lalora_lightning.add_lora`. Fixed ranks are neither updated nor
            logged, unless they are condensed.

    Attributes:
        adapter_settings: The arguments for :func:`lalora_lightning.add_lora`.
        allocation_settings: The arguments for the :class:`RankAllocator`.
        allocator: The :class:`RankAllocator`; None before fit, or with fixed ranks.
        history: ``(step, ranks, budget)`` of the optimizer steps until the last logging step. In long runs, steps that
            changed no rank are left out.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        target_modules: Sequence[str] | str | None = None,
        modules_to_save: Sequence[str] | None = None,
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
        freeze_after: int | float | None = None,
        save_adapter_only: bool = False,
        log_sparsity: bool = False,
        init: Init = "kaiming",
        use_rslora: bool = False,
        freeze_A: bool = False,
        fixed_ranks: bool | Mapping[str, int] = False,
        min_rank: int = 1,
        condense_to: float | None = None,
        condense_at: int | float = 0.7,
    ) -> None:
        super().__init__(save_adapter_only)
        self.adapter_settings = AdapterSettings(
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            target_modules=target_modules,
            modules_to_save=modules_to_save,
            rank_pattern=fixed_ranks if isinstance(fixed_ranks, Mapping) else None,
            init=init,
            use_rslora=use_rslora,
            freeze_A=freeze_A,
        )
        self.allocation_settings = AllocationSettings(
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
        if isinstance(freeze_after, float) and freeze_after > 1:
            raise ValueError(
                f"Expected freeze_after to be a number of steps (an integer) or a fraction in [0, 1] but got "
                f"{freeze_after}."
            )
        self.condensing = CondensingSchedule(condense_to, condense_at, min_rank)
        if condense_to is not None and isinstance(fixed_ranks, Mapping):
            raise ValueError(
                "Expected projections of one maximum rank with condense_to but fixed_ranks sets others; use "
                "fixed_ranks=True."
            )
        self.log_sparsity = log_sparsity
        self.fixed_ranks = fixed_ranks

        self.allocator: RankAllocator | None = None
        self._module: pl.LightningModule | None = None
        # The layers that this callback inserted, to which its settings apply.
        self._inserted: list[TruncatedLoRALinear] = []
        self._started = 0.0
        # The last step of the Trainer after which ranks were updated; None before a run.
        self._last_step: int | None = None
        # The allocator's steps before the current Trainer's first one.
        self._earlier_steps = 0
        self._history = RankHistory()
        # The state that was loaded before the allocator was built.
        self._restored: dict[str, Any] | None = None
        self._random: dict[str, Tensor] | None = None
        self._checks = LearningChecks()
        self._log = RunLog()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Insert the adapters, before optimizers are built and weights are restored."""
        if self._module is not None and self._module is not pl_module:
            self._forget()
        if self._module is not pl_module and isinstance(self.fixed_ranks, Mapping) and lora_layers(pl_module):
            raise ValueError(
                "Expected a module without LoRA layers for the ranks in fixed_ranks but it has some; pass the ranks to "
                "add_lora as rank_pattern, and set fixed_ranks=True."
            )
        self._module = pl_module
        if not lora_layers(pl_module) and not self._is_built_later(pl_module):
            compatibility.require_training_in_this_process(trainer)
            compatibility.require_averaging_after(trainer, self)
            add_lora(pl_module, **vars(self.adapter_settings))
            self._inserted = list(lora_layers(pl_module).values())
            rank_zero_info(f"La-LoRA: {summarize(pl_module, self.allocation_settings.group_by)}")
        leave_masks_out_of_broadcasts(pl_module)
        self.attach_hooks(trainer, pl_module)
        keep_adapters_in_float32(trainer)
        if stage == "fit":
            compatibility.require_compatible_averages(
                compatibility.callbacks_of(trainer), self.save_adapter_only, self.condensing.average_rank is not None
            )
            leave_adapters_unpruned(compatibility.callbacks_of(trainer), self.save_adapter_only)
            self._log.prepare(trainer)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the adapters, build the allocator, and restore the callback's state and torch's random state."""
        layers = lora_layers(pl_module)
        if not layers:
            raise RuntimeError(
                "Expected the LightningModule to have LoRA layers when fit starts but it has none. A module that "
                "builds its model in setup() or configure_model() has to call add_lora(self) at the end of it, with "
                f"target_modules if the projections have unusual names. {linear_layers_seen(named_modules(pl_module))}"
            )
        require_unpruned_adapters(compatibility.callbacks_of(trainer), pl_module)
        self._checks.start_fit(trainer, pl_module)
        warn_about_half_precision(pl_module)
        # Not before: a module that builds its model in configure_model() has its layers only now.
        inserted = set(layers.values()) <= set(self._inserted)
        logged = {
            **(vars(self.adapter_settings) if inserted else {}),
            **vars(self.allocation_settings),
            "save_adapter_only": self.save_adapter_only,
            "log_sparsity": self.log_sparsity,
            "fixed_ranks": self.fixed_ranks,
            "condense_to": self.condensing.average_rank,
            "condense_at": self.condensing.at,
        }
        self._log.settings(trainer, pl_module, logged)
        if self.allocator is not None and not self.allocator.drives(pl_module):
            self._forget()
        new_run = trainer.ckpt_path is None and self._restored is None
        at_maximum = self.fixed_ranks is not False and trainer.ckpt_path is None and not self._is_condensed
        raised = [n for n, layer in layers.items() if at_maximum and layer.rank < layer.max_rank and layer.is_trained()]
        if raised:
            rank_zero_warn(
                f"La-LoRA: adapters that were trained at lower ranks ({raised[0]} the first) are raised to the maximum "
                "rank; call trim_lora(module) before fit to keep their ranks."
            )
        if self.allocator is None and (self.fixed_ranks is False or self.condensing.average_rank is not None):
            trained_before = self.fixed_ranks is False and new_run
            if trained_before and any(layer.is_trained() for layer in layers.values()):
                rank_zero_warn(
                    "La-LoRA: the adapters have been trained already, and their ranks are reset; resume with "
                    "fit(ckpt_path=...) to continue with the ranks of a run, or call trim_lora(module) and set "
                    "fixed_ranks=True to keep them."
                )
            # The length of the run is not asked for yet: Lightning would shuffle the rows of the first epoch.
            settings = dataclasses.replace(self.allocation_settings, freeze_after=None)
            allocator = RankAllocator(pl_module, **vars(settings))
            if self.condensing.average_rank is not None:
                allocator.require_condensable(self.condensing.average_rank)
            self.allocator = allocator
        if at_maximum:
            for layer in layers.values():
                layer.set_rank(layer.max_rank)
        if self._restored is not None:
            self._restore(self._restored)
        if trainer.ckpt_path is None:
            # A state that was restored belongs to a call of trainer.test.
            self._last_step = self._random = None
        if self._random is not None and trainer.world_size == 1:
            # This is the last hook before Lightning shuffles the rows of the first epoch. With several processes, all
            # of them would get the state of the first one.
            set_random_state(self._random)
        self._random = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make up for a missed rank update, and record the initial ranks."""
        self._checks.start_training(trainer, pl_module)
        resumed = trainer.ckpt_path is not None and trainer.global_step > 0
        if self.allocator is not None and self._last_step is None and resumed:
            raise ValueError(
                f"Expected {trainer.ckpt_path} to be of a run with LaLoraCallback but it has none of its state; resume "
                "from another checkpoint, or call load_lora_state_dict(module, path) and fit without ckpt_path."
            )
        if self.allocator is not None:
            if trainer.world_size > 1:
                broadcast_masks(lora_layers(pl_module).values())
            # A new Trainer counts its steps from zero.
            if trainer.global_step == 0:
                self._earlier_steps = self.allocator.steps
            self.allocator.settings = self._settings_for(trainer)
            self.condensing.start(trainer, self._earlier_steps)
        is_behind = self._last_step is not None and self._last_step < trainer.global_step
        if self.allocator is not None and is_behind:
            # The checkpoint was saved after an optimizer step but before the rank update.
            kept = self._update_ranks(trainer, self.allocator)
            if kept:
                self._log_readings(trainer, pl_module, kept)
        self._last_step = trainer.global_step
        self._started = time.monotonic()
        reset_peak_memory(pl_module.device)
        if self.allocator is not None:
            if trainer.ckpt_path is None:
                self._history.drop_unlogged()
            if not is_behind:
                # Ranks that were set since the allocator was built count.
                self.allocator.follow_model()
                # For the history only: as with the module's own metrics, logs begin after the first step.
                self._history.note(trainer.global_step, None, self.allocator)
            self._read()
            self._log.layout(trainer)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Pass the gradients to the allocator before they are clipped; in the first steps, check that they exist."""
        self._checks.before_optimizer_step()
        if self.allocator is not None:
            self.allocator.observe_gradients()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the ranks if an optimizer stepped in this batch, and log them at logging steps.

        This hook also runs while gradients accumulate and if ``training_step`` returned None.
        """
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        if self.allocator is None:
            return
        kept = self._update_ranks(trainer, self.allocator)
        if kept or compatibility.is_logging_step(trainer):
            metrics = self._log_readings(trainer, pl_module, kept)
            # A CPU tensor, so that the progress bar does not synchronize with the device at every refresh.
            total = torch.tensor(metrics[log_keys.RANK_TOTAL], dtype=torch.float32)
            pl_module.log(log_keys.RANK_TOTAL, total, prog_bar=True, logger=False, on_step=True)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log time, memory and final ranks, draw the trajectories and print the rank report."""
        metrics = costs(pl_module, time.monotonic() - self._started)
        if self._history.is_logged():
            self._log.metrics(trainer, metrics, compatibility.completed_steps(trainer) - 1)
        else:
            self._log_readings(trainer, pl_module, metrics)
        self.condensing.end(trainer, self.allocator)
        if self.allocator is None:
            return
        # On all processes, which gather sharded adapters together.
        report = rank_report(self.allocator, pl_module) if compatibility.has_model_summary(trainer) else None
        if trainer.is_global_zero:
            self._log.results(trainer, self._figures())
            if report is not None:
                print(report)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore what was changed in the module for the run."""
        super().teardown(trainer, pl_module, stage)
        self._checks.end()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore what was changed in the module for the run."""
        self._checks.end()

    def plot(self) -> "Figure":
        """Draw the rank trajectories so far, see :func:`lalora_lightning.plotting.plot_rank_trajectories`.

        Returns:
            A matplotlib Figure.

        Raises:
            RuntimeError: Fit has not started, or the ranks are fixed.
        """
        from lalora_lightning.plotting import plot_rank_trajectories

        if self.allocator is None:
            raise RuntimeError("Expected a run to plot but fit has not started, or its ranks are fixed.")
        return plot_rank_trajectories(self._history.run(self.allocator))

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the allocator's state, the history, the last step and torch's random state."""
        if not self._has_state:
            return self._restored or {}
        if self.allocator is not None:
            self._read()
        return {
            "allocator": None if self.allocator is None else self.allocator.state_dict(),
            "last_step": self._last_step,
            "earlier_steps": self._earlier_steps,
            **self._history.state_dict(),
            "random": random_state(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state, now or when fit has built the allocator.

        Raises:
            ValueError: The state is not one of this callback, or it comes from a run with other layers or settings.
        """
        if self._has_state:
            self._restore(state_dict)
        else:
            # Lightning also calls this with an empty state.
            self._restored = None if isinstance(state_dict, Mapping) and not state_dict else state_dict

    @property
    def history(self) -> list[Reading]:
        """``(step, ranks, budget)`` of the optimizer steps so far."""
        return self._history.readings

    @property
    def _has_state(self) -> bool:
        """Whether fit has begun."""
        return self.allocator is not None or self._last_step is not None

    def _forget(self) -> None:
        """Reset everything that belongs to a run with other layers."""
        self.allocator, self._history = None, RankHistory()
        self._last_step = self._restored = self._random = None
        self._earlier_steps = 0

    def _is_built_later(self, pl_module: pl.LightningModule) -> bool:
        """Return whether the module may build its model after ``setup`` of the callback, and adapt it itself."""
        try:
            find_targets(named_modules(pl_module), self.adapter_settings.target_modules)
        except ValueError:
            return compatibility.may_build_later(pl_module)
        return False

    def _restore(self, state_dict: dict[str, Any]) -> None:
        require_callback_state(state_dict)
        if (state_dict["allocator"] is None) != (self.allocator is None):
            kinds = ("adaptive", "fixed") if self.allocator is not None else ("fixed", "adaptive")
            raise ValueError(
                f"Expected the state of a run with {kinds[0]} ranks but got one with {kinds[1]} ranks; set fixed_ranks "
                "as in that run."
            )
        if self.allocator is not None:
            self.allocator.load_state_dict(state_dict["allocator"])
        self._history.load_state_dict(state_dict, 0 if self.allocator is None else int(self.allocator.skipped))
        self._restored = None
        self._last_step = state_dict["last_step"]
        # States of version 0.1.0 do not have it.
        self._earlier_steps = state_dict.get("earlier_steps", 0)
        self._random = state_dict["random"]

    def _settings_for(self, trainer: pl.Trainer) -> AllocationSettings:
        """Return the allocator's settings, with ``freeze_after`` as a number of all its steps."""
        settings = self.allocation_settings
        if self.fixed_ranks is not False:
            return dataclasses.replace(settings, freeze_after=0)
        if not isinstance(settings.freeze_after, float):
            return settings
        steps = steps_of(trainer, settings.freeze_after, "freeze_after")
        return dataclasses.replace(settings, freeze_after=self._earlier_steps + steps)

    def _figures(self) -> "dict[str, Callable[[], Figure]]":
        """Return the functions that draw the figures for loggers, by the keys of the figures."""
        from lalora_lightning.plotting import plot_rank_map

        assert self.allocator is not None
        figures: dict[str, Callable[[], Figure]] = {log_keys.RANK_TRAJECTORIES: self.plot}
        run = self._history.run(self.allocator)
        if blocks_by_kind(run.layer_names) is not None:
            figures[log_keys.RANK_MAP] = lambda: plot_rank_map(run.layer_names, run.ranks[-1], title="final ranks")
        return figures

    @property
    def _is_condensed(self) -> bool:
        return self.allocator is not None and self.allocator.condensed

    def _update_ranks(self, trainer: pl.Trainer, allocator: RankAllocator) -> dict[str, float]:
        """Update the ranks after an optimizer step, condense if it is time to, and note the ranks of the step.

        Returns:
            Metrics to log with these ranks now, since some loggers refuse a step before their last one.
        """
        allocator.step()
        condensation = self.condensing.after_step(trainer, allocator)
        self._history.note(trainer.global_step, compatibility.completed_steps(trainer), allocator)
        return {} if condensation is None else {log_keys.ENERGY_KEPT: condensation.total_energy}

    def _read(self) -> None:
        """Read ranks and budgets from the device, and warn about skipped steps."""
        assert self.allocator is not None
        skipped = self._history.read(self.allocator)
        if skipped > 0:
            rank_zero_warn(
                f"La-LoRA: {skipped} optimizer steps since the last report left weights that are NaN or Inf; ranks and "
                "budget did not change. Lower the learning rate or clip gradients."
            )

    def _log_readings(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, others: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """Log the ranks of the steps that changed them, and those of the last step together with other metrics.

        Returns:
            The metrics of the last step.
        """
        assert self.allocator is not None
        names, costs = self.allocator.layer_names, self.allocator.parameters_per_rank
        self._read()
        *earlier, (last_step, (_, ranks, budget)) = self._history.take_unlogged().items()
        for logged_step, (_, earlier_ranks, earlier_budget) in earlier:
            self._log.metrics(trainer, log_keys.rank_metrics(names, earlier_ranks, earlier_budget, costs), logged_step)
        metrics = log_keys.rank_metrics(names, ranks, budget, costs) | dict(others or {})
        if self.log_sparsity:
            sparsity = layer_sparsity(pl_module, self.allocation_settings.group_by).tolist()
            metrics |= {log_keys.sparsity_key(name): share for name, share in zip(names, sparsity, strict=True)}
        self._log.metrics(trainer, metrics, last_step)
        return metrics
