"""What the recipes for vision transformers share."""

from pathlib import Path

from lalora_lightning.data.image import ImageDataModule
from lalora_lightning.modules.image_classification import ImageClassificationModule
from recipes.cli import run


def run_vit(recipe: str) -> None:
    """Run the recipe at this path by the settings in ``vit.yaml`` and in the YAML file of its own name."""
    links = [("data.num_classes", "model.num_classes", "instantiate")]
    run(ImageClassificationModule, ImageDataModule, recipe, links, shared=Path(__file__).with_suffix(".yaml"))
