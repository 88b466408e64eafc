"""LaLoraTrainerCallback: runs the rank allocator in transformers' Trainer."""

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from lalora_lightning import log_keys
from lalora_lightning.adapters import GradientMonitor, enable_input_gradients, lora_layers, require_trainable
from lalora_lightning.allocator import (
    AllocationSettings,
    RankAllocator,
    RankHistory,
    Reading,
    broadcast_from_first,
    leave_masks_out_of_broadcasts,
    require_condensing,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LaLoraTrainerCallback"]


class LaLoraTrainerCallback(TrainerCallback, ExportableState):
    """Adaptive ranks for transformers' ``Trainer``; :func:`lalora_lightning.add_lora` has to adapt the model first.

    ::

        add_lora(model, rank=8)
        Trainer(model, args, train_dataset=data, callbacks=[LaLoraTrainerCallback()]).train()

    A :class:`RankAllocator` updates the ranks after each optimizer step. Its ranks are added to the training logs as
    ``rank/<layer>``, ``rank/total`` and ``rank/budget``. Steps between two logs that changed the ranks get entries of
    their own in the Trainer's ``log_history``. Condensing adds ``fit/energy_kept`` there. Integrations named in
    ``report_to`` are called before this callback and do not get the ranks. Set ``report_to="none"`` instead,
    and add the integration's callback after this one. Checkpoints contain the state that a run needs to resume. A
    second ``train()`` continues with the ranks of the first.

    With ``contribution="fisher"`` the gradients are read after the Trainer has clipped them.

    Args:
        condense_to: Condense the adapters once in the run, to as many parameters as LoRA with this average rank, and
            keep their ranks from then on; see :func:`lalora_lightning.condense_lora`.
        condense_at: Number of optimizer steps (an integer) or fraction of the run (a float in (0, 1]) after which to
            condense.
        settings: Arguments of :class:`RankAllocator`.

    Attributes:
        allocator: The :class:`RankAllocator`; None before training.

    Raises:
        TypeError: An argument is unknown.
        ValueError: An argument is out of range; or, at the start of training, the model has no LoRA layers, or the
            checkpoint has no state of this callback.
    """

    def __init__(self, condense_to: float | None = None, condense_at: int | float = 0.7, **settings: Any) -> None:
        allocation = AllocationSettings(**settings)
        require_condensing(condense_to, condense_at, allocation.min_rank)
        self.condense_to, self.condense_at = condense_to, condense_at
        self.settings = settings
        self.allocator: RankAllocator | None = None
        self._history = RankHistory()
        self._gradients: GradientMonitor | None = None
        self.restored: dict[str, Any] | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep DDP, which the Trainer sets up before training begins, from sending the rank masks."""
        leave_masks_out_of_broadcasts(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Build the allocator, or continue with that of an earlier ``train()``; restore its state in a resumed run."""
        model: nn.Module = kwargs["model"]
        if self.allocator is None or not self.allocator.drives(model):
            if state.global_step == 0 and any(layer.is_trained() for layer in lora_layers(model).values()):
                warnings.warn(
                    "La-LoRA: the adapters have been trained already, and their ranks are reset; to continue with "
                    "their ranks, use the same LaLoraTrainerCallback or resume_from_checkpoint.",
                    stacklevel=2,
                )
            allocator = RankAllocator(model, **self.settings)
            if self.condense_to is not None:
                allocator.require_condensable(self.condense_to)
            self.allocator, self._history = allocator, RankHistory()
        require_trainable(model)
        enable_input_gradients(model)
        self._gradients = GradientMonitor(model)
        if state.global_step == 0:
            # An earlier call may have been interrupted between two logs.
            self._history.drop_unlogged()
            return
        # The Trainer only restores a callback if restore_callback_states_from_checkpoint is set. Its own state always
        # contains the callback's state.
        saved: Any = state.stateful_callbacks or {}
        restored = self.restored or saved.get(type(self).__name__, {}).get("attributes", {}).get("restored")
        if restored is None:
            raise ValueError(
                "Expected a checkpoint of a run with LaLoraTrainerCallback but it has none of its state; resume from "
                "another checkpoint, or train without resume_from_checkpoint."
            )
        own = self.allocator.state_dict()
        tensors = {k: torch.tensor(restored[k], dtype=v.dtype) for k, v in own.items() if isinstance(v, Tensor)}
        # Checkpoints of version 0.1.0 have no history.
        history = restored.get("history", {"history": []})
        restored = {key: value for key, value in restored.items() if key != "history"}
        self.allocator.load_state_dict({**restored, **tensors})
        self._history.load_state_dict(history, int(self.allocator.skipped))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Pass the gradients to the allocator, and check in the first steps that they exist."""
        assert self.allocator is not None
        warning = None if self._gradients is None else self._gradients.observe()
        if warning is not None:
            warnings.warn(f"La-LoRA: {warning}", stacklevel=2)
        self.allocator.observe_gradients()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update the ranks, and condense the adapters if it is time to."""
        assert self.allocator is not None
        self.allocator.step()
        # The Trainer counts the step afterwards.
        step = state.global_step + 1
        if self.condense_to is not None and not self.allocator.condensed and step >= self._condensing_step(state):
            agree = broadcast_from_first if args.world_size > 1 else None
            condensation = self.allocator.condense(self.condense_to, [kwargs["optimizer"]], agree)
            state.log_history.append({log_keys.ENERGY_KEPT: condensation.total_energy, "step": step})
        self._history.note(step, step, self.allocator)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log the last steps, and warn if the adapters of the final model were not condensed."""
        if self.allocator is None:
            return
        _insert(self._entries(), state)
        if self.condense_to is None:
            return
        if not self.allocator.condensed:
            reason = f"the run ended at step {state.global_step}"
        elif self.allocator.read()[1] > self.condense_to * len(self.allocator.layer_names) + 1e-3:
            reason = f"{state.best_model_checkpoint} was loaded, which is from before that step"
        else:
            return
        warnings.warn(
            f"La-LoRA: the adapters of the model are not condensed, because {reason}; call condense_lora(model, "
            f"average_rank={self.condense_to}), or lower condense_at.",
            stacklevel=2,
        )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add ranks and budget to the logs of training, and entries for earlier steps that changed the ranks."""
        # Evaluation also calls this hook.
        if self.allocator is None or logs is None or "loss" not in logs:
            return
        *earlier, last = self._entries() or [self._entry((state.global_step, *self.allocator.read()[:2]))]
        metrics = {key: value for key, value in last.items() if key != "step"}
        logs.update(metrics)
        # The Trainer has already copied the logs to its history.
        state.log_history[-1].update(metrics)
        _insert(earlier, state)

    def state(self) -> dict[str, Any]:
        """Return the state that the Trainer writes into a checkpoint as JSON."""
        state: dict[str, Any] | None = None
        if self.allocator is not None:
            state = self.allocator.state_dict()
            state = {key: value.tolist() if isinstance(value, Tensor) else value for key, value in state.items()}
            self._history.read(self.allocator)
            state["history"] = self._history.state_dict()
        # Functions cannot be written as JSON. If group_by is missing when the run is resumed, the names of the layers
        # differ, which raises an error.
        settings = {key: value for key, value in self.settings.items() if not callable(value)}
        settings |= {"condense_to": self.condense_to, "condense_at": self.condense_at}
        return {"args": settings, "attributes": {"restored": state}}

    def plot(self) -> "Figure":
        """Draw the rank trajectories so far, see :func:`lalora_lightning.plotting.plot_rank_trajectories`.

        Raises:
            RuntimeError: Training has not started.
        """
        from lalora_lightning.plotting import plot_rank_trajectories

        if self.allocator is None:
            raise RuntimeError("Expected a run to plot but training has not started.")
        self._history.read(self.allocator)
        return plot_rank_trajectories(self._history.run(self.allocator))

    @property
    def history(self) -> list[Reading]:
        """``(step, ranks, budget)`` of the optimizer steps up to the last log."""
        return self._history.readings

    def _entries(self) -> list[dict[str, float]]:
        """Return the logs of the steps that have not been logged: those that changed the ranks, and the last one."""
        assert self.allocator is not None
        self._history.read(self.allocator)
        return [self._entry(reading) for reading in self._history.take_unlogged().values()]

    def _entry(self, reading: Reading) -> dict[str, float]:
        assert self.allocator is not None
        step, ranks, budget = reading
        names, costs = self.allocator.layer_names, self.allocator.parameters_per_rank
        return {**log_keys.rank_metrics(names, ranks, budget, costs), "step": step}

    def _condensing_step(self, state: TrainerState) -> int:
        """Return the step after which to condense."""
        at = self.condense_at
        return at if isinstance(at, int) else max(1, int(at * state.max_steps))


def _insert(entries: list[dict[str, float]], state: TrainerState) -> None:
    """Insert entries into the Trainer's logs by step, before its own of the same step."""
    state.log_history[:] = sorted(entries + state.log_history, key=lambda log: log["step"])
