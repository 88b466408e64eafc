"""ViT-B/16 on CIFAR-100 by La-LoRA (the paper's Table 8).

    python -m recipes.vit_cifar100
    python -m recipes.vit_cifar100 --data.path FOLDER --model.checkpoint FILE --trainer.max_epochs 3 --lalora.gamma 4

The settings are in vit_cifar100.yaml; --help lists all there are, --print_config shows those in force.
"""

from lalora_lightning.data.image import ImageDataModule
from lalora_lightning.modules.image_classification import ImageClassificationModule
from recipes.cli import run

if __name__ == "__main__":
    run(
        ImageClassificationModule,
        ImageDataModule,
        __file__,
        links=[("data.num_classes", "model.num_classes", "instantiate")],
    )
