"""Finding a model's projections, putting low-rank layers in, freezing the rest, counting parameters."""

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lalora_lightning.attention import IN_PROJ, in_proj_of, set_in_proj
from lalora_lightning.base_linear import entries, is_linear, keep_plain_format, linear_shape
from lalora_lightning.initialization import Init
from lalora_lightning.layers import TruncatedLoRALinear, lora_scaling

GroupBy = Literal["block", "parent", "module"] | Callable[[str], str]


# What the model families call query and value: RoBERTa, BERT, ALBERT, ELECTRA; LLaMA, ViT, CLIP, Whisper, OPT; T5;
# DeBERTa-v2/v3; DistilBERT.
QUERY_VALUE_NAMES = (
    ("query", "value"),
    ("q_proj", "v_proj"),
    ("q", "v"),
    ("query_proj", "value_proj"),
    ("q_lin", "v_lin"),
)
# Query, key and value in one weight, in this order: timm's ViTs; ModernBERT; GPT-2. nn.MultiheadAttention has it, too.
FUSED_NAMES = ("qkv", "Wqkv", "c_attn")
# Output layers that come pretrained with a language model, so that they are no task head.
LANGUAGE_MODEL_HEADS = ("lm_head", "embed_out", "output_projection")
# What torch's checkpoint_wrapper puts around a module, and leaves out of the names in a state dict.
_WRAPPED = "_checkpoint_wrapped_module"


