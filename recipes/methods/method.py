"""Method: a fine-tuning method and its settings."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from torch import nn

from recipes.methods.projections import NotApplicableError

__all__ = ["Method", "method_label"]


@dataclass(frozen=True)
class Method:
    """A fine-tuning method. Every method also trains the task head, which is found in the same way as for La-LoRA.

    Attributes:
        name: The name of the method in ``--method``.
        reference: The publication.
        parameters: The number of trainable parameters without the head: per projection (m x d), per block of width d
            with f hidden units in its feed-forward network, or of the whole model.
        build: A function that adapts a module in place, with keyword settings, and returns the callbacks for training.
        options: The callable whose keyword arguments are the settings; by default ``build``.
        presets: Settings that turn a more general method into this one.
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
        return {**{argument.name: argument.default for argument in self._arguments}, **self.presets}

    def read(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return settings with the types of the method's arguments; text is read as numbers where these are expected.

        Raises:
            ValueError: There is no such setting, or a value has another type.
        """
        arguments = {argument.name: argument.annotation for argument in self._arguments}
        if unknown := [name for name in settings if name not in arguments]:
            raise ValueError(
                f"Expected a setting of {self.name} to be one of {', '.join(arguments)} but got {unknown[0]!r}."
            )
        return {name: self._read(name, value, arguments[name]) for name, value in settings.items()}

    def _read(self, name: str, value: Any, annotation: Any) -> Any:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument(f"--{name}", type=annotation)
        try:
            read = parser.parse_object({name: value}).as_dict()[name]
        except ArgumentError:
            read = None
        if read is None and (value is not None or self.defaults[name] is not None):
            expected = inspect.formatannotation(annotation)
            raise ValueError(f"Expected {name} of {self.name} to be {expected} but got {value!r}.")
        return read

    @property
    def _arguments(self) -> list[inspect.Parameter]:
        # The arguments left out determine where and how tensors are stored. They do not change the method.
        stored = ("device", "dtype", "save_adapter_only")
        arguments = inspect.signature(self.options or self.build, eval_str=True).parameters.values()
        return [a for a in arguments if a.default is not inspect.Parameter.empty and a.name not in stored]

    def adapt(self, module: nn.Module, **settings: Any) -> list[pl.Callback]:
        """Adapt a module in place, or return callbacks that adapt it when training is set up.

        Args:
            module: A task module. Prefix and prompt tuning expect its model in ``module.model``.
            settings: Settings of the method, see :attr:`defaults`.

        Returns:
            The callbacks for training.

        Raises:
            NotApplicableError: The method cannot adapt this model.
            ValueError: A setting is out of range.
        """
        try:
            return self.build(module, **{**self.presets, **settings})
        except NotApplicableError as error:
            raise NotApplicableError(f"Method {self.name} does not apply to this model because {error}.") from error


def method_label(method: Method, settings: Mapping[str, Any]) -> str:
    """Return the name followed by the settings that differ from the defaults, in the form of ``parse_method``.

    >>> from recipes.methods import parse_method
    >>> method_label(*parse_method("lalora:gamma=4.0,rank=8"))
    'lalora:gamma=4'
    """
    changed = {key: value for key, value in settings.items() if value != method.defaults.get(key)}
    written = ",".join(f"{key}={_format(value)}" for key, value in sorted(changed.items()))
    return f"{method.name}:{written}" if written else method.name


def _format(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()
