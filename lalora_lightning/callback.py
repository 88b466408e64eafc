"""LaLoraCallback: says when the rank allocator acts, logs its ranks and keeps its state in checkpoints."""

import inspect
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelSummary, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lalora_lightning.adapters import (
    GroupBy,
    add_lora,
    find_targets,
    linear_layers_seen,
    lora_layers,
    named_modules,
    require_unmerged,
    summarize,
)
from lalora_lightning.allocator import Contribution, ContributionScale, Growth, RankAllocator, check_settings
from lalora_lightning.initialization import Init
from lalora_lightning.layers import TruncatedLoRALinear, whole
from lalora_lightning.rank_report import print_rank_report
from lalora_lightning.run_logging import costs, log_layout, log_results, log_settings
from lalora_lightning.sparsity import layer_sparsity
from lalora_lightning.trainer_checkpoint import attach_checkpoint_hooks, random_state, set_random_state

# Readings kept for the picture; beyond that every second one is dropped, so that a long run's memory stays flat.
_MOST_READINGS = 2000


class LaLoraCallback(pl.Callback):
    """Layer-wise adaptive low-rank fine-tuning of any LightningModule: ``Trainer(callbacks=[LaLoraCallback()])``.

    La-LoRA (Gu et al., Neural Networks 194, 2025, 108095). At ``setup`` the query and value projections get low-rank
    adapters, the backbone is frozen and the task head stays trainable, unless the module was adapted with
    :func:`lalora_lightning.add_lora` before. After every optimizer step, never after a batch alone, a
    :class:`RankAllocator` decides the rank of every layer.

    At the Trainer's logging steps the keys ``rank/<layer>``, ``rank/total`` and ``rank/budget`` go to all its loggers,
    and the total to the progress bar. Only then are numbers asked from the device. The settings go to the loggers as
    hyperparameters ``lalora/...``, and after fit ``fit/seconds`` and ``fit/peak_memory_mib``. A TensorBoard logger also
    gets charts of all layers at once (custom scalars) and a picture of the trajectories. A table of the ranks is
    printed after fit, unless the Trainer has ``enable_model_summary=False``.

    A LightningModule that builds its model in ``setup`` or ``configure_model`` calls ``add_lora`` itself, there. Under
    manual optimization the allocator acts once for each batch that stepped an optimizer. Weight averaging callbacks
    come after this one and with ``use_buffers=False``: ranks have no average.

    Args:
        rank: Maximum rank of a projection. The arguments from ``gamma`` on are explained at :class:`RankAllocator`.
        alpha: The adapters are scaled by ``alpha / rank``.
        dropout: Dropout on the adapters' input.
        target_modules: Names or a regular expression, see :func:`add_lora`; by default query and value.
        modules_to_save: Names of the modules trained in full; by default the task head.
        gamma: How strongly growth of the adapters grows the budget; 8 fills it when they have grown by rank ** (1 / 8).
        contribution: What a layer's share follows: "norm" or "fisher" (averaged squared gradients).
        contribution_scale: "relative" or "absolute" (the paper's letter, where one layer takes everything).
        temperature: Above 1 makes the layers' shares more equal, below 1 less.
        growth: "matched" or "stored" (the paper's letter, where the budget can oscillate).
        gradual_budget: False gives the whole budget from the start.
        fidelity: False leaves out the share of the norm that truncation keeps.
        average_rank: The budget ends at this many ranks a layer; by default at the maximum rank.
        group_by: Projections that share a rank: "block", "parent" (an attention), "module", or a function from a
            projection's name to its layer's.
        interval: Optimizer steps between decisions.
        freeze_after: Optimizer steps (an integer) or a fraction of the run (a float in [0, 1]) after which the ranks
            stay as they are.
        save_adapter_only: Keep the frozen backbone out of the Trainer's checkpoints; one with 4-bit layers always is.
        log_sparsity: Log ``sparsity/<layer>`` (Eq. 1), too; multiplies out every increment at every logging step.
        init: How the adapters start, see :func:`add_lora`.
        use_rslora: Scale by ``alpha / sqrt(rank)``.
        freeze_A: Train ``lora_B`` only (LoRA-FA).
        random_rank: While training, draw a rank up to the one in force at every forward pass (DyLoRA).
        fixed_ranks: True trains every layer at the maximum rank (LoRA), a pattern such as ``{"layer.3": 2}`` at ranks
            of its own, see ``rank_pattern`` of :func:`add_lora`; no ranks are decided or logged then.

    Attributes:
        allocator: The :class:`RankAllocator`, from the start of fit on.
        history: ``(step, ranks, budget)`` at each logging step.

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
        random_rank: bool = False,
        fixed_ranks: bool | Mapping[str, int] = False,
    ) -> None:
        check_settings(gamma, contribution, contribution_scale, temperature, growth, interval, freeze_after)
        if isinstance(freeze_after, float) and freeze_after > 1:
            raise ValueError(
                f"Expected freeze_after to be a number of steps (an integer) or a fraction in [0, 1] but got "
                f"{freeze_after}."
            )
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.target_modules = target_modules
        self.modules_to_save = modules_to_save
        self.gamma = gamma
        self.contribution = contribution
        self.contribution_scale = contribution_scale
        self.temperature = temperature
        self.growth = growth
        self.gradual_budget = gradual_budget
        self.fidelity = fidelity
        self.average_rank = average_rank
        self.group_by = group_by
        self.interval = interval
        self.freeze_after = freeze_after
        self.save_adapter_only = save_adapter_only
        self.log_sparsity = log_sparsity
        self.init = init
        self.use_rslora = use_rslora
        self.freeze_A = freeze_A
        self.random_rank = random_rank
        self.fixed_ranks = fixed_ranks

        self.allocator: RankAllocator | None = None
        self.history: list[tuple[int, list[int], float]] = []
        self._module: pl.LightningModule | None = None
        self._started = 0.0
        # The Trainer's step that was acted on last; None before a run.
        self._last_step: int | None = None
        self._skipped = 0
        self._restored: dict[str, Any] | None = None
        self._random: dict[str, Tensor] | None = None
        # The module's, while another is in force.
        self._strict_loading: bool | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put the layers in, early enough for the optimizer and for weights that are restored."""
        if self._module is not None and self._module is not pl_module:
            self._forget()
        if self._module is not pl_module and isinstance(self.fixed_ranks, Mapping) and lora_layers(pl_module):
            raise ValueError(
                "Expected a module without LoRA layers, to adapt at the ranks of fixed_ranks, but it has some; give "
                "the pattern to add_lora as rank_pattern, and fixed_ranks=True."
            )
        self._module = pl_module
        if not lora_layers(pl_module) and not self._is_built_later(pl_module):
            self._refuse_to_adapt_a_copy(trainer)
            add_lora(
                pl_module,
                self.rank,
                self.alpha,
                self.dropout,
                self.target_modules,
                self.modules_to_save,
                rank_pattern=self.fixed_ranks if isinstance(self.fixed_ranks, Mapping) else None,
                init=self.init,
                use_rslora=self.use_rslora,
                freeze_A=self.freeze_A,
                random_rank=self.random_rank,
            )
            rank_zero_info(f"La-LoRA: {summarize(pl_module, self.group_by)}")
        attach_checkpoint_hooks(pl_module)
        self._prepare_sharded_loading(trainer, pl_module)
        if stage == "fit":
            self._refuse_averages(trainer)
            settings = {name: getattr(self, name) for name in inspect.signature(LaLoraCallback).parameters}
            log_settings(trainer, pl_module, settings)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._strict_loading is not None:
            pl_module.strict_loading = self._strict_loading
            self._strict_loading = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        layers = lora_layers(pl_module)
        if not layers:
            raise RuntimeError(
                "Expected the LightningModule to have LoRA layers when fit starts but it has none. A module that "
                "builds its model in setup() or configure_model() has to call add_lora(self) at the end of it, with "
                f"target_modules where the usual names do not fit. {linear_layers_seen(named_modules(pl_module))}"
            )
        require_unmerged(layers)
        self._require_optimized(trainer, pl_module)
        if self.allocator is not None and not self.allocator.drives(pl_module):
            self._forget()
        if self.fixed_ranks is not False:
            if trainer.ckpt_path is None:
                for layer in layers.values():
                    layer.set_rank(layer.max_rank)
        elif self.allocator is None:
            if trainer.ckpt_path is None and self._restored is None and any(map(_was_trained, layers.values())):
                rank_zero_warn(
                    "La-LoRA: the adapters have been trained already, and their ranks start anew; resume by "
                    "fit(ckpt_path=...) to go on with the ranks of a run, or keep them with fixed_ranks."
                )
            self.allocator = self._build_allocator(trainer, pl_module)
        if self._restored is not None:
            self._restore(self._restored)
        if trainer.ckpt_path is None:
            # What was restored, if anything, was for a test.
            self._last_step = self._random = None
        if self._random is not None and trainer.world_size == 1:
            # The last chance before Lightning draws the order of the first epoch's rows. Several processes would all
            # get the first one's.
            set_random_state(self._random)
        self._random = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        resumed = trainer.ckpt_path is not None and trainer.global_step > 0
        if self.allocator is not None and self._last_step is None and resumed:
            raise ValueError(
                f"Expected {trainer.ckpt_path} to be of a run with LaLoraCallback but it has none of its state; resume "
                "from another one, or load_lora_state_dict(module, path) and fit without ckpt_path."
            )
        if self.allocator is not None and self._last_step is not None and self._last_step < trainer.global_step:
            # The checkpoint was saved after an optimizer step and before this callback's turn.
            self.allocator.step()
        # Another Trainer counts its steps from zero again.
        self._last_step = trainer.global_step
        self._started = time.monotonic()
        if pl_module.device.type == "cuda":
            # Of this run, not of what the process did before.
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        if self.allocator is not None:
            self._read(trainer)
            log_layout(trainer)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self.allocator is not None:
            self.allocator.observe_gradients()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # This hook fires after every batch: also while gradients accumulate and when training_step returned None.
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        if self.allocator is None:
            return
        self.allocator.step()
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        # As Lightning counts for the loggers, which is not by optimizers where there are several.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        if every and (step + 1) % every == 0:
            metrics = self._metrics(trainer, pl_module)
            _log_metrics(trainer, metrics, step)
            # On the CPU already, so that the progress bar does not ask the device for it at every refresh.
            pl_module.log("rank/total", torch.tensor(metrics["rank/total"]), prog_bar=True, logger=False, on_step=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = costs(pl_module, time.monotonic() - self._started)
        if self.allocator is not None and self.history[-1][0] != trainer.global_step:
            metrics |= self._metrics(trainer, pl_module)
        _log_metrics(trainer, metrics, trainer.fit_loop.epoch_loop._batches_that_stepped - 1)
        if self.allocator is None or not trainer.is_global_zero:
            return
        log_results(trainer)
        if find_spec("matplotlib") is not None:
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_figure("rank/trajectories", self.plot(), trainer.global_step)
        # Where Lightning's table of the model is wanted before, ours is after.
        if any(isinstance(callback, ModelSummary) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            print_rank_report(self.allocator, pl_module)

    def plot(self) -> Any:
        """The rank trajectories so far as a matplotlib Figure, see :func:`plotting.plot_rank_trajectories`."""
        from lalora_lightning.plotting import plot_rank_trajectories
        from lalora_lightning.runs import Run

        if self.allocator is None or not self.history:
            raise RuntimeError("Expected a run to plot but fit has not started, or its ranks are fixed.")
        steps, ranks, budgets = zip(*self.history, strict=True)
        return plot_rank_trajectories(Run(self.allocator.layer_names, self.allocator.max_rank, steps, ranks, budgets))

    def state_dict(self) -> dict[str, Any]:
        if not self._has_state:
            return self._restored or {}
        return {
            "allocator": None if self.allocator is None else self.allocator.state_dict(),
            "last_step": self._last_step,
            "history": [[step, ranks, budget] for step, ranks, budget in self.history],
            "random": random_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, now or, before fit has built the allocator, as soon as it has.

        Raises:
            ValueError: It is none of this callback's, or of a run with other layers or settings.
        """
        if self._has_state:
            self._restore(state_dict)
        else:
            # Lightning calls this with an empty state, too.
            self._restored = None if isinstance(state_dict, Mapping) and not state_dict else state_dict

    def _forget(self) -> None:
        """What was kept of a run of other layers is no part of this one's."""
        self.allocator, self.history, self._skipped = None, [], 0
        self._last_step = self._restored = self._random = None

    def _is_built_later(self, pl_module: pl.LightningModule) -> bool:
        """Whether the module may build its model after the callback's turn, and adapt it itself."""
        try:
            find_targets(named_modules(pl_module), self.target_modules)
        except ValueError:
            return is_overridden("configure_model", pl_module) or is_overridden("setup", pl_module)
        return False

    @property
    def _has_state(self) -> bool:
        """Whether fit has begun."""
        return self.allocator is not None or self._last_step is not None

    def _restore(self, state_dict: dict[str, Any]) -> None:
        _check_state(state_dict)
        if (state_dict["allocator"] is None) != (self.allocator is None):
            kinds = ("adaptive", "fixed") if self.allocator is not None else ("fixed", "adaptive")
            raise ValueError(
                f"Expected the state of a run with {kinds[0]} ranks but got one with {kinds[1]} ranks; set fixed_ranks "
                "as in that run."
            )
        if self.allocator is not None:
            self.allocator.load_state_dict(state_dict["allocator"])
            self._skipped = int(self.allocator.skipped)
        self.history = [(step, list(ranks), budget) for step, ranks, budget in state_dict["history"]]
        self._restored = None
        self._last_step = state_dict["last_step"]
        self._random = state_dict["random"]

    def _build_allocator(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> RankAllocator:
        freeze_after = self.freeze_after
        if isinstance(freeze_after, float):
            steps = trainer.estimated_stepping_batches
            if steps == float("inf"):
                raise ValueError(
                    f"Expected a run of known length for freeze_after={freeze_after} but it has none; set max_steps or "
                    "max_epochs, or give freeze_after as a number of steps."
                )
            freeze_after = int(freeze_after * steps)
        return RankAllocator(
            pl_module,
            gamma=self.gamma,
            contribution=self.contribution,
            contribution_scale=self.contribution_scale,
            temperature=self.temperature,
            growth=self.growth,
            gradual_budget=self.gradual_budget,
            fidelity=self.fidelity,
            average_rank=self.average_rank,
            group_by=self.group_by,
            interval=self.interval,
            freeze_after=freeze_after,
        )

    def _refuse_to_adapt_a_copy(self, trainer: pl.Trainer) -> None:
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            raise ValueError(
                "Expected a module that is adapted already, since this strategy trains copies of it in other processes "
                "and brings back only their weights; call add_lora(module) before fit."
            )
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks[: callbacks.index(self)]:
            if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
                raise ValueError(
                    f"Expected {type(callback).__name__}, which copies the model, to come after LaLoraCallback, which "
                    "adapts it, but it comes before; change their order in callbacks."
                )

    def _refuse_averages(self, trainer: pl.Trainer) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if not isinstance(callback, WeightAveraging):
                continue
            if callback._use_buffers:
                raise ValueError(
                    f"Expected {type(callback).__name__} to leave buffers alone, since ranks have no average, but it "
                    "has use_buffers=True; give it use_buffers=False."
                )
            if self.save_adapter_only:
                raise ValueError(
                    f"Expected save_adapter_only=False with {type(callback).__name__}, which resumes from whole models "
                    "only, but got True."
                )

    def _prepare_sharded_loading(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.save_adapter_only or not isinstance(trainer.strategy, ModelParallelStrategy):
            return
        if trainer.strategy._save_distributed_checkpoint:
            raise ValueError(
                "Expected one file a checkpoint with save_adapter_only=True, since parts are loaded whole only; give "
                "ModelParallelStrategy save_distributed_checkpoint=False."
            )
        # It asks for every key by itself, before the module is asked which may be missing; those are checked later.
        self._strict_loading = pl_module.strict_loading
        pl_module.strict_loading = False

    def _require_optimized(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adapters that no optimizer holds would silently stay at their start."""
        optimized = {id(p) for opt in trainer.optimizers for group in opt.param_groups for p in group["params"]}
        # Strategies that flatten or shard give the optimizer parameters of their own: nothing can be told then.
        if not any(id(p) in optimized for p in pl_module.parameters()):
            return
        forgotten = [
            f"{name}.{factor}"
            for name, layer in lora_layers(pl_module).items()
            for factor in ("lora_A", "lora_B")
            if getattr(layer, factor).requires_grad and id(getattr(layer, factor)) not in optimized
        ]
        if forgotten:
            raise RuntimeError(
                f"Expected the optimizers to hold all adapter parameters but they lack {len(forgotten)}, "
                f"{forgotten[0]} the first. Build them in configure_optimizers() from self.parameters()."
            )

    def _read(self, trainer: pl.Trainer) -> tuple[list[int], float]:
        """Copy ranks, budget and the count of skipped steps from the device, in one go, and remember them."""
        allocator = self.allocator
        assert allocator is not None
        *ranks, budget, skipped = torch.cat(
            [allocator.ranks.float(), allocator.budget.float().view(1), allocator.skipped.float().view(1)]
        ).tolist()
        if skipped > self._skipped:
            rank_zero_warn(
                f"La-LoRA: {int(skipped) - self._skipped} optimizer steps since the last report left weights that are "
                "NaN or Inf; ranks and budget stayed as they were."
            )
            self._skipped = int(skipped)
        reading = (trainer.global_step, [int(rank) for rank in ranks], budget)
        # A second fit by another Trainer counts its steps from zero again.
        while self.history and self.history[-1][0] >= trainer.global_step:
            self.history.pop()
        self.history.append(reading)
        if len(self.history) > _MOST_READINGS:
            del self.history[1:-1:2]
        return reading[1], budget

    def _metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """Read the ranks, the budget and, when asked for, the sparsities, by the keys they are logged under."""
        assert self.allocator is not None
        names = self.allocator.layer_names
        ranks, budget = self._read(trainer)
        metrics = {f"rank/{name}": float(rank) for name, rank in zip(names, ranks, strict=True)}
        metrics |= {"rank/total": float(sum(ranks)), "rank/budget": budget}
        if self.log_sparsity:
            sparsity = layer_sparsity(pl_module, self.group_by).tolist()
            metrics |= {f"sparsity/{name}": share for name, share in zip(names, sparsity, strict=True)}
        return metrics


def _log_metrics(trainer: pl.Trainer, metrics: dict[str, float], step: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=step)


def _was_trained(layer: TruncatedLoRALinear) -> bool:
    """Whether the adapter does anything yet."""
    return bool((whole(layer.lora_B) != (0 if layer.start_B is None else layer.start_B)).any())


def _check_state(state: Any) -> None:
    """Check a callback's state, all but the allocator's part.

    Raises:
        ValueError: Something is missing, or is not what it should be.
    """
    keys = {"allocator", "last_step", "history", "random"}
    missing = sorted(keys - state.keys()) if isinstance(state, Mapping) else sorted(keys)
    if missing:
        raise ValueError(f"Expected the state of a LaLoraCallback but it lacks {', '.join(missing)}.")
    random, last_step = state["random"], state["last_step"]
    if (
        not isinstance(random, Mapping)
        or not all(isinstance(own, Tensor) and own.dtype == torch.uint8 for own in random.values())
        or "cpu" not in random
        or random["cpu"].shape != torch.get_rng_state().shape
    ):
        raise ValueError(f"Expected random to hold torch's random state but got {random!r}.")
    if last_step is not None and type(last_step) is not int:
        raise ValueError(f"Expected last_step to be a step or None but got {last_step!r}.")
    if not isinstance(state["history"], list) or not all(map(_is_history_entry, state["history"])):
        raise ValueError("Expected history to be a list of step, ranks and budget but it is not.")


def _is_history_entry(entry: Any) -> bool:
    if not isinstance(entry, (list, tuple)) or len(entry) != 3:
        return False
    step, ranks, budget = entry
    return (
        isinstance(step, int)
        and isinstance(ranks, (list, tuple))
        and all(isinstance(rank, int) for rank in ranks)
        and isinstance(budget, (int, float))
    )
