"""The recipes as a user runs them, cut short."""

import contextlib
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.data.test_image import write


def recipe(name: str, *arguments: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess:
    """Run it as ``python -m`` would, here, where its imports are done already."""
    module = f"recipes.{name}"
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [module, *arguments])
        for silencer in ("recipes.cli.quiet", "recipes.console.quiet"):
            # It would go on for the tests that follow.
            patch.setattr(silencer, lambda: None)
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
    assert not check or code == 0, err.getvalue()
    return subprocess.CompletedProcess([module, *arguments], code, out.getvalue(), err.getvalue())


def recipe_offline(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run it as a user without a network does, in a process of its own, which reads that at its start."""
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-m", f"recipes.{name}", *arguments],
        capture_output=True,
        encoding="utf-8",
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(root), "HF_HOME": str(cwd / "hub"), "HF_HUB_OFFLINE": "1"},
    )


def test_digits(tmp_path: Path):
    out = recipe("digits", "--seeds", "2", "--steps", "10", cwd=tmp_path).stdout
    rows = {line[:42].strip(): line.split() for line in out[out.index("---") :].splitlines()[1:7]}
    parameters = [next(cell for cell in row[::-1] if "." not in cell and cell != "+-") for row in rows.values()]
    # One rank costs 6 * 2 * (48 + 48) parameters on query and value, and 6 * (6 * 48 + 2 * 48 + 2 * 144) on all layers.
    assert [parameters[i] for i in (0, 1, 3)] == ["0", "9,216", "8,064"]
    assert int(parameters[5].replace(",", "")) <= 8064
    folder = tmp_path / "runs" / "digits" / "lalora" / "seed-1"
    assert (folder / "ranks.png").stat().st_size > 10_000
    assert torch.load(folder / "adapter.pt", weights_only=True)["model.blocks.0.attn.qkv.lora_A"].shape == (16, 48)
    assert list((folder / "tensorboard").glob("events*"))
    assert "rank/budget" in (folder / "csv" / "metrics.csv").read_text()


TINY = (
    "--model.name=vit_tiny_patch16_224",
    "--model.pretrained=false",
    '--model.model_args={"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}',
    "--data.image_size=16",
    "--data.batch_size=4",
    "--data.num_workers=0",
    "--trainer.accelerator=cpu",
)


def test_vit_cifar100_on_a_local_folder(tmp_path: Path):
    data = write(tmp_path / "data", train=20, test=6)
    out = recipe(
        "vit_cifar100", f"--data.path={data}", *TINY, "--trainer.max_epochs=2", "--lalora.rank=4", cwd=tmp_path
    ).stdout
    folder = tmp_path / "lightning_logs" / "version_0"
    report = json.loads((folder / "report.json").read_text())
    assert report["test/accuracy"] in [i / 6 for i in range(7)] or report["test/accuracy"] == pytest.approx(
        round(report["test/accuracy"] * 6) / 6
    )
    # 2 layers, query and value, rank 4: 4 * 4 * (32 + 32), and the head's 32 * 2 + 2.
    assert report["trainable parameters"] == 1090
    assert len(report["ranks"]) == 2
    assert "test/accuracy" in out
    assert torch.load(folder / "adapter.pt", weights_only=True)["model.blocks.0.attn.qkv.lora_A"].shape == (8, 32)


def test_another_method_with_settings_of_its_own(tmp_path: Path):
    data = write(tmp_path / "data", train=20, test=6)
    arguments = [f"--data.path={data}", *TINY, "--trainer.max_epochs=1"]
    recipe("vit_cifar100", *arguments, "--method=pfeiffer:bottleneck=4", cwd=tmp_path)
    report = json.loads((tmp_path / "lightning_logs" / "version_0" / "report.json").read_text())
    # 2 blocks of width 32, and the head's 32 * 2 + 2.
    assert report["trainable parameters"] == 2 * (2 * 32 * 4 + 4 + 32) + 66
    done = recipe("vit_cifar100", *arguments, "--method=prompt", cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: Method prompt does not apply to this model because")


def test_vit_cifar100_without_network_and_data(tmp_path: Path):
    done = recipe_offline("vit_cifar100", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "\nerror: Cannot load the data set 'uoft-cs/cifar100'" in f"\n{done.stderr}"
    assert "--data.path" in done.stderr.strip().splitlines()[-1]


def test_vit_cifar100_without_network_and_weights(tmp_path: Path):
    data = write(tmp_path / "data", train=20, test=6)
    done = recipe_offline("vit_cifar100", f"--data.path={data}", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "--model.checkpoint" in done.stderr.strip().splitlines()[-1]


def test_vit_cifar100_shows_its_settings(tmp_path: Path):
    config = recipe("vit_cifar100", "--print_config", "--lalora.gamma=4", cwd=tmp_path).stdout
    for line in ("name: vit_base_patch16_224.augreg_in21k", "path: uoft-cs/cifar100", "gamma: 4.0", "rank: 8"):
        assert line in config
    assert "--lalora.average_rank" in recipe("vit_cifar100", "--help", cwd=tmp_path).stdout


def test_an_interrupted_run_leaves_a_checkpoint_to_go_on_with(tmp_path: Path):
    data = write(tmp_path / "data", train=40, test=6)
    arguments = [f"--data.path={data}", *TINY, "--lalora.rank=4", "--lalora.save_adapter_only=true"]
    root = Path(__file__).parents[2]
    running = subprocess.Popen(
        [sys.executable, "-m", "recipes.vit_cifar100", *arguments, "--trainer.max_epochs=100000"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root), "HF_HOME": str(tmp_path / "hub")},
        # Where the tests run in the background, they and what they start would ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    last = tmp_path / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"
    while not last.exists() and running.poll() is None:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=600)
    assert running.returncode == 1
    assert f"--ckpt_path {last}" in errors
    checkpoint = torch.load(last, weights_only=True)
    assert checkpoint["global_step"] > 0

    # Two more would be one where Ctrl-C came between the counts of an epoch.
    epochs = checkpoint["epoch"] + 3
    out = recipe(
        "vit_cifar100", *arguments, f"--ckpt_path={last}", f"--trainer.max_epochs={epochs}", cwd=tmp_path
    ).stdout
    assert "test/accuracy" in out
    resumed = torch.load(tmp_path / "lightning_logs" / "version_1" / "checkpoints" / "last.ckpt", weights_only=True)
    assert resumed["global_step"] > checkpoint["global_step"]