@dataclass(frozen=True)
class AdapterSummary:
    """What was put into a model and what is trained; its string is one line for people.

    Attributes:
        layers: Groups of projections that share a rank.
        projections: Adapted weight matrices; a fused projection counts once for each adapted slice.
        adapter_parameters: Trainable entries of ``lora_A`` and ``lora_B``, at the maximum rank.
        head_parameters: Other trainable entries.
        total_parameters: All entries of the model.
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
        head = f" + {self.head_parameters:,} in {', '.join(self.head)}" if self.head else ""
        return (
            f"{self.layers} layers, {self.projections} projections adapted; "
            f"trainable: {self.adapter_parameters:,} in adapters{head}, "
            f"{self.trainable_share:.2%} of {self.total_parameters:,} parameters"
        )


def lora_layers(model: nn.Module) -> dict[str, TruncatedLoRALinear]:
    """The model's low-rank layers by name, in the order of ``model.named_modules()``.

    Names are those of the state dict: activation checkpointing (``checkpoint_wrapper``) does not show in them.
    """
    return {state_name(n): module for n, module in model.named_modules() if isinstance(module, TruncatedLoRALinear)}


def add_lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    target_modules: Sequence[str] | str | None = None,
    modules_to_save: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    rank_pattern: Mapping[str, int] | None = None,
    init: Init = "kaiming",
    use_rslora: bool = False,
    freeze_A: bool = False,
    random_rank: bool = False,
) -> AdapterSummary:
    """Put a :class:`TruncatedLoRALinear` around every target, freeze the rest, keep the head trainable; in place.

    Args:
        model: Any module. A model on the meta device can be adapted, too.
        rank: Maximum rank of a projection.
        alpha: The adapters are scaled by ``alpha / rank``.
        dropout: Dropout on the adapters' input.
        target_modules: Names of linear modules (``"query"`` matches every module of that name, ``"layer.3.query"`` a
            longer part of the name) or a regular expression that matches whole names. A named projection is adapted
            whole. By default query and value are found by the names the model families use, and of fused projections
            (``qkv``, ``Wqkv``, ``c_attn``; ``in_proj``, as which ``nn.MultiheadAttention`` shows its own) only the
            query and value slices are adapted.
        modules_to_save: Names of the modules that are trained in full. By default the task head: the modules that
            stand beside the adapted backbone and hold a linear layer, as far as they are not frozen already and no
            embedding's weights. An empty list trains adapters only.
        device: Device of the adapters; by default that of the weight they adapt.
        dtype: Type of the adapters' parameters, also over a base of lower precision.
        rank_pattern: Maximum ranks of their own for some projections, by a part of their names, such as
            ``{"layer.3": 2, "query": 4}``; the first that matches counts. The scaling stays that of ``rank``. These
            ranks are fixed: a rank allocator takes one maximum rank for all.
        init: How the adapters start: "kaiming" or "orthogonal" (A random, B zero), "pissa" (largest singular values),
            "milora" (smallest), "olora" (QR). The adapted model equals the base model at first in every case.
        use_rslora: Scale by ``alpha / sqrt(rank)``.
        freeze_A: Train ``lora_B`` only (LoRA-FA).
        random_rank: While training, draw a rank up to the one in force at every forward pass (DyLoRA).

    Returns:
        A summary: ``print(add_lora(model))``.

    Raises:
        ValueError: The model is adapted already; nothing was found for ``target_modules`` or ``modules_to_save``; a
            target shares its weight with another module or lies in one of ``modules_to_save``; rank, alpha, dropout, a
            rank of the pattern or init is out of range; dropout or random_rank would do nothing in an
            ``nn.MultiheadAttention``. The model is unchanged then.
        TypeError: A target is not a linear module.
    """
    if lora_layers(model):
        raise ValueError("Expected a model without LoRA layers but it has some already; add_lora adapts a model once.")
    modules = named_modules(model)
    targets = find_targets(modules, target_modules)
    _refuse_tied_weights(model, targets)
    if dropout or random_rank:
        _refuse_attention(modules, targets)
    ranks = _match_ranks(rank_pattern or {}, targets, rank)
    if modules_to_save is None:
        trained = _head_parameters(modules, targets)
    else:
        head = _match("modules_to_save", modules, modules_to_save)
        _refuse_targets_in(head, targets)
        trained = {f"{name}.{key}": p for name in head for key, p in named_parameters(modules[name])}
    quantized = dict.fromkeys(_parent(name) for name, p in trained.items() if not p.is_floating_point())
    if quantized:
        raise ValueError(
            f"Expected modules that can be trained in full but {', '.join(quantized)} hold quantised weights; leave "
            "them out of modules_to_save, or out of the quantisation."
        )
    settings: dict[str, Any] = {
        "dropout": dropout,
        "device": device,
        "dtype": dtype,
        "init": init,
        "freeze_A": freeze_A,
        "random_rank": random_rank,
    }
    adapted = {}
    for name, out_slices in targets.items():
        base, settings["out_slices"] = modules[name], out_slices
        try:
            if name in ranks:
                scaling = lora_scaling(alpha, rank, use_rslora)
                adapted[name] = TruncatedLoRALinear.with_scaling(base, ranks[name], scaling, **settings)
            else:
                adapted[name] = TruncatedLoRALinear(base, rank, alpha, use_rslora=use_rslora, **settings)
        except ValueError as error:
            raise ValueError(f"Cannot adapt {name}. {error}") from error

    insert_layers(model, adapted, trained.values())
    return summarize(model)


def insert_layers(model: nn.Module, layers: Mapping[str, TruncatedLoRALinear], trained: Iterable[nn.Parameter]) -> None:
    """Put layers in place of their base layers; they and some of the model's parameters are trainable, the rest not."""
    trained = list(trained)
    for module in model.modules():
        keep_plain_format(module)
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    for name, layer in layers.items():
        _put(model, name, layer)


def remove_layers(model: nn.Module, layers: Mapping[str, TruncatedLoRALinear]) -> None:
    """Put the base layers back in place of layers, whatever these have learnt."""
    for name, layer in layers.items():
        _put(model, name, layer.base_layer)


def state_name(name: str) -> str:
    """A module's or parameter's name as a state dict has it, which does not show activation checkpointing.

    >>> state_name("blocks.0._checkpoint_wrapped_module.query.weight")
    'blocks.0.query.weight'
    """
    return ".".join(part for part in name.split(".") if part != _WRAPPED)


