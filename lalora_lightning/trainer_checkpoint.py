"""What a LightningModule needs so that a Trainer's checkpoints may hold adapters only, and are checked when loaded."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from lalora_lightning.adapters import state_name
from lalora_lightning.base_linear import is_4bit
from lalora_lightning.checkpoint import check_file, check_state, frozen_names, without_frozen

Hook = Callable[[dict[str, Any]], None]


def attach_checkpoint_hooks(pl_module: pl.LightningModule) -> None:
    """Let what concerns a module's checkpoints go through the module's own hooks, once.

    They come after those of all callbacks, and are also called with ``save_weights_only`` and by ``trainer.test``.
    """
    if _accept_adapter_only in pl_module._load_state_dict_post_hooks.values():
        return
    pl_module.register_load_state_dict_post_hook(_accept_adapter_only)
    for name, hook in (("on_save_checkpoint", _on_save), ("on_load_checkpoint", _on_load)):
        setattr(pl_module, name, functools.partial(hook, pl_module, getattr(pl_module, name)))


def random_state() -> dict[str, Tensor]:
    """Of torch, which Lightning does not keep: dropout and the order of rows after resuming go by it."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Go on from a state that :func:`random_state` gave."""
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def _on_save(pl_module: pl.LightningModule, own_hook: Hook, checkpoint: dict[str, Any]) -> None:
    own_hook(checkpoint)
    callbacks = pl_module._trainer.callbacks if pl_module._trainer is not None else []  # type: ignore[attr-defined]
    # What bitsandbytes writes of 4-bit layers cannot be loaded into a module that has some.
    if any(getattr(c, "save_adapter_only", False) for c in callbacks) or any(map(is_4bit, pl_module.modules())):
        checkpoint["state_dict"] = without_frozen(pl_module, checkpoint["state_dict"])


def _on_load(pl_module: pl.LightningModule, own_hook: Hook, checkpoint: dict[str, Any]) -> None:
    trainer = pl_module._trainer
    if trainer is not None and trainer.ckpt_path is not None:
        check_file(trainer.ckpt_path)
        if isinstance(trainer.strategy, ModelParallelStrategy) and Path(trainer.ckpt_path).is_file():
            # Loaded parameter by parameter, as far as there are any: nothing has been compared yet.
            check_state(pl_module, torch.load(trainer.ckpt_path, mmap=True, map_location="cpu")["state_dict"])
    own_hook(checkpoint)


def _accept_adapter_only(module: nn.Module, incompatible_keys: Any) -> None:
    """No frozen parameter in a state: an adapter-only one, which lacks nothing. Only some of them is an error."""
    frozen = frozen_names(module)
    missing = incompatible_keys.missing_keys
    if frozen <= set(map(state_name, missing)):
        missing[:] = [key for key in missing if state_name(key) not in frozen]
