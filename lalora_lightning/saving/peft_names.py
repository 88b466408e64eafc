"""The names in a PEFT configuration: how PEFT matches them against the modules of a model.

PEFT compares in three ways: ``target_modules`` with whole ends of names, ``modules_to_save`` with any end of a name
(``fc`` matches ``c_fc``) and also as regular expressions, and the keys of ``rank_pattern`` and ``alpha_pattern`` as
regular expressions for the end of a name. A name alone can therefore match more modules than one.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lalora_lightning.names import endings

__all__ = ["exact_pattern", "pattern_value", "require_saved_apart", "saved_with", "target_modules", "with_namesakes"]


def target_modules(targets: Collection[str], names: Iterable[str]) -> list[str] | str:
    """Return the shortest ends of names that PEFT matches with the targets only, such as ``["q_proj", "v_proj"]``.

    If other modules end with the whole name of a target, return a regular expression for the whole names.

    Args:
        targets: Names of the adapted modules.
        names: Names of all modules of the base model.
    """
    shortest = set(_shortest_ends(targets, names).values())
    if None in shortest:
        return "|".join(map(re.escape, targets))
    return sorted(end for end in shortest if end is not None)


def with_namesakes(targets: Collection[str], adapted: Collection[str], names: Iterable[str]) -> list[str]:
    """Return the targets and all other adapted modules that have the same shortest names, in the order of ``adapted``.

    These names select the result, and would not select the targets alone.

    Args:
        targets: Some of the adapted modules.
        adapted: Names of the adapted modules.
        names: Names of all modules of the base model.
    """
    shortest = _shortest_ends(adapted, names)
    wanted = {shortest[target] for target in targets} - {None}
    return [name for name in adapted if name in targets or shortest[name] in wanted]


def exact_pattern(name: str, names: Iterable[str]) -> str:
    """Return a key of ``rank_pattern`` that matches one of these names: the name itself, or it escaped and anchored."""
    try:
        pattern = _pattern(name)
    except re.error:
        pattern = None
    if pattern is not None and [other for other in names if pattern.match(other)] == [name]:
        return name
    return f"^{re.escape(name)}"


def pattern_value(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return the value for a module: of the first pattern that matches it, or else of its name.

    Raises:
        re.error: A pattern is malformed.
    """
    return patterns.get(next((key for key in patterns if _pattern(key).match(name)), name), default)


def saved_with(saved: Collection[str], names: Iterable[str]) -> list[str]:
    """Return the modules that PEFT saves for these entries of ``modules_to_save``: those whose names end alike."""
    return [name for name in names if name.endswith(tuple(saved))]


def require_saved_apart(
    saved: Collection[str], matched: Collection[str], targets: Collection[str], containers: Collection[str] = ()
) -> None:
    """Check that PEFT can save these modules in full, apart from the adapted ones and from each other.

    Args:
        saved: Entries of ``modules_to_save``.
        matched: The modules that PEFT saves for them, see :func:`saved_with`.
        targets: Names of the adapted modules.
        containers: Those of the matched modules that are lists or dicts of modules or parameters.

    Raises:
        ValueError: It cannot.
    """
    for name in matched:
        end = next(end for end in saved if name.endswith(end))
        adapted = next((t for t in targets if f"{t}.".startswith(f"{name}.") or name.startswith(f"{t}.")), None)
        nested = next((other for other in matched if other.startswith(f"{name}.")), None)
        if adapted is not None:
            reason = f"{name}, where {adapted} is adapted"
        elif nested is not None:
            reason = f"{name} and again {nested} inside of it"
        elif name in containers:
            reason = f"{name}, which is a list or dict"
        else:
            continue
        raise ValueError(
            f"Expected modules that PEFT can save in full but it saves every module whose name ends with {end}, "
            f"here {reason}; {_ADVICE}"
        )
    for end in saved:
        try:
            pattern = re.compile(rf"(^|.*\.){end}($|\..*)")
        except re.error as error:
            raise ValueError(
                f"Expected names that PEFT can read as regular expressions but got {end} ({error}); {_ADVICE}"
            ) from error
        hit = next((target for target in targets if pattern.match(target)), None)
        if hit is not None:
            raise ValueError(
                f"Expected names that PEFT can tell apart but as a regular expression {end} matches {hit}; {_ADVICE}"
            )


_ADVICE = (
    "use lora_state_dict(model), or merge_lora(model, remove=True) and save the whole model; or rename the module in "
    "the code of the model."
)


def _shortest_ends(targets: Collection[str], names: Iterable[str]) -> dict[str, str | None]:
    """Return the shortest end of each target that is no end of another module, or None."""
    others = {end for name in names if name not in targets for end in endings(name)}
    return {target: next((end for end in endings(target) if end not in others), None) for target in targets}


def _pattern(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")
