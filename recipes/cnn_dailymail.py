"""Fine-tune T5-small on CNN/DailyMail with La-LoRA (Table 7 of the paper).

    python -m recipes.cnn_dailymail
    python -m recipes.cnn_dailymail --lalora.rank 4 --model.name FOLDER --data.path FOLDER
    python -m recipes.cnn_dailymail --data.path FOLDER --data.source_column dialogue --data.target_column summary

The settings are in configs/cnn_dailymail.yaml. --help lists all options, --print_config prints their current values.
"""

from lalora_lightning.data.summarization import SummarizationDataModule
from lalora_lightning.modules.seq2seq import Seq2SeqModule
from recipes.cli import run

if __name__ == "__main__":
    run(
        Seq2SeqModule,
        SummarizationDataModule,
        "cnn_dailymail",
        links=[
            ("model.name", "data.tokenizer", "parse"),
            ("data.max_target_length", "model.max_new_tokens", "parse"),
        ],
    )
