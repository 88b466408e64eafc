"""Wrappers of torch.compile, DDP, Fabric and activation checkpointing do not show in states and PEFT folders."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from peft import PeftModel
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lalora_lightning import (
    LaLoraCallback,
    RankAllocator,
    add_lora,
    load_lora_state_dict,
    load_peft_adapter,
    lora_layers,
    lora_state_dict,
    save_peft_adapter,
)
from tests.helpers.models import TinyTransformer
from tests.helpers.training import TinyClassifier, loader, new_trainer

X = torch.linspace(-1, 1, 80).view(2, 5, 8)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_by_region(model: nn.Module) -> nn.Module:
    model.blocks[0] = compiled(model.blocks[0])
    model.blocks[1] = compiled(checkpoint_wrapper(model.blocks[1]))
    model.blocks[2].query = compiled(model.blocks[2].query)
    model.head = compiled(model.head)
    return model


def in_fabric(model: nn.Module) -> nn.Module:
    return Fabric(accelerator="cpu").setup_module(model)


WRAPPERS: list[Callable[[nn.Module], nn.Module]] = [compiled, compiled_by_region, in_fabric, nn.DataParallel]


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_wrapped_model_leaves_and_returns_as_the_model_itself(
    wrap: Callable[[nn.Module], nn.Module], when: str, tmp_path: Path
):
    base = TinyTransformer()
    model = copy.deepcopy(base)
    if when == "before":
        model = wrap(model)
    add_lora(model, rank=4, target_modules=["query", "value"])
    if when == "after":
        model = wrap(model)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B)
        layer.set_rank(2)
    expected = model(X).detach()

    save_peft_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["query", "value"]
    assert config["modules_to_save"] == ["head"]
    assert config["auto_mapping"]["base_model_class"] == "TinyTransformer"
    torch.testing.assert_close(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(X), expected)

    state = lora_state_dict(model)
    plain = copy.deepcopy(base)
    add_lora(plain, rank=4)
    assert state.keys() == lora_state_dict(plain).keys()
    for target in (copy.deepcopy(base), wrap(copy.deepcopy(base))):
        load_lora_state_dict(target, state)
        torch.testing.assert_close(target(X), expected)
    again = wrap(copy.deepcopy(base))
    load_peft_adapter(again, tmp_path)
    torch.testing.assert_close(again(X), expected)


def test_a_state_whose_keys_show_a_wrapper_is_loaded():
    """As a Trainer's checkpoint of a compiled model, or a state that an earlier version wrote."""
    model = compiled(TinyTransformer())
    add_lora(model, rank=4)
    nn.init.normal_(lora_layers(model)["blocks.0.query"].lora_B)
    state = {key: value for key, value in model.state_dict().items() if "base_layer" not in key}
    assert all(key.startswith("_orig_mod.") for key in state)
    plain = TinyTransformer()
    plain.load_state_dict({key.replace("base_layer.", ""): v for key, v in model.state_dict().items()}, strict=False)
    load_lora_state_dict(plain, state)
    assert torch.equal(plain.blocks[0].query.lora_B, lora_layers(model)["blocks.0.query"].lora_B)


def test_layers_of_a_compiled_model_have_their_own_names_in_logs_and_states(tmp_path: Path):
    module = TinyClassifier()
    module.model = compiled(module.model)
    callback = LaLoraCallback(rank=4, gamma=8.0, save_adapter_only=True)
    trainer = new_trainer(tmp_path, callback, max_epochs=1)
    trainer.fit(module, loader())
    assert callback.allocator is not None
    assert callback.allocator.layer_names == [f"model.blocks.{i}" for i in range(3)]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    plain = TinyClassifier()
    plain.model.load_state_dict(
        {k.replace("_orig_mod.", "").replace("base_layer.", ""): v for k, v in module.model.state_dict().items()},
        strict=False,
    )
    load_lora_state_dict(plain, tmp_path / "last.ckpt")
    torch.testing.assert_close(plain.model(X), module.model(X))


def test_an_allocator_reads_the_state_of_a_compiled_model_s_allocator_of_an_earlier_version():
    model = compiled(TinyTransformer())
    add_lora(model, rank=4)
    allocator = RankAllocator(model)
    state = allocator.state_dict()
    state["layer_names"] = [f"_orig_mod.{name}" for name in state["layer_names"]]
    allocator.load_state_dict(state)
    assert allocator.layer_names == [f"blocks.{i}" for i in range(3)]


def test_multihead_attention_inside_of_compiled_modules():
    base = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    base.self_attn = compiled(base.self_attn)
    model = copy.deepcopy(base)
    add_lora(model, rank=2)
    assert list(lora_layers(model)) == ["self_attn.in_proj"]
    nn.init.normal_(lora_layers(model)["self_attn.in_proj"].lora_B)
    load_lora_state_dict(base, lora_state_dict(model))
    assert torch.equal(base.eval()(X), model.eval()(X))


def test_a_compiled_lightning_module_is_not_the_model_itself(tmp_path: Path):
    module = TinyClassifier()
    add_lora(module, rank=2)
    with pytest.raises(ValueError, match="got the LightningModule TinyClassifier"):
        save_peft_adapter(compiled(module), tmp_path)
