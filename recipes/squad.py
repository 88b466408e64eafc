"""Fine-tune DeBERTa-v3-base on SQuAD 1.1 or 2.0 with La-LoRA (Table 6 of the paper).

    python -m recipes.squad
    python -m recipes.squad --data.version 2.0 --method lora --model.name FOLDER --data.path FOLDER

The settings are in configs/squad.yaml and, for each version, configs/squad.<version>.yaml. --help lists all options.
"""

from lalora_lightning.data.squad import SquadDataModule
from lalora_lightning.modules.question_answering import QuestionAnsweringModule
from recipes.cli import run

if __name__ == "__main__":
    run(
        QuestionAnsweringModule,
        SquadDataModule,
        "squad",
        links=[("data.no_answer", "model.no_answer", "instantiate"), ("model.name", "data.tokenizer", "parse")],
        variants=("data.version", "1.1"),
    )
