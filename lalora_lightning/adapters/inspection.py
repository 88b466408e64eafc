"""Inspecting a model: its LoRA layers, its modules by their names in the state dict, and parameter counts."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lalora_lightning.layers import IN_PROJ, TruncatedLoRALinear, in_proj_of, is_linear, num_entries
from lalora_lightning.names import GroupBy, group_names, parent_name, state_name

__all__ = [
    "AdapterSummary",
    "expert_parameters",
    "is_metric",
    "linear_layers_seen",
    "lora_layers",
    "named_modules",
    "named_parameters",
    "require_lora_layers",
    "require_unmerged",
    "summarize",
]


@dataclass(frozen=True)
class AdapterSummary:
    """Counts of the adapters and the trainable parameters of a model; ``str`` returns them as one line.

    Attributes:
        layers: Number of layers, the groups of projections that share a rank.
        projections: Number of adapted weight matrices; each adapted slice of a fused projection counts as one.
        adapter_parameters: Trainable parameters in ``lora_A`` and ``lora_B``, at the maximum rank.
        head_parameters: Other trainable parameters.
        total_parameters: All parameters of the model.
        head: Names of the modules trained in full.
    """

    layers: int
    projections: int
    adapter_parameters: int
    head_parameters: int
    total_parameters: int
    head: tuple[str, ...]

    @property
    def trainable_share(self) -> float:
        """Trainable share of all parameters, in [0, 1]."""
        return (self.adapter_parameters + self.head_parameters) / self.total_parameters

    def __str__(self) -> str:
        """Return the counts as one line."""
        head = f" + {self.head_parameters:,} in {', '.join(self.head)}" if self.head else ""
        return (
            f"{self.layers} layers, {self.projections} projections adapted; "
            f"trainable: {self.adapter_parameters:,} in adapters{head}, "
            f"{self.trainable_share:.2%} of {self.total_parameters:,} parameters"
        )


def lora_layers(model: nn.Module) -> dict[str, TruncatedLoRALinear]:
    """Return the model's LoRA layers by name, in the order of ``model.named_modules()``.

    The names are those of the state dict, without the wrappers of activation checkpointing and ``torch.compile``.
    """
    return {state_name(n): module for n, module in model.named_modules() if isinstance(module, TruncatedLoRALinear)}


def require_lora_layers(model: nn.Module) -> dict[str, TruncatedLoRALinear]:
    """Return the model's LoRA layers as :func:`lora_layers` does.

    Raises:
        ValueError: The model has no LoRA layers.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("Expected a model with LoRA layers but it has none; call add_lora(model) first.")
    return layers


def require_unmerged(layers: Mapping[str, TruncatedLoRALinear]) -> None:
    """Check that no layer is merged, because merged adapters are not trained.

    Raises:
        RuntimeError: A layer is merged.
    """
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise RuntimeError(
            f"Expected unmerged adapters but {merged[0]} is merged, so it would not be trained; call "
            "unmerge_lora(model) first."
        )


def named_parameters(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield ``model.named_parameters()`` with the names of the state dict."""
    for name, parameter in model.named_parameters(remove_duplicate=remove_duplicate):
        yield state_name(name), parameter


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return ``model.named_modules()`` by state dict name, and the fused projections of ``nn.MultiheadAttention``."""
    modules: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        name = state_name(name)
        modules[name] = module
        in_proj = in_proj_of(module)
        if in_proj is not None:
            modules[f"{name}.{IN_PROJ}".lstrip(".")] = in_proj
    return modules


def is_metric(module: nn.Module) -> bool:
    """Return whether a module is a metric of torchmetrics, whose networks are not trained."""
    # By name, so that torchmetrics is not imported.
    kinds = type(module).__mro__
    return any(kind.__name__ == "Metric" and kind.__module__.startswith("torchmetrics") for kind in kinds)


def linear_layers_seen(modules: Mapping[str, nn.Module]) -> str:
    """List the linear layers for an error message; names that only differ in an index are combined."""
    kinds: dict[str, list[str]] = {}
    for name, module in modules.items():
        if is_linear(module):
            kinds.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    seen = [names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)})" for names in kinds.values()]
    return f"Linear layers seen: {', '.join(seen) or 'none'}."


def expert_parameters(modules: Mapping[str, nn.Module], target_modules: Sequence[str] | str) -> list[str]:
    """Return the names of 3-D parameters, stacks of linear weights, that ``target_modules`` would select as modules.

    In fused parameters, such as ``gate_up_proj``, ``gate_proj`` and ``up_proj`` are found.

    Args:
        modules: All modules of the model by name.
        target_modules: A regular expression or names, as in :func:`lalora_lightning.add_lora`.
    """
    return [
        f"{name}.{key}".lstrip(".")
        for name, module in modules.items()
        for key, p in module.named_parameters(recurse=False)
        # Not a token or a position embedding (1, T, d), and not the weight of a convolution.
        if p.ndim == 3 and p.shape[0] > 1 and key != "weight" and _selects(target_modules, f"{name}.{key}".lstrip("."))
    ]


def _selects(target_modules: Sequence[str] | str, name: str) -> bool:
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    prefix, _, key = name.rpartition(".")
    for wanted in target_modules:
        before, _, child = wanted.rpartition(".")
        words, wanted_words = key.split("_"), child.split("_")
        fused = len(wanted_words) > 1 and wanted_words[-1] == words[-1] and set(wanted_words) <= set(words)
        if (child == key or fused) and (not before or f".{prefix}".endswith(f".{before}")):
            return True
    return False


def summarize(model: nn.Module, group_by: GroupBy = "block") -> AdapterSummary:
    """Count the adapters and the trainable parameters of an adapted model.

    Raises:
        ValueError: The model has no LoRA layers.
    """
    layers = require_lora_layers(model)
    adapters = {id(p): p for layer in layers.values() for p in (layer.lora_A, layer.lora_B)}
    named = list(named_parameters(model))
    head = [(name, p) for name, p in named if p.requires_grad and id(p) not in adapters]
    return AdapterSummary(
        layers=len(group_names(layers, group_by)),
        projections=sum(len(layer.out_slices) for layer in layers.values()),
        adapter_parameters=sum(p.numel() for p in adapters.values() if p.requires_grad),
        head_parameters=sum(p.numel() for _, p in head),
        total_parameters=sum(num_entries(p) for _, p in named),
        head=tuple(dict.fromkeys(parent_name(name) for name, _ in head)),
    )
