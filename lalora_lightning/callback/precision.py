"""Adapters in float32 beside a model in half precision."""

import functools

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import HalfPrecision
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lalora_lightning.adapters import lora_layers
from lalora_lightning.callback.compatibility import is_sharded

__all__ = ["keep_adapters_in_float32", "warn_about_half_precision"]


def keep_adapters_in_float32(trainer: pl.Trainer) -> None:
    """Let ``precision="bf16-true"`` and ``"16-true"`` convert the module without its adapters.

    In bfloat16, an update below about 1/256 of a weight is rounded away, so adapters do not learn at small learning
    rates. FSDP2 requires parameters of one type, so a sharded module is converted as a whole.
    """
    plugin = trainer.precision_plugin
    if isinstance(plugin, HalfPrecision) and not is_sharded(trainer):
        plugin.convert_module = functools.partial(_convert_base_model, plugin)  # type: ignore[method-assign]


def _convert_base_model(plugin: HalfPrecision, module: nn.Module) -> nn.Module:
    """Convert a module, except for what belongs to its adapters: factors and initial factors."""
    own = [
        (layer, name, tensor.data)
        for layer in lora_layers(module).values()
        for name, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))
        if tensor.is_floating_point()
    ]
    module = type(plugin).convert_module(plugin, module)
    for layer, name, data in own:
        getattr(layer, name).data = data
    return module


def warn_about_half_precision(pl_module: pl.LightningModule) -> None:
    """Warn if adapters are in half precision."""
    for name, layer in lora_layers(pl_module).items():
        dtype = layer.lora_B.dtype
        if dtype in (torch.bfloat16, torch.float16):
            rank_zero_warn(
                f"La-LoRA: the adapters ({name} the first) are in {str(dtype).removeprefix('torch.')}, where small "
                'updates are rounded away; call add_lora after casting the model, or train with precision="bf16-mixed".'
            )
            return
