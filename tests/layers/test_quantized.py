"""bitsandbytes' 4-bit and 8-bit layers as base, on the CPU."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lalora_lightning import (
    LaLoraCallback,
    RankAllocator,
    TruncatedLoRALinear,
    add_lora,
    load_lora_state_dict,
    load_peft_adapter,
    lora_layers,
    lora_state_dict,
    merge_lora,
    save_peft_adapter,
)
from tests.helpers.models import TinyTransformer
from tests.helpers.training import TinyClassifier, loader, new_trainer

bnb = pytest.importorskip("bitsandbytes")
X = torch.randn(4, 5, 64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 1, 0])


def quantized(linear: nn.Linear, bits: int) -> nn.Module:
    if bits == 4:
        out = bnb.nn.Linear4bit(linear.in_features, linear.out_features, compute_dtype=torch.float32, quant_type="nf4")
    else:
        out = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
    out.load_state_dict(linear.state_dict(), strict=False)
    return out.to("cpu")


def quantized_model(bits: int) -> TinyTransformer:
    """All projections quantized, the head not, as transformers does it."""
    torch.manual_seed(0)
    model = TinyTransformer(width=64)
    for block in model.blocks:
        for name in ("query", "key", "value"):
            setattr(block, name, quantized(getattr(block, name), bits))
    return model


def adapted_model(bits: int) -> TinyTransformer:
    """With adapters that do something."""
    model = quantized_model(bits)
    add_lora(model, rank=4)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    return model


both = pytest.mark.parametrize("bits", [4, 8])


@both
def test_forward_and_gradients_against_the_dequantized_weight(bits):
    base = quantized(nn.Linear(64, 96), bits)
    layer = TruncatedLoRALinear(base, rank=4, alpha=8.0, out_slices=[(0, 32), (64, 96)])
    nn.init.normal_(layer.lora_B, std=0.1)
    layer.set_rank(3)
    x = torch.randn(5, 64, requires_grad=True)
    out = layer(x)
    out.square().sum().backward()

    plain = TruncatedLoRALinear(nn.Linear(64, 96), rank=4, alpha=8.0, out_slices=[(0, 32), (64, 96)])
    plain.base_layer.weight.data, plain.base_layer.bias.data = layer.base_weight, base.bias.data
    plain.lora_A, plain.lora_B = (nn.Parameter(p.detach().clone()) for p in (layer.lora_A, layer.lora_B))
    plain.set_rank(3)
    x_plain = x.detach().clone().requires_grad_()
    out_plain = plain(x_plain)
    out_plain.square().sum().backward()
    # 8 bits also round the input.
    close = {"rtol": 0.05, "atol": 0.1} if bits == 8 else {}
    torch.testing.assert_close(out, out_plain, **close)
    for own, other in ((layer.lora_A, plain.lora_A), (layer.lora_B, plain.lora_B), (x, x_plain)):
        scale = other.grad.abs().max()
        torch.testing.assert_close(own.grad / scale, other.grad / scale, **close)


@both
def test_it_trains_and_its_ranks_adapt(bits):
    model = quantized_model(bits)
    expected = model(X)
    summary = add_lora(model, rank=4)
    assert summary.head == ("head",)
    # Three blocks of three projections, the head, six adapters.
    assert summary.total_parameters == 9 * (64 * 64 + 64) + 130 + 6 * 4 * (64 + 64)
    torch.testing.assert_close(model(X), expected)
    allocator = RankAllocator(model, gamma=20.0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(10):
        loss = nn.functional.cross_entropy(model(X), Y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        allocator.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert allocator.ranks.sum() > 3


@both
def test_its_state_holds_nothing_of_the_quantized_weights(bits):
    model = adapted_model(bits)
    state = lora_state_dict(model)
    assert {key.rpartition(".")[2] for key in state} == {
        "lora_A",
        "lora_B",
        "rank_mask",
        "_extra_state",
        "weight",
        "bias",
    }
    assert [key for key in state if key.endswith("weight")] == ["head.weight"]
    loaded = quantized_model(bits)
    load_lora_state_dict(loaded, state)
    torch.testing.assert_close(loaded.eval()(X), model.eval()(X))


@both
def test_an_empty_batch(bits):
    assert adapted_model(bits).blocks[0].query(torch.zeros(0, 5, 64)).shape == (0, 5, 64)


@both
def test_a_merge_is_refused_and_the_way_out_works(bits):
    model = adapted_model(bits)
    with pytest.raises(TypeError, match=r"floating point but got a quantized one .* without quantization"):
        merge_lora(model)
    torch.manual_seed(0)
    plain = TinyTransformer(width=64)
    load_lora_state_dict(plain, lora_state_dict(model))
    merge_lora(plain, remove=True)
    # Apart from what quantization lost.
    torch.testing.assert_close(plain(X), model(X), rtol=0, atol=0.2)


@both
def test_export_and_import_through_peft_s_format(bits, tmp_path):
    model = adapted_model(bits)
    for layer in lora_layers(model).values():
        layer.set_rank(2)
    save_peft_adapter(model, tmp_path)
    again = quantized_model(bits)
    load_peft_adapter(again, tmp_path)
    torch.testing.assert_close(again.eval()(X), model.eval()(X))


def test_starts_come_from_the_dequantized_weight():
    layer = TruncatedLoRALinear(quantized(nn.Linear(64, 64), 4), rank=2, alpha=2.0, init="pissa")
    U, S, Vh = torch.linalg.svd(layer.base_weight)
    torch.testing.assert_close(layer.lora_B @ layer.lora_A, U[:, :2] * S[:2] @ Vh[:2])
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), layer.base_layer(x))


class QuantizedClassifier(TinyClassifier):
    def __init__(self, bits: int) -> None:
        super().__init__(lr=0.01)
        self.model = quantized_model(bits)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.model(x.repeat(1, 1, 8)), y)


@both
def test_a_trainer_run_goes_on_from_its_checkpoint(bits, tmp_path):
    def run(folder, epochs, ckpt_path=None):
        task, callback = QuantizedClassifier(bits), LaLoraCallback(rank=4, gamma=20.0)
        pl.seed_everything(0, verbose=False)
        trainer = new_trainer(folder, callback, max_epochs=epochs)
        trainer.fit(task, loader(), ckpt_path=ckpt_path)
        return task, callback, trainer

    whole, callback, _ = run(tmp_path / "whole", 2)
    _, _, trainer = run(tmp_path / "half", 1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, resumed_callback, _ = run(tmp_path / "resumed", 2, tmp_path / "half.ckpt")
    assert resumed_callback.allocator.ranks.tolist() == callback.allocator.ranks.tolist()
    for key, value in lora_state_dict(whole).items():
        torch.testing.assert_close(lora_state_dict(resumed)[key], value)


@both
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_that_transformers_quantized(bits, family, tmp_path, monkeypatch):
    # The base model computes as on processors without AVX512-BF16; the test below is about those that have it.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False, raising=False)
    sizes = {"vocab_size": 30, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    if family == "llama":
        LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=64)).save_pretrained(tmp_path)
    else:
        GPT2LMHeadModel(GPT2Config(**sizes, n_positions=8)).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, device_map="cpu")
    ids = torch.arange(6)[None]
    model.eval()
    expected = model(ids).logits
    add_lora(model, rank=2)
    torch.testing.assert_close(model(ids).logits, expected)
    model(ids, labels=ids).loss.backward()
    layers = lora_layers(model)
    assert len(layers) == (4 if family == "llama" else 2)
    assert all(layer.lora_B.grad.any() for layer in layers.values())
    assert {key.rpartition(".")[2] for key in lora_state_dict(model)} == {
        "lora_A",
        "lora_B",
        "rank_mask",
        "_extra_state",
    }


@pytest.mark.parametrize("evaluated", ["before it is adapted", "after it was adapted"])
def test_a_model_that_was_evaluated_is_trained_as_if_it_had_not_been(evaluated):
    """On processors with AVX512-BF16, bitsandbytes packs weights for evaluation: no gradients pass through them."""

    def weights_and_gradients(model: TinyTransformer) -> list[torch.Tensor]:
        query = lora_layers(model)["blocks.0.query"]
        x = X.clone().requires_grad_()
        model.train()(x).square().sum().backward()
        return [query.base_weight, x.grad, query.lora_B.grad]

    never, model = adapted_model(4), quantized_model(4)
    with torch.no_grad():
        if evaluated == "before it is adapted":
            model.eval()(X)
        add_lora(model, rank=4)
        for own, other in zip(model.parameters(), never.parameters(), strict=True):
            if own.requires_grad:
                own.copy_(other)
        if evaluated == "after it was adapted":
            model.eval()(X)
    # Packing rounds the scales of the weights to bfloat16.
    close = {"rtol": 0.02, "atol": 0.01} if evaluated == "before it is adapted" else {}
    for own, expected in zip(weights_and_gradients(model), weights_and_gradients(never), strict=True):
        scale = expected.abs().max()
        torch.testing.assert_close(own / scale, expected / scale, **close)


@both
def test_quantized_modules_cannot_be_trained_in_full(bits):
    model = quantized_model(bits)
    with pytest.raises(ValueError, match=r"trained in full but blocks\.0\.key hold quantized weights"):
        add_lora(model, rank=4, modules_to_save=["blocks.0.key"])
    assert not lora_layers(model)
    assert model.head.weight.requires_grad


@both
def test_a_whole_state_loads(bits):
    model, other = quantized_model(bits), quantized_model(bits)
    add_lora(model, rank=4)
    add_lora(other, rank=4)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    load_lora_state_dict(other, model.state_dict())
    torch.testing.assert_close(other(X), model(X))


def test_a_start_before_quantization_is_that_of_the_weight():
    linear = nn.Linear(64, 64)
    base = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32)
    base.load_state_dict(linear.state_dict(), strict=False)
    layer = TruncatedLoRALinear(base, rank=2, alpha=2.0, init="pissa")
    U, S, Vh = torch.linalg.svd(linear.weight)
    torch.testing.assert_close(layer.lora_B @ layer.lora_A, U[:, :2] * S[:2] @ Vh[:2])