def named_parameters(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """``model.named_parameters()`` by the names of the state dict."""
    for name, parameter in model.named_parameters(remove_duplicate=remove_duplicate):
        yield state_name(name), parameter


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """``model.named_modules()`` by the names of the state dict, and the projections of torch's attentions, too."""
    modules: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        name = state_name(name)
        modules[name] = module
        in_proj = in_proj_of(module)
        if in_proj is not None:
            modules[f"{name}.{IN_PROJ}".lstrip(".")] = in_proj
    return modules


def merge_lora(model: nn.Module, remove: bool = False) -> None:
    """Fold every adapter into its base weight, all or none; see :meth:`TruncatedLoRALinear.merge`.

    Args:
        model: The adapted model.
        remove: Put the plain linear modules back in place, for good: the model saves and loads as if it had never been
            adapted. Their weights stay frozen.

    Raises:
        ValueError: The model has no LoRA layers, or a merged weight would not be finite.
        RuntimeError: A layer is merged already.
        TypeError: A base weight is quantised.
    """
    layers = require_lora_layers(model)
    if remove and "" in layers:
        raise ValueError(
            "Expected a model with LoRA layers in it but it is one itself; merge it and take its base_layer."
        )
    merged = []
    try:
        for layer in layers.values():
            layer.merge()
            merged.append(layer)
    except Exception:
        for layer in merged:
            layer.unmerge()
        raise
    if remove:
        remove_layers(model, layers)


def unmerge_lora(model: nn.Module) -> None:
    """Restore every base weight bit for bit; see :meth:`TruncatedLoRALinear.unmerge`."""
    for layer in require_lora_layers(model).values():
        layer.unmerge()


def trim_lora(model: nn.Module) -> None:
    """Cut every adapter to its rank in force; see :meth:`TruncatedLoRALinear.trim`."""
    for layer in require_lora_layers(model).values():
        layer.trim()


def summarize(model: nn.Module, group_by: GroupBy = "block") -> AdapterSummary:
    """Count what an adapted model trains."""
    layers = require_lora_layers(model)
    adapters = {id(p): p for layer in layers.values() for p in (layer.lora_A, layer.lora_B)}
    named = list(named_parameters(model))
    head = [(name, p) for name, p in named if p.requires_grad and id(p) not in adapters]
    return AdapterSummary(
        layers=len(group_names(layers, group_by)),
        projections=sum(len(layer.out_slices) for layer in layers.values()),
        adapter_parameters=sum(p.numel() for p in adapters.values() if p.requires_grad),
        head_parameters=sum(p.numel() for _, p in head),
        total_parameters=sum(entries(p) for _, p in named),
        head=tuple(dict.fromkeys(name.rpartition(".")[0] for name, _ in head)),
    )


def find_targets(
    modules: Mapping[str, nn.Module], target_modules: Sequence[str] | str | None = None
) -> dict[str, list[tuple[int, int]] | None]:
    """What :func:`add_lora` adapts: names of linear modules, with the slices of their outputs (None: whole).

    Args:
        modules: Of the model, by name.
        target_modules: As of :func:`add_lora`.

    Raises:
        ValueError: Nothing was found.
        TypeError: A target is not a linear module.
    """
    if target_modules is None:
        targets = _query_and_value(modules)
        if not targets:
            raise ValueError(
                "Expected to find query and value projections by the usual names but found none; name the layers to "
                f"adapt with target_modules. {linear_layers_seen(modules)}"
            )
        return targets
    matched = _match("target_modules", modules, target_modules)
    wrong = [f"{name} ({type(modules[name]).__name__})" for name in matched if not is_linear(modules[name])]
    if wrong:
        raise TypeError(f"Expected target_modules to match nn.Linear or Conv1D only but they match {', '.join(wrong)}.")
    return dict.fromkeys(matched)


def find_head(model: nn.Module, targets: Iterable[str]) -> set[str]:
    """Names of the parameters of the task head, which stands beside the modules named; none where there is no head."""
    try:
        return set(_head_parameters(named_modules(model), targets))
    except ValueError:
        return set()


def group_names(names: Iterable[str], group_by: GroupBy = "block") -> dict[str, list[str]]:
    """Which projections share a rank: layer name to the names of its projections.

    Args:
        names: Names of the projections.
        group_by: ``"block"``: the name up to its first index, so that a transformer block is a layer; an index that
            all names share tells nothing and is passed over. ``"parent"``: the module that holds the projection, so
            that an attention is a layer. ``"module"``: every projection is a layer. Or a function from a projection's
            name to its layer's.

    Raises:
        ValueError: group_by is none of these.

    >>> list(group_names(["encoder.layer.0.attention.query", "encoder.layer.1.attention.query"]))
    ['encoder.layer.0', 'encoder.layer.1']
    """
    names = list(names)
    if callable(group_by):
        key = group_by
    elif group_by == "block":
        key = functools.partial(_block, shared=len(shared_parts(names)))
    elif group_by == "parent":
        key = _parent
    elif group_by == "module":
        key = str
    else:
        raise ValueError(f'Expected group_by to be "block", "parent", "module" or a function but got {group_by!r}.')
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(str(key(name)), []).append(name)
    return groups


def shared_parts(names: Iterable[str]) -> list[str]:
    """The parts that all dotted names have in common at the front.

    >>> shared_parts(["encoder.layer.0.query", "encoder.layer.1.query"])
    ['encoder', 'layer']
    """
    columns = zip(*(name.split(".") for name in names), strict=False)
    return [column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns)]


