"""All methods on a text encoder and on a vision transformer of width 16 and two blocks."""

import copy
import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertModel, DebertaV2Config, DebertaV2ForSequenceClassification

from recipes import methods
from recipes.methods import METHODS, NotApplicableError, parse_method
from tests.helpers.families import llama
from tests.recipes.methods.models import HEAD, fit, logits, loss, text, trainable, vision

# Width d = 16, f = 32 hidden units, 2 blocks, query and value: trainable parameters by the references' formulas.
LORA = 2 * 2 * 4 * (16 + 16)


BOTTLENECK = 2 * 16 * 4 + 4 + 16


BIASES_OF_BLOCK = 4 * 16 + 32 + 16 + 2 * 16  # attention, feed-forward network, two norms


WEIGHTS_OF_BLOCK = 4 * 16 * 16 + 2 * 16 * 32 + 2 * 16


COUNTS = {
    "lalora:rank=4": LORA,
    "lora:rank=4": LORA,
    "adalora:rank=2,init_rank=4": LORA + 2 * 2 * 4,
    "dora:rank=4": LORA + 2 * 2 * 16,
    "pissa:rank=4": LORA,
    "milora:rank=4": LORA,
    "eva:rank=4": LORA,  # all projections have one size, and the mean rank is 4
    "randlora:basis_rank=4": 2 * 2 * 4 * (4 + 16),  # 16 / 4 = 4 bases
    "vera:shared_rank=8": 2 * 2 * (16 + 8),
    "lora_fa:rank=4": 2 * 2 * 4 * 16,
    "dylora:rank=4": LORA,
    # Beside the blocks: norm of the embeddings and pooler, or patches and last norm.
    "bitfit": 2 * BIASES_OF_BLOCK + 16 + 16,
    "head": 0,
    "houlsby:bottleneck=4": 2 * 2 * BOTTLENECK,
    "pfeiffer:bottleneck=4": 2 * BOTTLENECK,
    "adapterdrop:bottleneck=4,dropped=0.5": BOTTLENECK,
    "series:bottleneck=4": 2 * BOTTLENECK,
    "parallel:bottleneck=4": 2 * BOTTLENECK,
    "prefix:tokens=4": 2 * 2 * 4 * 16,
    "prompt:tokens=4": 4 * 16,
    "ia3": 2 * (16 + 16 + 32),
}


BLOCKS = 2 * (BIASES_OF_BLOCK + WEIGHTS_OF_BLOCK)


# 50 words, 64 places, 2 token types, a norm, a pooler.
FULL_TEXT = BLOCKS + (50 + 64 + 2) * 16 + 2 * 16 + 16 * 16 + 16


# Patches of 4 x 4, a class token, 5 places, a norm.
FULL_VISION = BLOCKS + 4 * 4 * 16 + 16 + 16 + 5 * 16 + 2 * 16


VIRTUAL_TOKENS = ("prefix", "prompt")


def applies(method: str, new: Any) -> bool:
    """Virtual tokens are for texts; prefixes only where transformers takes them as peft gives them."""
    if method == "prefix" and "past_key_values" not in inspect.signature(BertModel.forward).parameters:
        return False
    return new is text or method not in VIRTUAL_TOKENS


def test_every_method_is_tested():
    assert {spec.partition(":")[0] for spec in COUNTS} | {"full"} == set(METHODS)


