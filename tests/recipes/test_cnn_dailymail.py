import json
from pathlib import Path

import torch

from tests.data.test_summarization import write
from tests.modules.test_seq2seq import save_t5
from tests.recipes.test_recipes import recipe


def test_cnn_dailymail_on_a_local_folder_of_other_columns(tmp_path: Path):
    model = save_t5(tmp_path / "model", width=16)
    data = write(
        tmp_path / "data", dialogue=["the cat sat on the mat", "a dog ran"] * 4, summary=["cat sat", "dog"] * 4
    )
    out = recipe(
        "cnn_dailymail",
        f"--model.name={model}",
        f"--data.path={data}",
        "--data.source_column=dialogue",
        "--data.target_column=summary",
        "--data.batch_size=4",
        "--data.max_target_length=5",
        "--data.num_workers=0",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=2",
        "--lalora.rank=4",
        cwd=tmp_path,
    ).stdout
    folder = tmp_path / "lightning_logs" / "version_0"
    report = json.loads((folder / "report.json").read_text())
    assert all(0 <= report[f"test/{key}"] <= 100 for key in ("rouge1", "rouge2", "rougeL"))
    assert "test/rougeL" in out
    # 2 blocks of one attention and 2 of two, query and value, rank 4: 12 * 4 * (16 + 16).
    assert report["trainable parameters"] == 1536
    assert len(report["ranks"]) == 4
    adapter = torch.load(folder / "adapter.pt", weights_only=True)
    assert adapter["model.decoder.block.1.layer.1.EncDecAttention.q.lora_A"].shape == (4, 16)
    assert "max_new_tokens: 5" in (folder / "hparams.yaml").read_text()
