"""Methods that the peft library implements, put into a model in place, and AdaLoRA's allocator as a callback."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from lalora_lightning.adapters import find_head
from recipes.fused_projections import split_fused
from recipes.projections import NotApplicableError, find_projections

# The key projection beside a query projection, by the query's name.
KEY_NAMES = {"query": "key", "q_proj": "k_proj", "q": "k", "query_proj": "key_proj", "q_lin": "k_lin"}


def add_dora(
    module: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    target_modules: Sequence[str] | str | None = None,
) -> list[pl.Callback]:
    """Directions by LoRA, magnitudes of the columns learnt; the arguments are those of LoRA."""
    from peft import LoraConfig

    targets = _targets(module, target_modules)
    # peft's hint says int, its arithmetic does not.
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        use_dora=True,
        target_modules=targets,
    )
    _inject(module, config, targets)
    return []


def add_randlora(
    module: nn.Module,
    basis_rank: int = 32,
    scaling: float = 20.0,
    dropout: float = 0.0,
    target_modules: Sequence[str] | str | None = None,
) -> list[pl.Callback]:
    """Full-rank updates: learnt diagonal combinations of frozen random bases of rank ``basis_rank``."""
    from peft import RandLoraConfig

    targets = _targets(module, target_modules)
    config = RandLoraConfig(
        r=basis_rank,
        randlora_alpha=scaling * basis_rank,  # type: ignore[arg-type]
        randlora_dropout=dropout,
        target_modules=targets,
    )
    _inject(module, config, targets)
    return []


def add_vera(
    module: nn.Module,
    shared_rank: int = 256,
    dropout: float = 0.0,
    target_modules: Sequence[str] | str | None = None,
) -> list[pl.Callback]:
    """One frozen random pair of matrices of rank ``shared_rank`` for all projections; two learnt vectors for each."""
    from peft import VeraConfig
    from peft.tuners.vera import VeraModel

    targets = _targets(module, target_modules)
    head = find_head(module, targets)
    # Each layer holds on to the shared matrices, which is why the model that peft makes around them is not needed.
    VeraModel(module, VeraConfig(r=shared_rank, vera_dropout=dropout, target_modules=targets), "default")
    _train_head(module, head)
    return []


def add_ia3(module: nn.Module) -> list[pl.Callback]:
    """Learnt factors on keys, values and the feed-forward network's hidden units."""
    from peft import IA3Config

    from recipes.bottleneck import block_layout

    targets = _targets(module, None)
    blocks = find_projections(module).blocks
    hidden = [f"{block}.{block_layout(module.get_submodule(block)).feed_forward_out}" for block in blocks]
    factors = []
    for name in targets:
        prefix, _, child = name.rpartition(".")
        factors.append(f"{prefix}.{KEY_NAMES[child]}" if child in KEY_NAMES else name)
    _inject(module, IA3Config(target_modules=factors + hidden, feedforward_modules=hidden), targets)
    for name, parameter in module.named_parameters():
        if "ia3_l" in name:
            # A factor of 1 is what it starts from, and no decay should pull it to 0.
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return []


def add_prefix(module: nn.Module, tokens: int = 16) -> list[pl.Callback]:
    """Learnt keys and values of ``tokens`` virtual tokens before every block's own, without reparameterisation."""
    from peft import PrefixTuningConfig

    backbone = _text_classifier(module).base_model
    if "past_key_values" not in inspect.signature(backbone.forward).parameters:
        # Encoders of transformers before 5.24 have the argument; since then it is called cache.
        raise NotApplicableError(
            f"peft gives a prefix as past_key_values and the forward of {type(backbone).__name__} takes none"
        )
    _wrap(module, PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=tokens))
    return []


def add_prompt(module: nn.Module, tokens: int = 20) -> list[pl.Callback]:
    """Learnt embeddings of ``tokens`` virtual tokens before the text.

    An encoder's pooler looks at the first token, which is then a virtual one.
    """
    from peft import PromptTuningConfig

    _wrap(module, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=tokens))
    return []


def add_adalora(
    module: nn.Module,
    rank: int = 8,
    init_rank: int = 12,
    alpha: float = 16.0,
    dropout: float = 0.0,
    target_modules: Sequence[str] | str | None = None,
    initial: float = 0.15,
    final: float = 0.5,
    interval: int = 1,
    orthogonality: float = 0.1,
) -> list[pl.Callback]:
    """Singular triplets of which the less important are pruned, see :class:`AdaLoraCallback`.

    Args:
        module: What is adapted.
        rank: Mean rank of a projection at the end.
        init_rank: Rank of every projection at the start, more than ``rank``.
        alpha: The adapters are scaled by ``alpha / init_rank``.
        dropout: Dropout on the adapters' input.
        target_modules: Names or a regular expression; by default query and value.
        initial: Fraction of the run before pruning begins.
        final: Fraction of the run, its end, in which the ranks stay. Both lie near what the paper takes for GLUE.
        interval: Optimizer steps between prunings.
        orthogonality: Weight of the penalty; the paper takes 0.1 to 0.5.

    Raises:
        ValueError: init_rank is not above rank, or there is no time to prune between initial and final.
    """
    from peft import AdaLoraConfig
    from peft.tuners.adalora import AdaLoraModel

    if init_rank <= rank:
        raise ValueError(f"Expected init_rank to be above the final rank of {rank} but got {init_rank}.")
    if not 0 <= initial < 1 - final <= 1:
        raise ValueError(
            "Expected initial and final to be fractions of the run that leave time to prune between them but got "
            f"{initial} and {final}."
        )
    targets = _targets(module, target_modules)
    head = find_head(module, targets)
    config = AdaLoraConfig(
        init_r=init_rank,
        target_r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=targets,
        deltaT=interval,
        orth_reg_weight=orthogonality,
        # The length of the run is known when it starts.
        total_step=1,
    )
    tuner = AdaLoraModel(module, config, "default")
    _train_head(module, head)
    return [AdaLoraCallback(tuner, initial, final)]


