from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from lalora_lightning import LaLoraCallback, lora_layers
from lalora_lightning.modules.image_classification import ImageClassificationModule
from tests.helpers.training import new_trainer

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def build(**arguments: object) -> ImageClassificationModule:
    return ImageClassificationModule(
        "vit_tiny_patch16_224", **{"num_classes": 3, "pretrained": False, "model_args": TINY, **arguments}
    )


def test_learns_to_tell_colors_apart_with_the_callback(tmp_path: Path):
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


def test_images_are_normalized_as_the_weights_expect():
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


def test_weights_that_cannot_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(FileNotFoundError, match=r"`checkpoint` to be a file of weights but .*none.bin is not a file"):
        build(checkpoint=str(tmp_path / "none.bin"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"Cannot load the pretrained weights of vit_tiny.*`checkpoint`"):
        build(pretrained=True)


def test_a_transformers_model_from_a_local_folder(tmp_path: Path):
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    source = ViTForImageClassification(config).eval()
    source.save_pretrained(tmp_path)
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.5, 0.25]).save_pretrained(tmp_path)
    module = ImageClassificationModule(str(tmp_path), num_classes=5, gradient_checkpointing=True)
    assert module.model.classifier.out_features == 5
    images = torch.rand(2, 3, 16, 16)
    normalized = (images - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.5, 0.25]).view(3, 1, 1)
    with torch.no_grad():
        expected = module.model(normalized).logits
        torch.testing.assert_close(module(images), expected)
    data = DataLoader(TensorDataset(torch.rand(8, 3, 16, 16), torch.arange(8) % 5), batch_size=4)
    new_trainer(tmp_path, LaLoraCallback(rank=4), max_epochs=1).fit(module, data)
    assert all(layer.lora_B.any() for layer in lora_layers(module).values())
