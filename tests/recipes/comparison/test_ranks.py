"""Ranks of the layers, and parameters after cutting the layers to them."""

from collections.abc import Callable
from typing import Any

import pytest

from lalora_lightning import trim_lora
from lalora_lightning.modules.task import TaskModule
from recipes.comparison.ranks import layer_ranks, projection_ranks, trimmed_parameters
from recipes.methods import METHODS, parse_method
from tests.recipes.methods.models import HEAD, fit, text, trainable, vision


def test_what_is_trained_after_trimming():
    module, batch = text()
    callbacks = METHODS["lalora"].adapt(module, rank=4)
    fit(module, batch, callbacks, steps=5)
    by_name = projection_ranks(module)
    ranks = layer_ranks(by_name)
    assert len(by_name) == 4
    assert sum(by_name.values()) == 2 * sum(ranks.values())
    # Query and value of each block, 32 a rank.
    assert trimmed_parameters(module) == HEAD + sum(2 * 32 * rank for rank in ranks.values())


@pytest.mark.parametrize("model", [text, vision])
@pytest.mark.parametrize(
    "spec",
    [
        "lora:rank=2,target_modules=all-linear",
        "lalora:rank=4,average_rank=2,target_modules=all-linear,group_by=module",
        "lalora:rank=4,average_rank=2,target_modules=all-linear,group_by=kind",
        "lalora:rank=4,condense_to=2,target_modules=all-linear,group_by=module",
        "lalora:rank=4,condense_to=2,condense_at=1,fixed_ranks=true,target_modules=all-linear,group_by=module",
        "lalora:rank=4,condense_to=2,target_modules=all-linear,group_by=kind",
    ],
)
def test_parameters_at_the_same_average_rank(spec: str, model: Callable[[], tuple[TaskModule, Any]]):
    """The parameters after trimming are counted in the trimmed model, and bounded by those of LoRA at rank 2."""
    module, batch = model()
    method, settings = parse_method(spec)
    fit(module, batch, method.adapt(module, **settings), steps=10)
    expected = trimmed_parameters(module)
    trim_lora(module)
    assert trainable(module) == expected
    # Two blocks: four projections of 16 x 16 and two of 16 x 32. BERT also has a pooler of 16 x 16.
    largest = 2 * (2 * (4 * (16 + 16) + 2 * (16 + 32)) + (16 + 16) * (model is text))
    # The largest cost of a component is the most that can be left over: those of one kind have a rank in common.
    left_over = {"module": 16 + 32, "kind": 2 * 3 * (16 + 32)}[settings.get("group_by", "module")]
    assert largest - left_over <= expected - HEAD <= largest
