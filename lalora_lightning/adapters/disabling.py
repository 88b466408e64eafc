"""disable_adapters: compute with the base model for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lalora_lightning.adapters.inspection import require_lora_layers, require_unmerged
from lalora_lightning.layers.switch import change_switch

__all__ = ["disable_adapters"]


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Let the adapted layers of a model compute what their base layers compute, in this thread.

    The reference policy of DPO or RLHF is the model without its adapters, and needs no copy of it::

        with disable_adapters(model), torch.no_grad():
            reference = model(tokens)

    The context can be nested, and other threads that use the model are not affected. A compiled model has one graph
    with and one without adapters. Modules that are trained in full, such as a task head, stay as they are. Do not call
    ``backward`` through activation checkpointing after the context has ended, because it would compute the forward pass
    again, with the adapters. ``nn.DataParallel`` computes in other threads, where the adapters stay on.

    Args:
        model: An adapted model, or a part of one.

    Raises:
        ValueError: The model has no LoRA layers.
        RuntimeError: A layer is merged, so that its base layer contains the adapter.
    """
    layers = require_lora_layers(model)
    require_unmerged(layers)
    switches = [layer.switch for layer in layers.values()]
    for switch in switches:
        change_switch(switch, 1)
    try:
        yield
    finally:
        for switch in switches:
            change_switch(switch, -1)
