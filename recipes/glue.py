"""Fine-tune RoBERTa-base on a GLUE task with La-LoRA (Table 5 of the paper).

    python -m recipes.glue --data.task mrpc
    python -m recipes.glue --data.task cola --method lora --model.name FOLDER --data.path FOLDER

The settings are in configs/glue.yaml and, for each task, configs/glue.<task>.yaml. --help lists all options.
"""

from lalora_lightning.data.glue import GlueDataModule
from lalora_lightning.modules.sequence_classification import SequenceClassificationModule
from recipes.cli import run

if __name__ == "__main__":
    run(
        SequenceClassificationModule,
        GlueDataModule,
        "glue",
        links=[("data.num_labels", "model.num_labels", "instantiate"), ("model.name", "data.tokenizer", "parse")],
        variants=("data.task", "mrpc"),
    )
