"""The state of an optimizer for adapters that were condensed: it belongs to directions that no longer exist."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adadelta, Adafactor, Adam, Adamax, NAdam, Optimizer, RAdam, RMSprop

__all__ = ["reset_optimizer_state"]

_ZERO_AT_FIRST = (Adadelta, Adafactor, Adam, Adamax, NAdam, RAdam, RMSprop, SGD)
"""Optimizers whose state consists of zeros before the first step, apart from NAdam's ``mu_product``, which is 1.

For SGD, this holds without dampening.
"""


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
    # Lightning and accelerate wrap the optimizer of the user.
    optimizer = getattr(optimizer, "optimizer", optimizer)
    chosen = set(parameters)
    for group in optimizer.param_groups:
        own = [p for p in group["params"] if p in chosen]
        if isinstance(optimizer, _ZERO_AT_FIRST):
            # Not removed: checkpoints of sharded parameters and fused SGD need a state for all parameters or for none.
            for key, value in [item for p in own for item in optimizer.state.get(p, {}).items()]:
                if isinstance(value, Tensor):
                    value.fill_(1.0 if key == "mu_product" else 0.0)
            continue
        if isinstance(optimizer, LBFGS) and own:
            optimizer.state.clear()
        for parameter in own:
            optimizer.state.pop(parameter, None)
        optimizer.state.update(_initial_state(optimizer, {**group, "params": own}))
    for parameter in chosen:
        parameter.grad = None


def _initial_state(optimizer: Optimizer, group: dict[str, Any]) -> dict[Tensor, Any]:
    """Return the state that a new optimizer has before its first step, which is empty except for Adagrad's."""
    try:
        return dict(type(optimizer)([group], **optimizer.defaults).state) if group["params"] else {}
    except Exception:
        # An optimizer of another library, whose constructor has other arguments.
        return {}
