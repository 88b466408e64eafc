"""The methods of the paper's tables, one row each: what they build in a model and how their parameters count.

from recipes.methods import parse_method

method, settings = parse_method("lalora:gamma=4,rank=16")
callbacks = method.adapt(module, **settings)
Trainer(callbacks=callbacks).fit(module)
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning.pytorch as pl
import yaml
from torch import nn

from lalora_lightning import LaLoraCallback, add_lora
from lalora_lightning.adapters import find_head
from recipes import peft_methods
from recipes.bottleneck import add_houlsby, add_parallel, add_pfeiffer, add_series
from recipes.projections import NotApplicableError, find_projections


@dataclass(frozen=True)
class Method:
    """A way of fine-tuning. Every method trains the task head, which is found as La-LoRA finds it.

    Attributes:
        name: What ``--method`` calls it.
        reference: Where it comes from.
        parameters: Trainable parameters without the head: of a projection (m x d), a block of width d with f hidden
            units in its feed-forward network, or the model.
        build: Adapts a module in place by keyword settings and returns the callbacks that training needs.
        options: The callable whose keyword arguments are the settings; by default ``build``.
        presets: Settings that make the method out of a more general one.
    """

    name: str
    reference: str
    parameters: str
    build: Callable[..., list[pl.Callback]]
    options: Callable[..., Any] | None = None
    presets: Mapping[str, Any] = field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, Any]:
        """All settings with their defaults."""
        arguments = inspect.signature(self.options or self.build).parameters.values()
        defaults = {a.name: a.default for a in arguments if a.default is not inspect.Parameter.empty}
        for name in ("device", "dtype", "save_adapter_only"):
            # Where things are kept, and no part of a method.
            defaults.pop(name, None)
        return {**defaults, **self.presets}

    def adapt(self, module: nn.Module, **settings: Any) -> list[pl.Callback]:
        """Adapt a module in place, or tell the callbacks returned to do so when training is set up.

        Args:
            module: A task module, with its model in ``module.model`` for prefix and prompt tuning.
            settings: Of the method; see :attr:`defaults`.

        Raises:
            NotApplicableError: The method cannot adapt this model.
            ValueError: A setting is out of range.
        """
        try:
            return self.build(module, **{**self.presets, **settings})
        except NotApplicableError as error:
            raise NotApplicableError(f"Method {self.name} does not apply to this model because {error}.") from error


def parse_method(spec: str) -> tuple[Method, dict[str, Any]]:
    """A method and its settings, of ``name`` or ``name:setting=value,...`` with values in YAML.

    Raises:
        ValueError: There is no such method or setting, or the settings cannot be read.

    >>> method, settings = parse_method("lalora:gamma=4,growth=stored")
    >>> method.name, settings
    ('lalora', {'gamma': 4.0, 'growth': 'stored'})
    """
    name, _, written = spec.partition(":")
    if name not in METHODS:
        raise ValueError(f"Expected a method to be one of {', '.join(METHODS)} but got {name!r}.")
    method = METHODS[name]
    try:
        settings = yaml.safe_load("{" + written.replace("=", ": ") + "}")
    except yaml.YAMLError as error:
        raise ValueError(f"Expected settings as name:setting=value,setting=value but got {spec!r}.") from error
    defaults = method.defaults
    for key, value in settings.items():
        if key not in defaults:
            raise ValueError(f"Expected a setting of {name} to be one of {', '.join(defaults)} but got {key!r}.")
        if type(defaults[key]) in (int, float):
            settings[key] = _number(value, type(defaults[key]), f"{key} of {name}")
    return method, settings


def method_label(method: Method, settings: Mapping[str, Any]) -> str:
    """The name with the settings that differ from the defaults, as :func:`parse_method` reads them.

    >>> method_label(*parse_method("lalora:gamma=4.0,rank=8"))
    'lalora:gamma=4'
    """
    changed = {key: value for key, value in settings.items() if value != method.defaults.get(key)}
    written = ",".join(f"{key}={_written(value)}" for key, value in sorted(changed.items()))
    return f"{method.name}:{written}" if written else method.name


def _number(value: Any, kind: type, what: str) -> float:
    # YAML reads 4 as an integer and 1e-3 as text.
    try:
        number = float(value)
        if kind(number) == number:
            return kind(number)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"Expected {what} to be {'a whole' if kind is int else 'a'} number but got {value!r}.")


def _written(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()


def _lalora(module: nn.Module, **settings: Any) -> list[pl.Callback]:
    return [LaLoraCallback(**settings)]


def _lora(module: nn.Module, **settings: Any) -> list[pl.Callback]:
    add_lora(module, **settings)
    return []


def _full(module: nn.Module) -> list[pl.Callback]:
    return []


def _head(module: nn.Module) -> list[pl.Callback]:
    _freeze_but(module, lambda name: False)
    return []


def _bitfit(module: nn.Module) -> list[pl.Callback]:
    _freeze_but(module, lambda name: name.rpartition(".")[2] == "bias")
    return []


def _bottleneck(
    add: Callable[..., None], module: nn.Module, bottleneck: int = 16, dropped: float = 0.0
) -> list[pl.Callback]:
    """``dropped``: the fraction of blocks, the first ones, that get no adapters."""
    blocks = [module.get_submodule(name) for name in find_projections(module).blocks]
    _freeze_but(module, lambda name: False)
    add(blocks[round(dropped * len(blocks)) :], bottleneck)
    return []


def _freeze_but(module: nn.Module, trained: Callable[[str], bool]) -> None:
    """Freeze all but the head and the parameters whose names are to be trained."""
    head = find_head(module, find_projections(module).names)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in head or (parameter.requires_grad and trained(name)))


# A bottleneck of 8 twice or of 16 once a block, 16 virtual tokens of keys and values: as many as LoRA's at rank 8 on
# query and value, 32 d a block.
METHODS = {
    method.name: method
    for method in (
        Method("lalora", "La-LoRA, Gu et al. 2025", "r (m + d) a projection at most", _lalora, LaLoraCallback),
        Method("lora", "LoRA, Hu et al. 2022", "r (m + d) a projection", _lora, add_lora),
        Method(
            "adalora",
            "AdaLoRA, Zhang et al. 2023",
            "R (m + d + 1) a projection for the initial rank R",
            peft_methods.add_adalora,
        ),
        Method("dora", "DoRA, Liu et al. 2024", "r (m + d) + m a projection", peft_methods.add_dora),
        Method("pissa", "PiSSA, Meng et al. 2024", "r (m + d) a projection", _lora, add_lora, {"init": "pissa"}),
        Method("milora", "MiLoRA, Wang et al. 2024", "r (m + d) a projection", _lora, add_lora, {"init": "milora"}),
        Method(
            "randlora",
            "RandLoRA, Albert et al. 2025",
            "n (r + min(m, d)) a projection with n = ceil(min(m, d) / r) bases",
            peft_methods.add_randlora,
        ),
        Method("vera", "VeRA, Kopiczko et al. 2024", "m + r a projection", peft_methods.add_vera),
        Method("lora_fa", "LoRA-FA, Zhang et al. 2023", "r m a projection", _lora, add_lora, {"freeze_A": True}),
        Method(
            "dylora", "DyLoRA, Valipour et al. 2023", "r (m + d) a projection", _lora, add_lora, {"random_rank": True}
        ),
        Method("bitfit", "BitFit, Ben Zaken et al. 2022", "all biases of the model", _bitfit),
        Method("full", "full fine-tuning", "all of the model", _full),
        Method("head", "linear probing", "none", _head),
        Method(
            "houlsby",
            "Houlsby et al. 2019",
            "2 (2 d b + b + d) a block",
            partial(_bottleneck, add_houlsby),
            presets={"bottleneck": 8},
        ),
        Method("pfeiffer", "Pfeiffer et al. 2021", "2 d b + b + d a block", partial(_bottleneck, add_pfeiffer)),
        Method(
            "adapterdrop",
            "AdapterDrop, Rücklé et al. 2021",
            "2 d b + b + d a block that keeps its adapter",
            partial(_bottleneck, add_pfeiffer),
            # The first 5 of 12 blocks.
            presets={"dropped": 5 / 12},
        ),
        Method("series", "series adapter, Hu et al. 2023", "2 d b + b + d a block", partial(_bottleneck, add_series)),
        Method(
            "parallel", "parallel adapter, He et al. 2022", "2 d b + b + d a block", partial(_bottleneck, add_parallel)
        ),
        Method("prefix", "prefix tuning, Li and Liang 2021", "2 n d a block for n tokens", peft_methods.add_prefix),
        Method("prompt", "prompt tuning, Lester et al. 2021", "n d for n tokens", peft_methods.add_prompt),
        Method("ia3", "(IA)^3, Liu et al. 2022", "2 d + f a block", peft_methods.add_ia3),
    )
}
