"""DeBERTa-v3-base on SQuAD 1.1 or 2.0 by La-LoRA (the paper's Table 6).

    python -m recipes.squad
    python -m recipes.squad --data.version 2.0 --adapter lora --model.name FOLDER --data.path FOLDER

The settings are in squad.yaml and, for each version, squad.<version>.yaml; --help lists all there are.
"""

import argparse
from typing import get_args

from lalora_lightning.data.squad import SquadDataModule, Version
from lalora_lightning.modules.question_answering import QuestionAnsweringModule
from recipes.cli import run

if __name__ == "__main__":
    # Read before all others, since the other defaults depend on it.
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--data.version", dest="version", choices=get_args(Version), default="1.1")
    run(
        QuestionAnsweringModule,
        SquadDataModule,
        __file__,
        links=[("data.no_answer", "model.no_answer", "instantiate"), ("model.name", "data.tokenizer", "parse")],
        variant=first.parse_known_args()[0].version,
    )