def require_lora_layers(model: nn.Module) -> dict[str, TruncatedLoRALinear]:
    """Like :func:`lora_layers`, for callers that cannot do without.

    Raises:
        ValueError: The model has no LoRA layers.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("Expected a model with LoRA layers but it has none; call add_lora(model) first.")
    return layers


def require_unmerged(layers: Mapping[str, TruncatedLoRALinear]) -> None:
    """For what trains adapters, which a merged layer does not use.

    Raises:
        RuntimeError: A layer is merged.
    """
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise RuntimeError(
            f"Expected unmerged adapters but {merged[0]} is merged, so that training would not reach it; call "
            "unmerge_lora(model) first."
        )


def _block(name: str, shared: int) -> str:
    parts = name.split(".")
    indices = [i for i, part in enumerate(parts) if part.isdigit()]
    first = next((i for i in indices if i >= shared), indices[0] if indices else len(parts) - 1)
    return ".".join(parts[: first + 1])


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    prefix, _, child = name.rpartition(".")
    parent = model.get_submodule(prefix)
    parent = getattr(parent, _WRAPPED, parent)
    if child == IN_PROJ and isinstance(parent, nn.MultiheadAttention):
        set_in_proj(parent, module)
    else:
        setattr(parent, child, module)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _query_and_value(modules: Mapping[str, nn.Module]) -> dict[str, list[tuple[int, int]] | None]:
    linear = {name for name, module in modules.items() if is_linear(module)}
    targets: dict[str, list[tuple[int, int]] | None] = {}
    for name in filter(linear.__contains__, modules):
        prefix, dot, child = name.rpartition(".")
        if child in FUSED_NAMES or (child == IN_PROJ and isinstance(modules[prefix], nn.MultiheadAttention)):
            out_features, in_features = linear_shape(modules[name])
            # Other proportions hold something else: GPT-2's cross-attention fuses key and value only.
            if out_features == 3 * in_features:
                whole = _interleaves_heads(modules[prefix])
                targets[name] = None if whole else [(0, in_features), (2 * in_features, 3 * in_features)]
        elif any(child in pair and all(prefix + dot + other in linear for other in pair) for pair in QUERY_VALUE_NAMES):
            targets[name] = None
    return targets


def _interleaves_heads(attention: nn.Module) -> bool:
    """Whether a fused projection holds query, key and value of one head after the other: it is adapted whole then."""
    # timm's MaxViT and CoAtNet; GPTBigCode with multi_query=False. With True, its projection has other proportions.
    return getattr(attention, "head_first", False) or hasattr(attention, "multi_query")


def _head_parameters(modules: Mapping[str, nn.Module], targets: Iterable[str]) -> dict[str, nn.Parameter]:
    """What is trained in full by default: the head's parameters that are not frozen, nor an embedding's."""
    # The output layer of a language model is often its embedding, as Whisper's and BERT's are.
    embeddings = {id(p) for m in modules.values() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return {
        f"{name}.{key}": p
        for name in _find_head(modules, targets)
        for key, p in named_parameters(modules[name])
        if p.requires_grad and id(p) not in embeddings
    }


def _find_head(modules: Mapping[str, nn.Module], targets: Iterable[str]) -> list[str]:
    """The task head: what stands beside the adapted backbone and holds a linear layer.

    Goes down from the root, along the modules that hold all targets, to the first one with such a part. Parts that are
    frozen already, such as a teacher, are passed over; where there are no others, nothing is trained in full.
    """
    frozen = False
    paths = [name.split(".") for name in targets]
    for depth in range(len(shared_parts(map(_parent, targets))) + 1):
        here = ".".join(paths[0][:depth])
        beside = [
            name
            for name, module in modules[here].named_children()
            if name not in {path[depth] for path in paths} and any(map(is_linear, module.modules()))
        ]
        prefix = here + "." if here else ""
        trainable = [name for name in beside if any(p.requires_grad for p in modules[prefix + name].parameters())]
        if trainable:
            return [prefix + name for name in trainable if name not in LANGUAGE_MODEL_HEADS]
        frozen |= bool(beside)
    if frozen:
        return []
    raise ValueError(
        "Expected to find a task head beside the adapted layers but found none, a head that holds a target not "
        "counted; name the modules to train in full with modules_to_save, or give an empty list to train adapters "
        f"only. {linear_layers_seen(modules)}"
    )


def _match(argument: str, modules: Mapping[str, nn.Module], wanted: Sequence[str] | str) -> list[str]:
    """Names that a regular expression matches whole or that end in one of the given names."""
    if isinstance(wanted, str):
        matched = [name for name in modules if re.fullmatch(wanted, name)]
        missing = [] if matched else [wanted]
    else:
        matched = [name for name in modules if any(("." + name).endswith("." + end) for end in wanted)]
        missing = [end for end in wanted if not any(("." + name).endswith("." + end) for name in matched)]
    if missing:
        raise ValueError(
            f"Expected {argument} to match modules but nothing matches {', '.join(map(repr, missing))}. "
            + linear_layers_seen(modules)
        )
    return matched


def linear_layers_seen(modules: Mapping[str, nn.Module]) -> str:
    """The model's linear layers for an error message; those that differ in an index only are folded."""
    kinds: dict[str, list[str]] = {}
    for name, module in modules.items():
        if is_linear(module):
            kinds.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    seen = [names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)})" for names in kinds.values()]
    return f"Linear layers seen: {', '.join(seen) or 'none'}."