@pytest.mark.parametrize("new", [text, vision])
@pytest.mark.parametrize("spec", [*COUNTS, "full"])
def test_method(spec: str, new: Any):
    method, settings = parse_method(spec)
    module, batch = new()
    if not applies(method.name, new):
        with pytest.raises(NotApplicableError, match=f"^Method {method.name} does not apply to this model because"):
            method.adapt(module, **settings)
        return
    before = logits(module, batch).detach()
    callbacks = method.adapt(module, **settings)
    if method.name not in VIRTUAL_TOKENS:
        torch.testing.assert_close(logits(module, batch), before, atol=1e-5, rtol=1e-5)
    start = loss(module, batch)
    head = {n: p.detach().clone() for n, p in module.named_parameters() if "head" in n or "classifier" in n}

    fit(module, batch, callbacks)

    expected = COUNTS.get(spec, FULL_TEXT if new is text else FULL_VISION)
    assert trainable(module) == expected + HEAD
    # A frozen original stays behind where peft trains a copy of the head.
    moved = [p for n, p in module.named_parameters() if n in head and not torch.equal(p, head[n])]
    assert sum(p.numel() for p in moved) == HEAD
    # Every part of it is reached, not only the head.
    idle = [n for n, p in module.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not idle
    module.train()
    assert loss(module, batch) < start - 0.02


@pytest.mark.parametrize("name", ["head", "bitfit"])
def test_a_model_without_such_parameters_is_refused(name: str):
    """A LLaMA has neither a new head nor biases."""
    with pytest.raises(NotApplicableError, match=f"Method {name} does not apply to this model because it has no param"):
        METHODS[name].adapt(llama())


def test_all_methods_start_with_the_same_head():
    heads = []
    for spec in COUNTS:
        method, settings = parse_method(spec)
        if not applies(method.name, text):
            continue
        module, _ = text()
        method.adapt(module, **settings)
        named = module.named_parameters()
        heads.append(torch.cat([p.detach().flatten() for n, p in named if "classifier" in n and "original" not in n]))
    assert all(torch.equal(head, heads[0]) for head in heads)


def test_virtual_tokens_train_a_pooler_that_was_never_trained():
    """And not the whole backbone around it."""
    module, _ = text()
    nn.init.ones_(module.model.bert.encoder.layer[0].attention.self.query.bias)
    nn.init.zeros_(module.model.bert.pooler.dense.bias)
    METHODS["prompt"].adapt(module, tokens=4)
    assert trainable(module) == 4 * 16 + (16 * 16 + 16) + HEAD


def test_virtual_tokens_train_all_of_a_new_head():
    """DeBERTa's pooler is as new as its classifier, and peft looks for the latter only."""
    module, _ = text()
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    module.model = DebertaV2ForSequenceClassification(DebertaV2Config(vocab_size=50, **size))
    METHODS["prompt"].adapt(module, tokens=4)
    assert trainable(module) == 4 * 16 + (16 * 16 + 16) + HEAD


def test_a_parallel_adapter_stands_beside_the_feed_forward_network():
    module, _ = vision()
    plain = copy.deepcopy(module.model.blocks[0].mlp)
    METHODS["parallel"].adapt(module, bottleneck=4)
    mlp = module.model.blocks[0].mlp
    nn.init.normal_(mlp.fc2.up.weight)
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(mlp(x), plain(x) + mlp.fc2.up(F.gelu(mlp.fc1.down(x))))


def test_adapterdrop_leaves_out_the_first_five_of_twelve_blocks():
    module, _ = vision()
    METHODS["adapterdrop"].adapt(module, bottleneck=4, dropped=0.5)
    first, second = ([type(m).__name__ for m in block.modules()] for block in module.model.blocks)
    assert "SeriesAdapter" not in first
    assert "SeriesAdapter" in second
    assert round(METHODS["adapterdrop"].defaults["dropped"] * 12) == 5


@pytest.mark.parametrize("spec", ["vera:shared_rank=8", "randlora:basis_rank=4"])
def test_random_matrices_follow_the_seed(spec: str):
    method, settings = parse_method(spec)
    outputs = []
    for seed in (1, 1, 2):
        module, batch = text()
        torch.manual_seed(seed)
        method.adapt(module, **settings)
        for name, parameter in module.named_parameters():
            if "lambda" in name:
                nn.init.ones_(parameter)
        outputs.append(logits(module, batch))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])


def test_a_bottleneck_says_what_it_looks_for():
    """Also in a model without a head, which it does not train either."""
    with pytest.raises(NotApplicableError, match=r"it looks for .* in each block"):
        METHODS["houlsby"].adapt(llama())


def test_settings_have_the_types_of_the_arguments():
    spec = "lalora:condense_at=210,condense_to=2,freeze_after=1e-1,fixed_ranks={layer.3: 2},average_rank=null"
    settings = parse_method(spec)[1]
    assert settings == {
        "condense_at": 210,
        "condense_to": 2.0,
        "freeze_after": 0.1,
        "fixed_ranks": {"layer.3": 2},
        "average_rank": None,
    }
    # A number of steps and a fraction of the run are told apart by their type.
    assert type(settings["condense_at"]) is int
    assert parse_method("lalora:condense_at=0.5")[1] == {"condense_at": 0.5}


def test_settings_are_read():
    method, settings = parse_method("lora:alpha=1e1,target_modules=[query, key],dropout=0")
    assert settings == {"alpha": 10.0, "target_modules": ["query", "key"], "dropout": 0.0}
    assert parse_method(methods.method_label(method, settings)) == (
        method,
        {"alpha": 10.0, "target_modules": ["query", "key"]},
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lorra", "Expected a method to be one of lalora, lora, .* but got 'lorra'"),
        ("lora:gamma=2", "Expected a setting of lora to be one of rank, alpha, .* but got 'gamma'"),
        ("lora:rank=[", "Expected settings as name:setting=value"),
        ("lora:alpha=big", "Expected alpha of lora to be float but got 'big'"),
        ("lalora:gamma", "Expected gamma of lalora to be float but got None"),
        ("lora:rank=2.5", r"Expected rank of lora to be int but got 2\.5"),
        # LaLoraCallback would take 0 for LoRA's fixed ranks.
        ("lalora:fixed_ranks=0", r"Expected fixed_ranks of lalora to be bool \| .*Mapping\[str, int\] but got 0"),
        ("lalora:growth=sideways", "Expected growth of lalora to be .*'stored'.* but got 'sideways'"),
    ],
)
def test_settings_that_there_are_not(spec: str, message: str):
    with pytest.raises(ValueError, match=message):
        parse_method(spec)
