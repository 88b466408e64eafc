from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

from lalora_lightning import LaLoraCallback, lora_layers
from lalora_lightning.modules.image_classification import ImageClassificationModule
from tests.test_callback import new_trainer

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def build(**arguments: object) -> ImageClassificationModule:
    return ImageClassificationModule(
        "vit_tiny_patch16_224", **{"num_classes": 3, "pretrained": False, "model_args": TINY, **arguments}
    )


def test_learns_to_tell_colours_apart_with_the_callback(tmp_path: Path):
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    images = torch.rand(60, 3, 16, 16) / 2
    images[torch.arange(60), labels] += 0.5
    data = DataLoader(TensorDataset(images, labels), batch_size=20)
    module = build(learning_rate=0.02)
    trainer = new_trainer(tmp_path, LaLoraCallback(rank=4), max_epochs=15)
    trainer.fit(module, data, data)
    (scores,) = trainer.test(module, data, verbose=False)
    assert len(lora_layers(module)) == 2
    assert scores["test/accuracy"] == 1.0
    assert trainer.callback_metrics["test/accuracy"] == 1.0


def test_images_are_standardised_as_the_weights_expect():
    module = build()
    assert module.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(module(images), module.model((images - 0.5) / 0.5))
    assert build(model_args={**TINY, "in_chans": 1}).mean.shape == (1, 1, 1)


def test_weights_come_from_a_local_file_with_a_new_head(tmp_path: Path):
    source = build(num_classes=7)
    save_file(source.model.state_dict(), tmp_path / "weights.safetensors")
    module = build(checkpoint=str(tmp_path / "weights.safetensors"))
    assert torch.equal(module.model.blocks[1].attn.qkv.weight, source.model.blocks[1].attn.qkv.weight)
    assert module.model.head.out_features == 3


def test_weights_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(FileNotFoundError, match=r"--model.checkpoint to name a file of weights but .*none.bin is none"):
        build(checkpoint=str(tmp_path / "none.bin"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"Cannot load the pretrained weights of vit_tiny.*--model.checkpoint"):
        build(pretrained=True)
