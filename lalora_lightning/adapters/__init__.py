"""Adapting a model: finding targets and the task head; inserting, inspecting, merging and removing layers."""

from lalora_lightning.adapters.adaptation import add_lora
from lalora_lightning.adapters.condensing import (
    Condensation,
    component_costs,
    condense_layers,
    condense_lora,
    condensed_parameters,
    require_no_initial_factors,
    require_room,
)
from lalora_lightning.adapters.disabling import disable_adapters
from lalora_lightning.adapters.gradients import (
    GradientMonitor,
    disable_input_gradients,
    enable_input_gradients,
    require_gradients,
    require_trainable,
)
from lalora_lightning.adapters.head import find_head
from lalora_lightning.adapters.insertion import insert_layers, remove_layers
from lalora_lightning.adapters.inspection import (
    AdapterSummary,
    linear_layers_seen,
    lora_layers,
    named_modules,
    named_parameters,
    require_lora_layers,
    require_unmerged,
    summarize,
)
from lalora_lightning.adapters.merging import merge_lora, trim_lora, unmerge_lora
from lalora_lightning.adapters.settings import AdapterSettings
from lalora_lightning.adapters.targets import find_targets
from lalora_lightning.names import GroupBy, group_names

__all__ = [
    "AdapterSettings",
    "AdapterSummary",
    "Condensation",
    "GradientMonitor",
    "GroupBy",
    "add_lora",
    "component_costs",
    "condense_layers",
    "condense_lora",
    "condensed_parameters",
    "disable_adapters",
    "disable_input_gradients",
    "enable_input_gradients",
    "find_head",
    "find_targets",
    "group_names",
    "insert_layers",
    "linear_layers_seen",
    "lora_layers",
    "merge_lora",
    "named_modules",
    "named_parameters",
    "remove_layers",
    "require_gradients",
    "require_lora_layers",
    "require_no_initial_factors",
    "require_room",
    "require_trainable",
    "require_unmerged",
    "summarize",
    "trim_lora",
    "unmerge_lora",
]
