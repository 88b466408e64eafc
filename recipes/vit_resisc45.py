"""ViT-B/16 on RESISC45 by La-LoRA (the paper's Table 8).

    python -m recipes.vit_resisc45
    python -m recipes.vit_resisc45 --model.name vit_large_patch16_224.augreg_in21k
    python -m recipes.vit_resisc45 --data.path FOLDER --model.checkpoint FILE --trainer.max_epochs 3

The settings are in vit.yaml and vit_resisc45.yaml; --help lists all there are, --print_config shows those in force.
"""

from recipes.vit import run_vit

if __name__ == "__main__":
    run_vit(__file__)
