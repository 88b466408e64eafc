"""Checks that the adapters are trainable and that gradients reach them."""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from lalora_lightning.adapters.inspection import lora_layers, require_lora_layers
from lalora_lightning.layers import TruncatedLoRALinear
from lalora_lightning.names import parent_name

__all__ = [
    "GradientMonitor",
    "disable_input_gradients",
    "enable_input_gradients",
    "require_gradients",
    "require_trainable",
]

_CAUSES = (
    "Usual causes: the backbone runs under torch.no_grad() or its output is detached; reentrant activation "
    "checkpointing over frozen embeddings (use use_reentrant=False, or model.enable_input_require_grads())."
)


def require_trainable(model: nn.Module) -> None:
    """Check that no adapter was frozen after it was inserted.

    Raises:
        RuntimeError: An adapter was frozen.
    """
    factors = {
        f"{name}.{factor}".lstrip("."): getattr(layer, factor)
        for name, layer in lora_layers(model).items()
        for factor in ("lora_B", *(() if layer.freeze_A else ("lora_A",)))
    }
    frozen = [name for name, parameter in factors.items() if not parameter.requires_grad]
    if frozen:
        raise RuntimeError(
            f"Expected the adapters to be trainable but {len(frozen)} of {len(factors)} factors are frozen, the first "
            f"{frozen[0]}. Something froze them after they were inserted, such as requires_grad_(False) in setup(), "
            "configure_optimizers() or on_fit_start(), or a finetuning callback. Adapters freeze the backbone "
            "themselves: leave that out."
        )


def require_gradients(model: nn.Module) -> None:
    """Check that gradients reach the adapters; call this in plain loops after the first backward pass.

    A layer that the batch did not use, such as an expert without tokens, has no gradient either.

    Raises:
        ValueError: The model has no LoRA layers.
        RuntimeError: Trainable adapters have no gradient.
    """
    layers = require_lora_layers(model)
    missing = [name for name, layer in layers.items() if not _has_gradient(layer)]
    if missing:
        raise RuntimeError(_describe(missing, len(layers)))


class GradientMonitor:
    """Watches in the first steps of training whether gradients reach the adapters.

    Layers that a batch does not reach, by routing, stochastic depth or in one of two towers, are not reported: where
    gradients are missing, hooks find out for a few steps which of these layers are called at all. Afterwards nothing is
    left of them. Nothing is read from the device.

    Args:
        model: The adapted model.
        patience: Steps without any gradient before the hooks are attached.
        window: Steps with some gradients missing before they are.
        watched: Steps that the hooks stay.
    """

    def __init__(self, model: nn.Module, patience: int = 2, window: int = 10, watched: int = 2) -> None:
        self._layers = lora_layers(model)
        self._model = model
        self._missing = set(self._layers)
        self._patience, self._window, self._watched = patience, window, watched
        self._steps = 0
        self._attached_at: int | None = None
        self._called: set[str] = set()
        self._handles: list[Any] = []
        self.finished = not self._layers

    def observe(self) -> str | None:
        """Look at the gradients; call it after the backward pass and before the optimizer step.

        Returns:
            A warning, at most once: the adapters that gradients do not reach, and the usual causes.
        """
        if self.finished:
            return None
        self._steps += 1
        self._missing = {name for name in self._missing if not _has_gradient(self._layers[name])}
        none_at_all = len(self._missing) == len(self._layers)
        if not self._missing:
            self.close()
        elif self._attached_at is None:
            if self._steps >= (self._patience if none_at_all else self._window):
                self._attach()
        elif self._steps >= self._attached_at + self._watched:
            # Compiled models do not run the hooks; no gradient at all in so many steps is worth a word anyway.
            faulty = self._missing if none_at_all and self._steps >= self._window else self._missing & self._called
            if faulty or self._steps >= self._window:
                self.close()
            if faulty:
                return _describe([name for name in self._layers if name in faulty], len(self._layers))
        return None

    def close(self) -> None:
        """Remove the hooks and stop."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.finished = True

    def _attach(self) -> None:
        self._attached_at = self._steps
        modules = dict(self._model.named_modules())
        for name in self._missing:
            layer: nn.Module = self._layers[name]
            # nn.MultiheadAttention reads the weight of its projections and does not call them.
            parent = modules.get(parent_name(name))
            watched = parent if isinstance(parent, nn.MultiheadAttention) else layer

            def note(module: nn.Module, args: Any, name: str = name) -> None:
                if module.training and not torch.compiler.is_compiling():
                    self._called.add(name)

            self._handles.append(watched.register_forward_pre_hook(note))


def enable_input_gradients(model: nn.Module) -> list[nn.Module]:
    """Let gradients flow through reentrant activation checkpointing of transformers' models over frozen embeddings.

    Reentrant checkpointing computes no gradients where no input requires one, and frozen embeddings require none. For
    models that checkpoint so, this calls ``enable_input_require_grads()``.

    Returns:
        The models, for :func:`disable_input_gradients`.
    """
    enabled: list[Any] = []
    covered: set[nn.Module] = set()
    for module in model.modules():
        if module in covered:
            continue
        # Newer versions of transformers may have done it themselves.
        done = hasattr(module, "_require_grads_hook")
        if done or _checkpoints_reentrantly(module):
            covered.update(module.modules())
            enabled += [] if done else [module]
    for module in enabled:
        module.enable_input_require_grads()
    return enabled


def disable_input_gradients(models: Collection[Any]) -> None:
    """Undo :func:`enable_input_gradients`."""
    for module in models:
        module.disable_input_require_grads()


def _checkpoints_reentrantly(module: Any) -> bool:
    """Return whether a module is a transformers model with frozen embeddings and reentrant checkpointing."""
    if not hasattr(module, "enable_input_require_grads") or not getattr(module, "is_gradient_checkpointing", False):
        return False
    functions = [getattr(inner, "_gradient_checkpointing_func", None) for inner in module.modules()]
    if not any(getattr(function, "keywords", {}).get("use_reentrant", True) for function in functions if function):
        return False
    embeddings = module.get_input_embeddings()
    return embeddings is not None and not any(p.requires_grad for p in embeddings.parameters())


def _has_gradient(layer: TruncatedLoRALinear) -> bool:
    return layer.lora_A.grad is not None or layer.lora_B.grad is not None


def _describe(missing: list[str], total: int) -> str:
    shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
    return f"{len(missing)} of {total} adapters get no gradient, so that they do not learn: {shown}. {_CAUSES}"
