"""torch's nn.MultiheadAttention: torchvision's ViT and nn.TransformerEncoder."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from lalora_lightning import (
    RankAllocator,
    TruncatedLoRALinear,
    add_lora,
    load_lora_state_dict,
    lora_layers,
    lora_state_dict,
    merge_lora,
    save_peft_adapter,
    unmerge_lora,
)

X = torch.linspace(-1, 1, 2 * 5 * 8).view(2, 5, 8)


def encoder(depth: int = 2) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, depth)


def adapted_encoder(**settings: object) -> nn.TransformerEncoder:
    model = encoder()
    add_lora(model, rank=2, modules_to_save=[], **settings)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.3)
    return model


def test_query_and_value_slices_against_torch():
    model = adapted_encoder()
    layers = lora_layers(model)
    assert list(layers) == ["layers.0.self_attn.in_proj", "layers.1.self_attn.in_proj"]
    plain = encoder()
    for i, layer in enumerate(layers.values()):
        assert layer.out_slices == ((0, 8), (16, 24))
        (A_q, B_q), (A_v, B_v) = layer.split(layer.lora_A, layer.lora_B)
        with torch.no_grad():
            weight = plain.layers[i].self_attn.in_proj_weight
            weight[:8] += layer.scaling * B_q @ A_q
            weight[16:] += layer.scaling * B_v @ A_v
    torch.testing.assert_close(model(X), plain(X))
    with torch.no_grad():
        # The fast path, which reads the weights from outside of the attention.
        torch.testing.assert_close(model.eval()(X), plain.eval()(X))
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    torch.testing.assert_close(model(X, mask), plain(X, mask))


def test_only_the_adapters_learn_and_ranks_adapt():
    model = encoder()
    add_lora(model, rank=2, modules_to_save=[])
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names == [f"layers.{i}.self_attn.in_proj.lora_{side}" for i in (0, 1) for side in "AB"]
    allocator = RankAllocator(model, gamma=50.0)
    assert allocator.layer_names == ["layers.0", "layers.1"]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(10):
        loss = (model(X) - X.flip(-1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        allocator.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert allocator.ranks.sum() > 2


def test_merged_and_removed_it_is_torch_s_own_again():
    model = adapted_encoder().eval()
    expected = model(X)
    before = copy.deepcopy(model.state_dict())
    merge_lora(model)
    torch.testing.assert_close(model(X), expected)
    unmerge_lora(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    merge_lora(model, remove=True)
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    plain = encoder().eval()
    # As if it had never been adapted: the same keys, in any order.
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(X), expected)


def test_its_state_goes_into_a_plain_model():
    model = adapted_encoder().eval()
    loaded = encoder().eval()
    load_lora_state_dict(loaded, lora_state_dict(model))
    torch.testing.assert_close(loaded(X), model(X))
    # A state that does not fit leaves attentions as they were.
    state = lora_state_dict(model) | {"another": torch.zeros(1)}
    other = encoder()
    with pytest.raises(ValueError, match="unknown keys: another"):
        load_lora_state_dict(other, state)
    assert type(other.layers[0].self_attn) is nn.MultiheadAttention
    assert other.state_dict().keys() == encoder().state_dict().keys()


def test_the_output_projection_is_read_and_adapted_too():
    model = encoder()
    add_lora(model, rank=2, target_modules=["out_proj"], modules_to_save=[])
    expected = model(X)
    layer = lora_layers(model)["layers.0.self_attn.out_proj"]
    nn.init.normal_(layer.lora_B)
    assert not torch.allclose(model(X), expected)


def test_torchvision_s_vit():
    torch.manual_seed(0)
    vit = VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=3).eval()
    nn.init.normal_(vit.heads.head.weight)
    images = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    expected = vit(images)
    summary = add_lora(vit, rank=2)
    assert (summary.layers, summary.projections, summary.head) == (2, 4, ("heads.head",))
    torch.testing.assert_close(vit(images), expected)
    vit(images).square().sum().backward()
    assert all(layer.lora_B.grad.any() for layer in lora_layers(vit).values())


def test_without_bias():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, bias=False, batch_first=True)})
    expected = model["attention"](X, X, X)[0]
    add_lora(model, rank=2, modules_to_save=[])
    torch.testing.assert_close(model["attention"](X, X, X)[0], expected)
    merge_lora(model, remove=True)
    torch.testing.assert_close(model["attention"](X, X, X)[0], expected)


@pytest.mark.parametrize("settings", [{"dropout": 0.1}])
def test_what_acts_on_inputs_is_refused(settings):
    model = encoder()
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.in_proj .* never calls them"):
        add_lora(model, rank=2, modules_to_save=[], **settings)
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention


def test_inputs_of_several_widths_have_no_fused_projection():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, kdim=4, vdim=4)})
    with pytest.raises(ValueError, match=r"name the layers to adapt .* attention\.out_proj"):
        add_lora(model, rank=2, modules_to_save=[])


def test_a_shared_weight_is_refused_and_a_shared_attention_is_one():
    model = nn.ModuleDict({"first": nn.MultiheadAttention(8, 2), "second": nn.MultiheadAttention(8, 2)})
    model["second"].in_proj_weight = model["first"].in_proj_weight
    with pytest.raises(ValueError, match=r"first\.in_proj and second\.in_proj share one"):
        add_lora(model, rank=2, modules_to_save=[])
    model["second"] = model["first"]
    assert add_lora(model, rank=2, modules_to_save=[]).projections == 2
    assert model["second"].in_proj is model["first"].in_proj


def test_export_to_peft_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(ValueError, match=r"as a whole or not at all; use lora_state_dict"):
        save_peft_adapter(adapted_encoder(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("training", [True, False])
def test_the_increment_is_multiplied_out_once_a_forward(training, monkeypatch):
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, batch_first=True)})
    add_lora(model, rank=2, modules_to_save=[])
    calls = []
    increment = TruncatedLoRALinear.increment
    monkeypatch.setattr(TruncatedLoRALinear, "increment", lambda self: calls.append(self) or increment(self))
    model.train(training)
    model["attention"](X, X, X)
    assert len(calls) == 1
    assert model["attention"]._adapted_weight is None


def test_torch_fx_calls_the_attention_as_a_whole():
    """As it does with torch's own; torchvision's feature extraction needs it."""
    torch.manual_seed(0)
    model = VisionTransformer(32, 16, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=3).eval()
    names = get_graph_node_names(model)
    add_lora(model, rank=2)
    model.eval()
    assert get_graph_node_names(model) == names
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B)
    images = torch.randn(2, 3, 32, 32)
    extractor = create_feature_extractor(model, {"encoder": "features"})
    factors = [layer.lora_B for layer in lora_layers(model).values()]
    grads = []
    for features in (extractor(images)["features"], model.encoder(patches(model, images))):
        grads.append((features, *torch.autograd.grad(features.square().sum(), factors)))
    for own, other in zip(*grads, strict=True):
        torch.testing.assert_close(own, other)


def patches(model: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([model.class_token.expand(len(images), -1, -1), model._process_input(images)], dim=1)