class AdaLoraCallback(pl.Callback):
    """AdaLoRA's part after the forward pass: the orthogonality penalty and the rank allocator.

    The penalty, the mean over all matrices P and Q of ``|P P^T - I|_F``, times its weight, is that of peft's
    ``AdaLoraModel``. Its gradient is added before each optimizer step, so that it is the same for models that return
    no loss. The allocator acts after every optimizer step, while the gradients it looks at are still there.

    Args:
        tuner: peft's ``AdaLoraModel``.
        initial: Fraction of the run before pruning begins.
        final: Fraction of the run, its end, in which the ranks stay.
    """

    # Of peft's allocator: the importance of entries, its moving average and that of its uncertainty.
    _AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")

    def __init__(self, tuner: Any, initial: float, final: float) -> None:
        self.tuner = tuner
        self.initial = initial
        self.final = final
        self._last_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        steps = int(trainer.estimated_stepping_batches)
        config = self.tuner.peft_config["default"]
        config.total_step = steps
        config.tinit, config.tfinal = int(self.initial * steps), int(self.final * steps)
        self._last_step = trainer.global_step
        allocator = self.tuner.rankallocator
        for name in self._AVERAGES:
            averages = getattr(allocator, name)
            setattr(allocator, name, {key: value.to(pl_module.device) for key, value in averages.items()})

    def state_dict(self) -> dict[str, Any]:
        """What the allocator remembers of the run and no parameter shows."""
        averages = {name: dict(getattr(self.tuner.rankallocator, name)) for name in self._AVERAGES}
        return {"rank_pattern": self.tuner.peft_config["default"].rank_pattern, "averages": averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tuner.peft_config["default"].rank_pattern = state_dict["rank_pattern"]
        for name, averages in state_dict["averages"].items():
            setattr(self.tuner.rankallocator, name, averages)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        weight = self.tuner.peft_config["default"].orth_reg_weight
        (weight * orthogonality_penalty(dict(pl_module.named_parameters()))).backward()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self.tuner.update_and_allocate(trainer.global_step)


def orthogonality_penalty(parameters: Mapping[str, Tensor]) -> Tensor:
    """Mean over the matrices ``lora_A`` (r x d) and ``lora_B`` (m x r) of ``|A A^T - I|_F`` and ``|B^T B - I|_F``."""
    grams = [p @ p.T for name, p in parameters.items() if "lora_A" in name]
    grams += [p.T @ p for name, p in parameters.items() if "lora_B" in name]
    return torch.stack([torch.linalg.norm(gram - torch.eye(len(gram)).to(gram)) for gram in grams]).mean()


def _targets(module: nn.Module, target_modules: Sequence[str] | str | None) -> list[str]:
    """Names of whole linear modules; fused projections of which slices are meant are split first."""
    projections = find_projections(module, target_modules)
    if projections.fused:
        split_fused(module, projections.fused)
        projections = find_projections(module, target_modules)
    return projections.names


def _inject(module: nn.Module, config: Any, targets: Sequence[str]) -> None:
    """Put peft's layers in and train them and the head, which stands beside the targets."""
    from peft import inject_adapter_in_model

    head = find_head(module, targets)
    inject_adapter_in_model(config, module)
    _train_head(module, head)


def _wrap(module: nn.Module, config: Any) -> None:
    """Put peft's wrapper around the transformers model in ``module.model``; it trains the prompt and the head."""
    from peft import get_peft_model

    model = _text_classifier(module)
    # peft finds a classifier by its name, and DeBERTa's pooler is new, too.
    config.modules_to_save = sorted({name.split(".")[0] for name in find_head(model, find_projections(model).names)})
    module.model = get_peft_model(model, config)


def _text_classifier(module: nn.Module) -> PreTrainedModel:
    model = getattr(module, "model", None)
    if not isinstance(model, PreTrainedModel) or "SequenceClassification" not in type(model).__name__:
        raise NotApplicableError(
            f"virtual tokens go into a transformers model for sequence classification and it is {type(model).__name__}"
        )
    return model


def _train_head(module: nn.Module, head: set[str]) -> None:
    for name, parameter in module.named_parameters():
        if name in head:
            parameter.requires_grad_(True)
