"""Names of layers."""

import pytest

from lalora_lightning.adapters import group_names


@pytest.mark.parametrize(
    ("names", "group_by", "expected"),
    [
        (["encoder.layer.0.q", "encoder.layer.0.v", "encoder.layer.1.q"], "block", [[0, 1], [2]]),
        # T5: the block, not the sub-layer; encoder and decoder apart.
        (["enc.block.0.layer.0.q", "dec.block.0.layer.0.q", "dec.block.0.layer.1.q"], "block", [[0], [1, 2]]),
        # Every name begins with the index of a Sequential.
        (["0.blocks.0.q", "0.blocks.0.v", "0.blocks.1.q"], "block", [[0, 1], [2]]),
        # One block alone, and names without an index.
        (["blocks.0.q", "blocks.0.v"], "block", [[0, 1]]),
        (["encoder.q", "encoder.v"], "block", [[0], [1]]),
        (["b.0.self.q", "b.0.self.v", "b.0.cross.q"], "parent", [[0, 1], [2]]),
        (["b.0.q", "b.0.v"], "module", [[0], [1]]),
        (["b.0.q", "b.0.v", "b.1.q"], lambda name: name[-1], [[0, 2], [1]]),
    ],
)  # fmt: skip
def test_group_names(names, group_by, expected):
    assert list(group_names(names, group_by).values()) == [[names[i] for i in group] for group in expected]


def test_an_unknown_group_by():
    with pytest.raises(ValueError, match=r"but got 'layer'"):
        group_names(["a.0.q"], "layer")
