"""The state of an optimizer for adapters that were condensed: it belongs to directions that no longer exist."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import LBFGS, Optimizer

__all__ = ["reset_optimizer_state"]


def reset_optimizer_state(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Let an optimizer continue with these parameters as if it had just been built; gradients are dropped, too.

    :func:`lalora_lightning.condense_lora` turns the components of an adapter into others, so that averages of their
    gradients mean nothing any more. The state of other parameters, learning rates and step counts of schedulers do not
    change.

    Args:
        optimizer: Any optimizer with a state for each parameter. That of ``LBFGS``, which has one state for all
            parameters, is reset as a whole.
        parameters: Parameters, of which the optimizer need not have all.
    """
    chosen = set(parameters)
    own = [p for group in optimizer.param_groups for p in group["params"] if p in chosen]
    if isinstance(optimizer, LBFGS) and own:
        optimizer.state.clear()
    for parameter in own:
        optimizer.state.pop(parameter, None)
        initial = _initial_state(optimizer, parameter)
        if initial:
            optimizer.state[parameter] = initial
    for parameter in chosen:
        parameter.grad = None


def _initial_state(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """Return the state that a new optimizer has before its first step, which is empty except for Adagrad's."""
    try:
        return type(optimizer)([parameter], **optimizer.defaults).state[parameter]
    except Exception:
        # An optimizer of another library, whose constructor has other arguments.
        return {}
