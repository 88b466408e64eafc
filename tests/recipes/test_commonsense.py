"""The commonsense recipe as a user runs it, cut short."""

import json
from pathlib import Path

import pytest
import torch

from tests.data.test_commonsense import build_model, rows, write
from tests.recipes.test_recipes import recipe


def test_commonsense_on_local_folders(tmp_path: Path):
    model = build_model(tmp_path / "model")
    data = write(tmp_path / "data", train=24, boolq=rows(5), piqa=rows(3, "solution1/solution2"))
    out = recipe(
        "commonsense",
        f"--model.name={model}",
        f"--data.path={data}",
        "--data.val_rows=4",
        "--data.num_workers=0",
        "--lalora.rank=4",
        "--trainer.max_epochs=2",
        "--trainer.accelerator=cpu",
        cwd=tmp_path,
    ).stdout
    folder = tmp_path / "lightning_logs" / "version_0"
    report = json.loads((folder / "report.json").read_text())
    assert report["test/boolq"] * 5 == pytest.approx(round(report["test/boolq"] * 5))
    assert report["test/piqa"] * 3 == pytest.approx(round(report["test/piqa"] * 3))
    assert report["test/average"] == pytest.approx((report["test/boolq"] + report["test/piqa"]) / 2)
    # 2 layers of rank 4: query, key and value 32 to 32, up 32 to 48 and down 48 to 32.
    assert report["trainable parameters"] == 2 * 4 * (3 * 64 + 2 * 80)
    assert len(report["ranks"]) == 2
    for name in ("test/boolq", "test/piqa", "test/average"):
        assert name in out
    # The pretrained weights are of half precision, the adapter's are not, and the checkpoint is the adapter's alone.
    adapter = torch.load(folder / "adapter.pt", weights_only=True)
    assert adapter["model.model.layers.1.mlp.up_proj.lora_B"].shape == (48, 4)
    assert adapter["model.model.layers.1.mlp.up_proj.lora_B"].dtype == torch.float32
    checkpoints = list((folder / "checkpoints").glob("*.ckpt"))
    assert checkpoints
    for checkpoint in checkpoints:
        assert len(torch.load(checkpoint, weights_only=True)["state_dict"]) == 10 * 4
