"""Ranks of the layers, and parameters after cutting the layers to them."""

from recipes.comparison.ranks import layer_ranks, trimmed_parameters
from recipes.methods import METHODS
from tests.recipes.methods.models import HEAD, fit, text


def test_what_is_trained_after_trimming():
    module, batch = text()
    callbacks = METHODS["lalora"].adapt(module, rank=4)
    fit(module, batch, callbacks, steps=5)
    ranks = layer_ranks(module)
    # Query and value of each block, 32 a rank.
    assert trimmed_parameters(module) == HEAD + sum(2 * 32 * rank for rank in ranks.values())
