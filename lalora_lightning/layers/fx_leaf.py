"""Modules that torch.fx calls as a whole, as it does with those of torch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["traced_call"]


def traced_call(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Record a call of a module as one node of the graph that ``torch.fx`` traces.

    Args:
        module: The module that is called.
        args: Arguments of the call.
        kwargs: Keyword arguments of the call.

    Returns:
        The proxy of the output; None if nothing is traced, or if the module itself is traced.
    """
    proxy: Any = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.fx.Proxy)), None)
    if proxy is None or proxy.tracer.root is module:
        return None
    return proxy.tracer.create_proxy("call_module", proxy.tracer.path_of_module(module), args, dict(kwargs))
