"""Fine-tune LLaMA-7B on eight commonsense reasoning tasks with La-LoRA (Table 9 of the paper).

    python -m recipes.commonsense --data.test_path LLM-Adapters/dataset
    python -m recipes.commonsense --model.name meta-llama/Llama-2-7b-hf --data.path FOLDER --method lora

The model is trained on 170 thousand instructions for all tasks. It then generates an answer to every test question. The
training set comes from the Hub or from a folder with train.parquet. The test sets are files: <task>.parquet or, as in
the folder "dataset" of github.com/AGI-Edgerunners/LLM-Adapters, <task>/test.json. By default they are expected in the
subfolder "test" of --data.path. The settings are in configs/commonsense.yaml. --help lists all options.
"""

from lalora_lightning.data.commonsense import CommonsenseDataModule
from lalora_lightning.modules.causal_lm import CausalLMModule
from recipes.cli import run

if __name__ == "__main__":
    run(
        CausalLMModule,
        CommonsenseDataModule,
        "commonsense",
        links=[("data.test_tasks", "model.test_tasks", "instantiate"), ("model.name", "data.tokenizer", "parse")],
    )
