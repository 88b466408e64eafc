"""The fine-tuning methods of the paper's tables, by name.

from recipes.methods import parse_method

method, settings = parse_method("lalora:gamma=4,rank=16")
callbacks = method.adapt(module, **settings)
Trainer(callbacks=callbacks).fit(module)
"""

from functools import partial
from typing import Any

import yaml

from lalora_lightning import LaLoraCallback, add_lora
from recipes.methods.adalora import add_adalora
from recipes.methods.bottleneck import adapt_by_bottleneck, add_houlsby, add_parallel, add_pfeiffer, add_series
from recipes.methods.dylora import adapt_by_dylora
from recipes.methods.eva import add_eva
from recipes.methods.ia3 import add_ia3
from recipes.methods.low_rank import adapt_by_lalora, adapt_by_lora
from recipes.methods.method import Method, method_label
from recipes.methods.peft_layers import add_dora, add_randlora, add_vera
from recipes.methods.projections import NotApplicableError
from recipes.methods.selective import train_all, train_biases, train_head_only
from recipes.methods.virtual_tokens import add_prefix, add_prompt

__all__ = ["METHODS", "Method", "NotApplicableError", "method_label", "parse_method"]

# The default bottlenecks (8 twice or 16 once per block) and prefixes (16 virtual tokens) have 32 d parameters per
# block, as many as LoRA at rank 8 on query and value.
_METHODS = (
    Method(
        "lalora",
        "La-LoRA, Gu et al. 2025 (Neural Networks 194, 108095)",
        "r (m + d) per projection at most",
        adapt_by_lalora,
        LaLoraCallback,
    ),
    Method("lora", "LoRA, Hu et al. 2022 (arXiv 2106.09685)", "r (m + d) per projection", adapt_by_lora, add_lora),
    Method(
        "adalora",
        "AdaLoRA, Zhang et al. 2023 (arXiv 2303.10512)",
        "R (m + d + 1) per projection for the initial rank R",
        add_adalora,
    ),
    Method("dora", "DoRA, Liu et al. 2024 (arXiv 2402.09353)", "r (m + d) + m per projection", add_dora),
    Method(
        "pissa",
        "PiSSA, Meng et al. 2024 (arXiv 2404.02948)",
        "r (m + d) per projection",
        adapt_by_lora,
        add_lora,
        {"init": "pissa"},
    ),
    Method(
        "milora",
        "MiLoRA, Wang et al. 2024 (arXiv 2406.09044)",
        "r (m + d) per projection",
        adapt_by_lora,
        add_lora,
        {"init": "milora"},
    ),
    Method(
        "eva",
        "EVA, Paischer et al. 2024 (arXiv 2410.07170)",
        "about r (m + d) per projection on average",
        add_eva,
    ),
    Method(
        "randlora",
        "RandLoRA, Albert et al. 2025 (arXiv 2502.00987)",
        "n (r + min(m, d)) per projection with n = ceil(min(m, d) / r) bases",
        add_randlora,
    ),
    Method("vera", "VeRA, Kopiczko et al. 2024 (arXiv 2310.11454)", "m + r per projection", add_vera),
    Method(
        "lora_fa",
        "LoRA-FA, Zhang et al. 2023 (arXiv 2308.03303)",
        "r m per projection",
        adapt_by_lora,
        add_lora,
        {"freeze_A": True},
    ),
    Method(
        "dylora",
        "DyLoRA, Valipour et al. 2023 (arXiv 2210.07558)",
        "r (m + d) per projection",
        adapt_by_dylora,
        add_lora,
    ),
    Method("bitfit", "BitFit, Ben Zaken et al. 2022 (arXiv 2106.10199)", "all biases of the model", train_biases),
    Method("full", "full fine-tuning", "all of the model", train_all),
    Method("head", "linear probing", "none", train_head_only),
    Method(
        "houlsby",
        "Houlsby et al. 2019 (arXiv 1902.00751)",
        "2 (2 d b + b + d) per block",
        partial(adapt_by_bottleneck, add_houlsby),
        presets={"bottleneck": 8},
    ),
    Method(
        "pfeiffer",
        "Pfeiffer et al. 2021 (arXiv 2005.00247)",
        "2 d b + b + d per block",
        partial(adapt_by_bottleneck, add_pfeiffer),
    ),
    Method(
        "adapterdrop",
        "AdapterDrop, Rücklé et al. 2021 (arXiv 2010.11918)",
        "2 d b + b + d per block that keeps its adapter",
        partial(adapt_by_bottleneck, add_pfeiffer),
        # The first 5 of 12 blocks.
        presets={"dropped": 5 / 12},
    ),
    Method(
        "series",
        "series adapter, Hu et al. 2023 (arXiv 2304.01933)",
        "2 d b + b + d per block",
        partial(adapt_by_bottleneck, add_series),
    ),
    Method(
        "parallel",
        "parallel adapter, He et al. 2022 (arXiv 2110.04366)",
        "2 d b + b + d per block",
        partial(adapt_by_bottleneck, add_parallel),
    ),
    Method(
        "prefix",
        "prefix tuning, Li and Liang 2021 (arXiv 2101.00190)",
        "2 n d per block for n tokens",
        add_prefix,
    ),
    Method("prompt", "prompt tuning, Lester et al. 2021 (arXiv 2104.08691)", "n d for n tokens", add_prompt),
    Method("ia3", "(IA)^3, Liu et al. 2022 (arXiv 2205.05638)", "2 d + f per block", add_ia3),
)

METHODS = {method.name: method for method in _METHODS}
"""All methods by name."""


def parse_method(spec: str) -> tuple[Method, dict[str, Any]]:
    """Parse ``name`` or ``name:setting=value,...`` into a method and its settings; values are YAML.

    Raises:
        ValueError: There is no such method or setting, or the settings cannot be read.

    >>> method, settings = parse_method("lalora:gamma=4,growth=stored")
    >>> method.name, settings
    ('lalora', {'gamma': 4.0, 'growth': 'stored'})
    """
    name, _, written = spec.partition(":")
    if name not in METHODS:
        raise ValueError(f"Expected a method to be one of {', '.join(METHODS)} but got {name!r}.")
    try:
        settings = yaml.safe_load("{" + written.replace("=", ": ") + "}")
    except yaml.YAMLError as error:
        raise ValueError(f"Expected settings as name:setting=value,setting=value but got {spec!r}.") from error
    return METHODS[name], METHODS[name].read(settings)
