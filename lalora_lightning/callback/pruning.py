"""Lightning's ``ModelPruning`` beside adapters: the base model and the head are pruned, the adapters are not."""

import functools
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelPruning
from torch import nn

from lalora_lightning.adapters import lora_layers
from lalora_lightning.layers import TruncatedLoRALinear

__all__ = ["leave_adapters_unpruned", "require_unpruned_adapters"]

_Parameters = Sequence[tuple[nn.Module, str]]


def leave_adapters_unpruned(callbacks: Iterable[pl.Callback], save_adapter_only: bool) -> None:
    """Make ``ModelPruning`` callbacks that come later, and collect all weights and biases, pass over adapters.

    Raises:
        ValueError: Checkpoints would not contain the pruned weights.
    """
    for callback in callbacks:
        if not isinstance(callback, ModelPruning):
            continue
        if save_adapter_only:
            raise ValueError(
                f"Expected save_adapter_only=False with {type(callback).__name__}, which changes the frozen backbone, "
                "but got True."
            )
        if not callback._parameters_to_prune:
            callback.filter_parameters_to_prune = functools.partial(  # type: ignore[method-assign]
                _without_adapters, callback
            )
        callback._make_pruning_permanent_on_state_dict = functools.partial(  # type: ignore[method-assign]
            _permanently_pruned_state, callback
        )


def require_unpruned_adapters(callbacks: Iterable[pl.Callback], pl_module: pl.LightningModule) -> None:
    """Check that nothing prunes or parametrizes adapters, which would replace their parameters.

    Raises:
        ValueError: A ``ModelPruning`` callback is to prune an adapter or to resample frozen weights, or an adapter is
            pruned or parametrized already.
    """
    names = {layer: name for name, layer in lora_layers(pl_module).items()}
    for callback in callbacks:
        if isinstance(callback, ModelPruning):
            for module, parameter in callback._parameters_to_prune:
                if callback._resample_parameters and not getattr(module, parameter).requires_grad:
                    raise ValueError(
                        f"Expected resample_parameters=False for {type(callback).__name__}, because random weights in "
                        "the frozen backbone would never be trained, but got True."
                    )
                if module in names:
                    raise ValueError(
                        f"Expected {type(callback).__name__} to prune parameters of the base model but it has "
                        f"{parameter} of the adapted layer {names[module]}; name {names[module]}.base_layer in "
                        "parameters_to_prune, or without parameters_to_prune, let it come after LaLoraCallback."
                    )
    for layer, name in names.items():
        for factor in ("lora_A", "lora_B"):
            if factor not in layer._parameters:
                raise ValueError(
                    f"Expected {name}.{factor} to be a parameter but it is pruned or parametrized; remove that, and "
                    f"apply it to {name}.base_layer instead."
                )


def _without_adapters(callback: ModelPruning, parameters: _Parameters = ()) -> _Parameters:
    """Leave out the bias of an adapted layer, which is that of its base layer, a module of its own."""
    parameters = type(callback).filter_parameters_to_prune(callback, parameters)
    return [(module, name) for module, name in parameters if not isinstance(module, TruncatedLoRALinear)]


def _permanently_pruned_state(callback: ModelPruning, pl_module: pl.LightningModule) -> dict[str, Any]:
    """Return the state with the masks of pruning applied, and the masks of ranks as they are."""
    state = pl_module.state_dict()
    rank_masks = {key: state.pop(key).cpu() for key in list(state) if key.endswith(".rank_mask")}
    module: Any = SimpleNamespace(state_dict=lambda: state)
    return type(callback)._make_pruning_permanent_on_state_dict(callback, module) | rank_masks
