"""What is trainable in a plain model that a state adapts: what the state holds, as in the run that wrote it."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from lalora_lightning import add_lora, load_lora_state_dict, lora_state_dict
from tests.helpers import families
from tests.helpers.models import TinyTransformer, unchanged


def tuned(base: nn.Module, trained: list[str] | None) -> nn.Module:
    """A copy of the model, adapted and changed as training would."""
    model = copy.deepcopy(base)
    add_lora(model, rank=2, modules_to_save=trained)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_quietly(model: nn.Module, state: dict[str, Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_lora_state_dict(model, state)


def without(state: dict[str, Tensor], *keys: str) -> dict[str, Tensor]:
    assert set(keys) <= set(state)
    return {key: value for key, value in state.items() if key not in keys}


def deep_head() -> nn.Module:
    """A model with a head of several modules, with buffers."""
    model = TinyTransformer()
    model.head = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    return model.eval()


def speech(model: nn.Module) -> Tensor:
    return model(torch.randn(1, 800, generator=torch.Generator().manual_seed(0))).logits


def vectors(model: nn.Module) -> Tensor:
    return model(torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)))


# As 0.1.0 adapted CTC models and classifiers with an untrained pooler, and as modules_to_save=[] does.
@pytest.mark.parametrize(
    ("build", "run", "trained", "frozen"),
    [
        (families.wav2vec2_ctc, speech, [], "lm_head"),
        (lambda: families.bert_classifier(pooler=0.0), families.run, ["classifier"], "bert.pooler"),
        (TinyTransformer, vectors, [], "head"),
        (deep_head, vectors, [], "head"),
        (families.roberta, families.run, [], "classifier"),
    ],
    ids=["ctc", "untrained-pooler", "head", "head-with-buffers", "head-of-two-layers"],
)
def test_a_head_that_the_run_left_frozen_stays_as_it_is(
    build: Callable[[], nn.Module], run: Callable[[nn.Module], Tensor], trained: list[str], frozen: str
):
    plain = build().eval()
    model = tuned(plain, trained)
    with pytest.warns(UserWarning, match="La-LoRA") as said:
        load_lora_state_dict(plain, lora_state_dict(model))
    assert len(said) == 1
    assert f"the state has no parameters of {frozen} (task head), which stay frozen" in str(said[0].message)
    assert said[0].filename == __file__
    assert trainable(plain) == trainable(model)
    assert torch.equal(run(plain), run(model))


@pytest.mark.parametrize("missing", [["head.weight"], ["head.bias"]])
def test_a_head_of_which_parameters_are_missing_is_damaged(missing: list[str]):
    plain = TinyTransformer()
    state = without(lora_state_dict(tuned(plain, None)), *missing)
    with pytest.raises(ValueError, match=rf"missing keys: {missing[0]}\. .*\(modules_to_save\) first"):
        load_quietly(plain, state)
    assert unchanged(plain)


def test_a_head_of_which_a_layer_is_missing_is_damaged():
    plain = families.roberta()
    state = without(lora_state_dict(tuned(plain, None)), "classifier.out_proj.weight", "classifier.out_proj.bias")
    with pytest.raises(ValueError, match=r"missing keys: classifier\.out_proj\.weight, classifier\.out_proj\.bias\."):
        load_quietly(plain, state)
    assert unchanged(plain)


@pytest.mark.parametrize("missing", ["head.1.running_mean", "blocks.1.query.lora_A", "blocks.1.query._extra_state"])
def test_other_keys_of_a_state_with_a_frozen_head_are_not_optional(missing: str):
    plain = deep_head()
    state = without(lora_state_dict(tuned(plain, [])), missing)
    with pytest.raises(ValueError, match="Cannot load the adapter state"):
        load_quietly(plain, state)
    assert unchanged(plain)


def test_the_buffers_of_a_frozen_head_are_loaded():
    plain = deep_head()
    model = tuned(plain, [])
    model.head[1].running_mean.add_(1.0)
    with pytest.warns(UserWarning, match=r"no parameters of head \(task head\)"):
        load_lora_state_dict(plain, lora_state_dict(model))
    assert torch.equal(vectors(plain), vectors(model))


def test_no_false_alarm():
    # There is no task head.
    plain = families.llama()
    load_quietly(plain, lora_state_dict(tuned(plain, [])))
    # It is in the state.
    for build in (TinyTransformer, deep_head, families.wav2vec2_ctc, families.bert, families.roberta):
        plain = build()
        load_quietly(plain, lora_state_dict(tuned(plain, None)))
    # It is frozen in the plain model, too.
    plain = TinyTransformer()
    plain.head.requires_grad_(False)
    load_quietly(plain, lora_state_dict(tuned(plain, None)))
    # The model was adapted with the settings of the run.
    model = TinyTransformer()
    add_lora(model, rank=2, modules_to_save=[])
    load_quietly(model, lora_state_dict(tuned(TinyTransformer(), [])))


def test_a_whole_state_has_the_head_which_is_trainable():
    plain = TinyTransformer()
    state = tuned(plain, []).state_dict()
    with pytest.raises(ValueError, match=r"missing keys: head\.weight, head\.bias"):
        load_quietly(plain, without(state, "head.weight", "head.bias"))
    assert unchanged(plain)
    load_quietly(plain, state)
    assert trainable(plain) == trainable(tuned(TinyTransformer(), None))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "parametrize", [weight_norm, torch.nn.utils.weight_norm, lambda m: prune.l1_unstructured(m, "weight", 0.3)]
)
@pytest.mark.parametrize("whole", [True, False])
def test_base_layers_that_have_no_parameter_called_weight(parametrize: Callable[[nn.Module], object], whole: bool):
    model, plain = TinyTransformer(), TinyTransformer()
    for block in [*model.blocks, *plain.blocks]:
        parametrize(block.query)
        parametrize(block.value)
    add_lora(model, rank=2)
    load_quietly(plain, model.state_dict() if whole else lora_state_dict(model))
    assert trainable(plain) == trainable(model)


@pytest.mark.parametrize("unfrozen", ["bias", "blocks.1."])
def test_parameters_of_base_layers_that_were_trained_are_trainable(unfrozen: str):
    plain = TinyTransformer()
    model = tuned(plain, None)
    for name, parameter in model.named_parameters():
        if unfrozen in name:
            nn.init.normal_(parameter.requires_grad_(True))
    load_quietly(plain, lora_state_dict(model))
    assert trainable(plain) == trainable(model)
    assert torch.equal(vectors(plain), vectors(model))
