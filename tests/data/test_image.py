from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from lalora_lightning.data.image import ImageDataModule


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def image(shade: int) -> Image.Image:
    return Image.fromarray(np.full((6, 6, 3), shade, dtype=np.uint8))


def write(folder: Path, label: str = "label", **splits: int) -> Path:
    """Write parquet in the Hub's layout; image i has the shade 10 i and the label i % 2."""
    features = datasets.Features({"img": datasets.Image(), label: datasets.ClassLabel(names=["even", "odd"])})
    for split, rows in splits.items():
        data = {"img": [image(10 * i % 256) for i in range(rows)], label: [i % 2 for i in range(rows)]}
        (folder / "data").mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(data, features).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def load(folder: Path, **arguments: object) -> ImageDataModule:
    data = ImageDataModule(str(folder), **{"image_size": 8, "batch_size": 4, "num_workers": 0, **arguments})
    data.prepare_data()
    data.setup("fit")
    return data


def test_parquet_in_the_hubs_layout(tmp_path: Path):
    data = load(write(tmp_path, train=20, test=6))
    assert data.num_classes == 2
    images, labels = next(iter(data.test_dataloader()))
    assert images.shape == (4, 3, 8, 8)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images[:, 0, 0, 0], torch.tensor([0.0, 10.0, 20.0, 30.0]) / 255)
    assert labels.tolist() == [0, 1, 0, 1]
    # A tenth of the training split is held out, always the same rows.
    sizes = [len(loader.dataset) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())]
    assert sizes == [18, 2, 6]
    again = load(tmp_path)
    assert [row["label"] for row in again.val_dataloader().dataset] == [
        row["label"] for row in data.val_dataloader().dataset
    ]


def test_a_validation_split_is_used_where_there_is_one(tmp_path: Path):
    data = load(write(tmp_path, train=20, validation=5))
    assert len(data.train_dataloader().dataset) == 20
    assert len(data.val_dataloader().dataset) == len(data.test_dataloader().dataset) == 5


def test_class_folders(tmp_path: Path):
    for split, label in (("train", "cat"), ("train", "dog"), ("test", "cat"), ("test", "dog")):
        for i in range(5):
            path = tmp_path / split / label / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image(100).save(path)
    data = load(tmp_path, val_fraction=0.2)
    assert data.num_classes == 2
    assert len(data.test_dataloader().dataset) == 10
    assert sorted(torch.cat([labels for _, labels in data.test_dataloader()]).tolist()) == [0] * 5 + [1] * 5


def test_of_several_label_columns_the_one_with_most_classes(tmp_path: Path):
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "coarse_label": datasets.ClassLabel(num_classes=2),
            "fine_label": datasets.ClassLabel(num_classes=5),
        }
    )
    rows = {"img": [image(0)] * 10, "coarse_label": [0, 1] * 5, "fine_label": [0, 1, 2, 3, 4] * 2}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "train.parquet")
    assert load(tmp_path).num_classes == 5
    assert load(tmp_path, label_column="coarse_label").num_classes == 2
    with pytest.raises(FileNotFoundError, match=r"'label' as a column of class labels but its columns are img, coarse"):
        load(tmp_path, label_column="label")


def test_incomplete_folders(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"Cannot load the data set '.*empty'.*`path`"):
        load(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"Expected .* to have a train split but its splits are test"):
        load(write(tmp_path / "no-train", test=3))
    (tmp_path / "text").mkdir()
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).to_parquet(tmp_path / "text" / "train.parquet")
    with pytest.raises(FileNotFoundError, match="image column but its columns are text, label"):
        load(tmp_path / "text")


def test_no_network(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"'nobody/nothing'.*Without a network, set `path` to a local folder"):
        ImageDataModule("nobody/nothing").prepare_data()


def test_images_of_all_modes_become_rgb(tmp_path: Path):
    red = Image.new("RGB", (6, 6), (255, 0, 0))
    kinds = {"p": red.convert("P"), "rgba": red.convert("RGBA"), "l": Image.new("L", (6, 6), 51)}
    for split in ("train", "test"):
        for name, red_image in kinds.items():
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(2):
                red_image.save(tmp_path / split / name / f"{i}.png")
    images, labels = next(iter(load(tmp_path, batch_size=6, val_fraction=0.5).test_dataloader()))
    colors = dict(zip(labels.tolist(), images[:, :, 0, 0].tolist(), strict=True))
    # Sorted by name: gray, palette, with transparency.
    assert colors == {0: pytest.approx([0.2, 0.2, 0.2]), 1: [1, 0, 0], 2: [1, 0, 0]}
