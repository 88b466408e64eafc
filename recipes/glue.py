"""RoBERTa-base on a task of GLUE by La-LoRA (the paper's Table 5).

    python -m recipes.glue --data.task mrpc
    python -m recipes.glue --data.task cola --method lora --model.name FOLDER --data.path FOLDER

The settings are in glue.yaml and, for each task, glue.<task>.yaml; --help lists all there are.
"""

from lalora_lightning.data.glue import GlueDataModule
from lalora_lightning.modules.sequence_classification import SequenceClassificationModule
from recipes.cli import run

if __name__ == "__main__":
    run(
        SequenceClassificationModule,
        GlueDataModule,
        __file__,
        links=[("data.num_labels", "model.num_labels", "instantiate"), ("model.name", "data.tokenizer", "parse")],
        variants=("data.task", "mrpc"),
    )
