"""ViT-B/16 on Oxford Flowers-102 by La-LoRA (the paper's Table 8).

    python -m recipes.vit_flowers102
    python -m recipes.vit_flowers102 --model.name vit_large_patch16_224.augreg_in21k
    python -m recipes.vit_flowers102 --data.path FOLDER --model.checkpoint FILE --trainer.max_epochs 3

The settings are in vit.yaml and vit_flowers102.yaml; --help lists all there are, --print_config shows those in force.
"""

from recipes.vit import run_vit

if __name__ == "__main__":
    run_vit(__file__)
