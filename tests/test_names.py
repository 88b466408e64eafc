"""Names of layers."""

import pytest

from lalora_lightning.adapters import group_names


@pytest.mark.parametrize(
    ("names", "group_by", "expected"),
    [
        (["encoder.layer.0.q", "encoder.layer.0.v", "encoder.layer.1.q"], "block", [[0, 1], [2]]),
        # T5: the block, not the sub-layer; encoder and decoder apart.
        (["enc.block.0.layer.0.q", "dec.block.0.layer.0.q", "dec.block.0.layer.1.q"], "block", [[0], [1, 2]]),
        # Stages of blocks: Swin, a stage with a single block, and nested lists (Twins).
        (["s.0.b.0.attn.qkv", "s.1.b.0.attn.q", "s.1.b.0.attn.v", "s.1.b.1.attn.q"], "block", [[0], [1, 2], [3]]),
        (["b.0.0.attn.q", "b.0.0.attn.v", "b.0.1.attn.q", "b.1.0.attn.q"], "block", [[0, 1], [2], [3]]),
        # UNet: a transformer block in an attention in a stage; what is beside it in the stage.
        (
            [f"down.0.attentions.{i}.blocks.{j}.{k}.q" for i in (0, 1) for j in (0, 1) for k in ("attn1", "attn2")]
            + ["down.0.resnets.0.emb"],
            "block",
            [[0, 1], [2, 3], [4, 5], [6, 7], [8]],
        ),
        # Parts of a block: attention and feed-forward network in a list, experts, heads, the layers of an MLP.
        (["b.0.0.fn.q", "b.0.0.fn.out.0", "b.0.1.fn.net.0", "b.1.0.fn.q"], "block", [[0, 1, 2], [3]]),
        (["b.0.mlp.experts.0.up", "b.0.mlp.experts.1.up", "b.1.attn.heads.0.q"], "block", [[0, 1], [2]]),
        (["b.0.mlp.0", "b.0.mlp.2", "b.0.ff.net.0.proj", "b.0.ff.net.2", "b.1.mlp.0"], "block", [[0, 1, 2, 3], [4]]),
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
