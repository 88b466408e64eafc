"""What add_lora says about the chosen targets."""

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from lalora_lightning import add_lora
from tests.helpers.families import TEXT, t5, timm_vit
from tests.helpers.models import MixtureOfExperts


class Block(nn.Module):
    """Reads or calls its layers in ways that ``forward`` does not show at once."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called, self.renamed, self.inspected = (nn.Linear(8, 8) for _ in range(4))
        self.inner = nn.ModuleDict({"nested": nn.Linear(8, 8)})

    def forward(self, x: Tensor) -> Tensor:
        layer = self.renamed
        x = F.linear(self.project(x), layer.weight)
        x = x @ self.inner.nested.weight
        return self.called(self.inspected(x.to(self.inspected.weight.dtype)))

    def project(this, x: Tensor) -> Tensor:  # noqa: N805
        return x @ this.read.weight.T + this.read.bias


def net() -> nn.Module:
    return nn.ModuleDict({"blocks": nn.ModuleList([Block()]), "head": nn.Linear(8, 2)})


@pytest.mark.parametrize("name", ["read", "called", "renamed", "inspected", "inner.nested"])
def test_a_layer_whose_weight_is_read_gets_no_dropout(name: str, recwarn):
    model = net()
    add_lora(model, rank=2, dropout=0.5, target_modules=[name])
    block = model["blocks"][0]
    layer = block.get_submodule(name)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 8)
    has_effect = not torch.equal(block(x), block(x))
    assert has_effect == (name in ("called", "inspected"))
    assert len(recwarn) == (0 if has_effect else 1)
    if not has_effect:
        assert f"dropout has no effect in blocks.0.{name}: " in str(recwarn[0].message)


def test_nothing_is_said_without_dropout(recwarn):
    add_lora(net(), rank=2, target_modules=["read"])
    assert not recwarn


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({}, True), ({"qkv_bias": False}, False)],
)
def test_beit_reads_the_weight_if_it_has_biases(arguments: dict, said: bool, recwarn):
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = timm.create_model("beit_base_patch16_224", **small, **arguments)
    add_lora(model, rank=2, dropout=0.1)
    assert [str(w.message) for w in recwarn] == [
        "La-LoRA: The adapters' dropout has no effect in blocks.0.attn.qkv and 1 more: Attention reads the weight of "
        "its projection and does not call it."
    ] * said


def test_usual_models_call_their_layers(recwarn):
    add_lora(timm_vit(), rank=2, dropout=0.1)
    # T5 reads the data type of wo.
    add_lora(t5(), rank=2, dropout=0.1, target_modules=["q", "v", "wo"], modules_to_save=[])
    # DeBERTa reads the weight in a branch that is not used, and has biases of its own.
    deberta = transformers.DebertaForSequenceClassification(transformers.DebertaConfig(**TEXT))
    add_lora(deberta, rank=2, dropout=0.1, target_modules=["in_proj"])
    assert not recwarn


@pytest.mark.parametrize(
    ("target_modules", "first"),
    [
        (["q_proj", "down_proj"], "down_proj and 1 more"),
        (["gate_proj"], "gate_up_proj and 1 more"),
        (r".*\.(q|up|down)_proj", None),
        (r".*mlp.*_proj", "gate_up_proj and 3 more"),
        (["shared_expert.down_proj"], None),
        (["q_proj", "o_proj"], None),
        (None, None),
    ],
)
def test_experts_that_are_passed_over_are_named(target_modules, first, recwarn):
    if first is None and isinstance(target_modules, str):
        first = "down_proj and 1 more"
    add_lora(MixtureOfExperts(), rank=2, target_modules=target_modules)
    assert [str(w.message) for w in recwarn] == (
        []
        if first is None
        else [
            f"La-LoRA: Not adapted, because only linear modules can be: model.layers.0.mlp.experts.{first}. "
            "target_modules matches these weights too, but they are 3-D parameters, as in mixtures of experts."
        ]
    )


def test_an_error_about_targets_that_only_experts_have_names_them():
    with pytest.raises(ValueError, match=r"matches 'down_proj'\. model\.layers\.0\.mlp\.experts\.down_proj is a 3-D"):
        add_lora(MixtureOfExperts(shared=False), target_modules=["q_proj", "down_proj"])