def _refuse_tied_weights(model: nn.Module, targets: Iterable[str]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in named_parameters(model, remove_duplicate=False):
        parent, _, key = name.rpartition(".")
        owner = f"{parent}.{IN_PROJ}".lstrip(".") if key.startswith("in_proj_") else parent
        owners.setdefault(id(parameter), []).append(owner)
    for names in owners.values():
        if len(names) > 1 and not set(names).isdisjoint(targets):
            raise ValueError(
                f"Expected the weights of targets to be their own but {' and '.join(names)} share one; "
                "leave them out of target_modules or untie them."
            )


def _refuse_targets_in(head: Iterable[str], targets: Iterable[str]) -> None:
    for name in targets:
        for trained in head:
            if f"{name}.".startswith(f"{trained}."):
                raise ValueError(
                    f"Expected targets outside of modules_to_save but {name} lies in {trained}, which is trained in "
                    "full; leave it out of one of them."
                )


def _refuse_attention(modules: Mapping[str, nn.Module], targets: Iterable[str]) -> None:
    for name in targets:
        if isinstance(modules.get(_parent(name)), nn.MultiheadAttention):
            raise ValueError(
                f"Expected dropout=0 and random_rank=False for {name} but got others: nn.MultiheadAttention reads the "
                "weights of its projections and never calls them."
            )


def _match_ranks(rank_pattern: Mapping[str, int], targets: Iterable[str], rank: int) -> dict[str, int]:
    """Target to its own maximum rank, where the pattern has one."""
    if rank_pattern and rank < 1:
        raise ValueError(f"Expected rank to be at least 1 but got {rank}.")
    ranks = {}
    unmatched = set(rank_pattern)
    for name in targets:
        matching = [part for part in rank_pattern if f".{part}." in f".{name}."]
        unmatched -= set(matching)
        if matching:
            ranks[name] = rank_pattern[matching[0]]
    if unmatched:
        raise ValueError(
            "Expected rank_pattern to name parts of the adapted projections' names but "
            f"{', '.join(sorted(unmatched))} is in none of {', '.join(targets)}."
        )
    return ranks
