"""The low-rank layer, its arithmetic, and the kinds of linear layers it can wrap."""

from lalora_lightning.layers.factors import LowRankFactors
from lalora_lightning.layers.linear_kinds import (
    is_4bit,
    is_conv1d,
    is_linear,
    is_quantized,
    keep_plain_format,
    linear_parameter,
    linear_shape,
    linear_weight,
    num_entries,
)
from lalora_lightning.layers.multihead_attention import IN_PROJ, in_proj_of, set_in_proj
from lalora_lightning.layers.rank_masks import mask_problem, rank_mask, replace_ranks
from lalora_lightning.layers.settings import lora_scaling, require_adapter_settings
from lalora_lightning.layers.truncated_linear import TruncatedLoRALinear

__all__ = [
    "IN_PROJ",
    "LowRankFactors",
    "TruncatedLoRALinear",
    "in_proj_of",
    "is_4bit",
    "is_conv1d",
    "is_linear",
    "is_quantized",
    "keep_plain_format",
    "linear_parameter",
    "linear_shape",
    "linear_weight",
    "lora_scaling",
    "mask_problem",
    "num_entries",
    "rank_mask",
    "replace_ranks",
    "require_adapter_settings",
    "set_in_proj",
]
