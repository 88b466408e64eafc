"""AdapterCheckpoints: adapter-only checkpoints of the Trainer, and checks when they are loaded.

The hooks in this file are attached to the LightningModule, because the hooks of a callback are not called with
``save_weights_only`` or by ``trainer.test``, and run before those of other callbacks. They stay on the module after
fit, when ``trainer.save_checkpoint`` is often called, and do nothing to a module without LoRA layers. Apart from
inserting layers, nothing else in this package changes a user's LightningModule.

An adapter-only checkpoint contains all parameters that were trained during the run, also those of the backbone that a
callback such as ``BaseFinetuning`` unfroze, and lists what was left out.
"""

import functools
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import torch
from torch import nn

from lalora_lightning.adapters import lora_layers, named_parameters
from lalora_lightning.callback.compatibility import (
    attached_trainer,
    callbacks_of,
    has_load_hook,
    is_sharded,
    require_one_file_checkpoints,
)
from lalora_lightning.files import require_intact_file
from lalora_lightning.layers import is_4bit
from lalora_lightning.names import state_name
from lalora_lightning.saving import frozen_names, require_matching_state, without_frozen

__all__ = ["AdapterCheckpoints"]

_Hook = Callable[[dict[str, Any]], None]

_LEFT_OUT = "lalora_left_out"
"""Key of the names that an adapter-only checkpoint does not contain; checkpoints of version 0.1.0 do not have it."""

# Names of the parameters that were trainable at some time of a run, by module.
_trained: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
# What the checkpoint that is being loaded does not contain, by module.
_left_out: WeakKeyDictionary[nn.Module, Set[str]] = WeakKeyDictionary()


class AdapterCheckpoints(pl.Callback):
    """The part of :class:`LaLoraCallback` that deals with the weights in checkpoints.

    Args:
        save_adapter_only: Keep the frozen backbone out of the Trainer's checkpoints. It is always left out for a module
            with 4-bit layers, because bitsandbytes cannot load their state.
    """

    def __init__(self, save_adapter_only: bool) -> None:
        self.save_adapter_only = save_adapter_only
        # The module's own `strict_loading`, while it is overridden.
        self._strict_loading: bool | None = None

    def attach_hooks(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach the hooks to a module, unless it already has them.

        Raises:
            ValueError: The strategy writes distributed checkpoints, which cannot be adapter-only.
        """
        if not has_load_hook(pl_module, _accept_adapter_only):
            pl_module.register_load_state_dict_post_hook(_accept_adapter_only)
            for name, hook in (("on_save_checkpoint", _on_save), ("on_load_checkpoint", _on_load)):
                setattr(pl_module, name, functools.partial(hook, pl_module, getattr(pl_module, name)))
        if self.save_adapter_only and is_sharded(trainer):
            require_one_file_checkpoints(trainer)
            # The strategy itself would require every key before the hooks can accept missing ones. The keys are checked
            # in `_on_load`.
            self._strict_loading = pl_module.strict_loading
            pl_module.strict_loading = False

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note what is trained."""
        _note_trained(pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note what is trained, since a later callback may have unfrozen it at the start of the epoch."""
        _note_trained(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the module's ``strict_loading``."""
        if self._strict_loading is not None:
            pl_module.strict_loading = self._strict_loading
            self._strict_loading = None


def _on_save(pl_module: pl.LightningModule, own_hook: _Hook, checkpoint: dict[str, Any]) -> None:
    """Remove the frozen parameters from an adapter-only checkpoint."""
    own_hook(checkpoint)
    trainer = attached_trainer(pl_module)
    callbacks = callbacks_of(trainer) if trainer is not None else []
    adapter_only = any(isinstance(c, AdapterCheckpoints) and c.save_adapter_only for c in callbacks)
    if lora_layers(pl_module) and (adapter_only or any(map(is_4bit, pl_module.modules()))):
        state = checkpoint["state_dict"]
        kept = without_frozen(pl_module, state).keys() | _note_trained(pl_module)
        checkpoint["state_dict"] = {key: value for key, value in state.items() if key in kept}
        checkpoint[_LEFT_OUT] = [key for key in state if key not in kept]


def _on_load(pl_module: pl.LightningModule, own_hook: _Hook, checkpoint: dict[str, Any]) -> None:
    """Check the file of a checkpoint, and its keys if the strategy does not check them; note what it left out."""
    trainer = attached_trainer(pl_module)
    state = checkpoint.get("state_dict", {})
    if trainer is not None and trainer.ckpt_path is not None and lora_layers(pl_module):
        require_intact_file(trainer.ckpt_path)
        if is_sharded(trainer) and Path(trainer.ckpt_path).is_file():
            # This strategy loads the parameters that it finds, without checking for missing or unknown keys.
            state = torch.load(trainer.ckpt_path, mmap=True, map_location="cpu")["state_dict"]
            require_matching_state(pl_module, state)
    if lora_layers(pl_module) and _LEFT_OUT in checkpoint:
        _left_out[pl_module] = set(checkpoint[_LEFT_OUT])
        # Parameters that had been unfrozen may be frozen again.
        _note_trained(pl_module).update(frozen_names(pl_module).intersection(state))
    own_hook(checkpoint)


def _note_trained(pl_module: pl.LightningModule) -> set[str]:
    """Note the parameters that are trainable now, and return those that were at some time of the run."""
    trained = _trained.setdefault(pl_module, set())
    trained.update(name for name, parameter in named_parameters(pl_module) if parameter.requires_grad)
    return trained


def _accept_adapter_only(module: nn.Module, incompatible_keys: Any) -> None:
    """Accept that a state lacks the frozen parameters that its checkpoint left out, but no other missing keys.

    A state without its checkpoint may lack all frozen parameters.
    """
    if not lora_layers(module):
        return
    frozen = frozen_names(module)
    missing = incompatible_keys.missing_keys
    left_out = _left_out.pop(module, frozen if frozen <= set(map(state_name, missing)) else frozenset())
    missing[:] = [key for key in missing if state_name(key) not in frozen & left_out]
