"""Fine-tune ViT-B/16 on Oxford Flowers-102 with La-LoRA (Table 8 of the paper).

    python -m recipes.vit_flowers102
    python -m recipes.vit_flowers102 --model.name vit_large_patch16_224.augreg_in21k
    python -m recipes.vit_flowers102 --data.path FOLDER --model.checkpoint FILE --trainer.max_epochs 3

The settings are in configs/vit.yaml and configs/vit_flowers102.yaml. --help lists all options,
--print_config prints their current values.
"""

from lalora_lightning.data.image import ImageDataModule
from lalora_lightning.modules.image_classification import ImageClassificationModule
from recipes.cli import run

if __name__ == "__main__":
    run(
        ImageClassificationModule,
        ImageDataModule,
        "vit_flowers102",
        links=[("data.num_classes", "model.num_classes", "instantiate")],
        shared="vit",
    )
