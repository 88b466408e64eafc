"""The command for a GPU, with tiny models on the CPU; what it times is not for a test to say."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from recipes.benchmarks import gpu, training


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """One shape and few repetitions, and no GPU on any machine."""
    monkeypatch.setattr(gpu, "TINY", dataclasses.replace(gpu.TINY, training=(("llama-tiny", 2, 5),), repeats=2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def records_of(path: Path) -> list[dict]:
    return json.loads(path.read_text())["records"]


def test_everything_is_measured_and_rendered(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    few = ("PEFT LoRA", "our layers", "our layers, not fused")
    monkeypatch.setitem(gpu.METHODS, "compiled", few)
    monkeypatch.setitem(gpu.METHODS, "compiled, alone", ("PEFT AdaLoRA",))
    output = tmp_path / "new" / "out.json"
    gpu.main(output, tiny=True)
    tables = capsys.readouterr().out
    records = records_of(output)
    assert {record["status"] for record in records} == {"measured"}
    steps = {
        mode: [r for r in records if (r["quantity"], r["mode"]) == ("training step", mode)] for mode in gpu.METHODS
    }
    assert [r["method"] for r in steps["eager"]] == list(gpu.METHODS["eager"])
    assert set(gpu.METHODS["eager"]) == set(training.BUILDERS)
    assert [r["method"] for r in steps["compiled"]] == list(few)
    assert [(r["method"], r["ratios"]) for r in steps["compiled, alone"]] == [("PEFT AdaLoRA", {})]
    for mode in ("eager", "compiled"):
        by_method = {r["method"]: r for r in steps[mode]}
        assert [by_method[name]["fused"] for name in few] == [None, True, False]
        for record in steps[mode]:
            lower, median, upper = record["milliseconds"]
            assert lower <= median <= upper
            assert record["number"] == 2
            assert record["memory MiB"] > 0
            assert set(record["ratios"]) == {"PEFT LoRA", "our layers"}
        assert by_method["PEFT LoRA"]["ratios"]["PEFT LoRA"] == [1, 1, 1]
        assert by_method["our layers"]["ratios"]["our layers"] == [1, 1, 1]
    others = {(r["quantity"], r["shape"], r["method"]) for r in records if r["quantity"] != "training step"}
    assert others >= {
        ("allocator step", "llama-tiny", "RankAllocator.step"),
        ("allocator step", "llama-70b", "RankAllocator.step"),
        ("condensing", "llama-tiny", "condense_lora"),
        *(
            (f"{token} token", "llama-tiny", method)
            for token in ("first", "later")
            for method in ("base", "PEFT LoRA", "La-LoRA", "La-LoRA, not fused", "La-LoRA merged, remove=True")
        ),
    }
    gpu.main(render=output)
    assert capsys.readouterr().out == tables


def test_a_method_that_fails_is_recorded_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*args: object) -> training.Built:
        raise torch.OutOfMemoryError("no memory\nat all")

    monkeypatch.setitem(training.BUILDERS, "PEFT DoRA", fail)
    monkeypatch.setattr(gpu, "parts", lambda sizes, all_parts=gpu.parts: all_parts(sizes)[:1])
    with pytest.raises(SystemExit, match="1 failed"):
        gpu.main(tmp_path / "out.json", tiny=True)
    records = {r["method"]: r for r in records_of(tmp_path / "out.json") if r["quantity"] == "training step"}
    assert [name for name, record in records.items() if record["status"] != "measured"] == ["PEFT DoRA"]
    assert records["PEFT DoRA"]["status"] == "failed"
    assert records["PEFT DoRA"]["reason"] == "OutOfMemoryError: no memory\nat all"
    assert set(records) == set(gpu.METHODS["eager"])


def test_what_was_measured_before_a_failure_of_the_timing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(steps: dict, *args: object, **kwargs: object) -> dict:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(gpu, "interleave", fail)
    monkeypatch.setattr(gpu, "parts", lambda sizes, all_parts=gpu.parts: all_parts(sizes)[:1])
    with pytest.raises(SystemExit, match="1 failed"):
        gpu.main(tmp_path / "out.json", tiny=True)
    *kept, failed = records_of(tmp_path / "out.json")
    assert {record["method"] for record in kept} == set(gpu.METHODS["eager"])
    assert {record["status"] for record in kept} == {"not timed"}
    assert all(record["first step seconds"] > 0 and "memory MiB" in record for record in kept)
    assert failed["status"] == "failed"


def test_a_stopped_run_keeps_its_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def measured(run: gpu.Run) -> None:
        run.add_series(
            {"quantity": "a"}, {"PEFT LoRA": [0.001, 0.002, 0.003], "b": [0.002, 0.002, 0.006]}, ["PEFT LoRA"]
        )

    def stopped(run: gpu.Run) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "parts", lambda sizes: [gpu.Part({}, measured), gpu.Part({}, stopped)])
    with pytest.raises(KeyboardInterrupt):
        gpu.main(tmp_path / "out.json", tiny=True)
    _, record = records_of(tmp_path / "out.json")
    assert (record["method"], record["number"]) == ("b", 3)
    assert record["milliseconds"] == pytest.approx([2, 2, 6])
    # 2 / 1, 2 / 2 and 6 / 3.
    assert record["ratios"]["PEFT LoRA"] == pytest.approx([1, 2, 2])


def test_what_there_is_no_time_for_is_recorded_as_skipped(tmp_path: Path, capsys: pytest.CaptureFixture):
    gpu.main(tmp_path / "out.json", tiny=True, minutes=0)
    records = records_of(tmp_path / "out.json")
    assert len(records) == len(gpu.parts(gpu.TINY))
    assert {(r["status"], r["reason"]) for r in records} == {("skipped", "the time of 0 minutes was over")}
    assert "| condensing |  |  |  |  | skipped | the time of 0 minutes was over |" in capsys.readouterr().out


def test_what_there_is_no_memory_for_is_recorded_as_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "machine", lambda device: "a small GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7.5 * 2**30, 8 * 2**30))
    run = gpu.Run(tmp_path / "out.json", torch.device("cuda"), gpu.FULL, minutes=1)
    done = []
    for part in gpu.parts(gpu.FULL):
        run.attempt(part.labels, lambda: done.append(1), part.needed_gib)
    assert [r["shape"] for r in run.report["records"] if r["quantity"] == "training step"] == ["llama-7b"] * 3
    assert {r["reason"] for r in run.report["records"]} == {"needs 20 GiB, 7.5 GiB are free"}
    # The training steps of the two small models in three modes, the allocator, and condensing.
    assert len(done) == 8


def test_without_a_gpu_only_tiny_models_are_measured(tmp_path: Path):
    with pytest.raises(SystemExit, match=r"Expected a GPU .* use --tiny true"):
        gpu.main(tmp_path / "out.json")
    with pytest.raises(SystemExit, match="one of --output and --render"):
        gpu.main()
    assert not list(tmp_path.iterdir())


def test_the_tables_of_a_report(tmp_path: Path, capsys: pytest.CaptureFixture):
    step = {"quantity": "training step", "shape": "vit-base", "size": "32 images"}
    ours = {
        **step,
        "mode": "eager",
        "method": "our layers",
        "fused": True,
        "status": "measured",
        "milliseconds": [10.0, 11.5, 12.0],
        "number": 30,
        "ratios": {"PEFT LoRA": [0.9, 0.95, 1.0]},
        "memory MiB": 1234.5,
        "first step seconds": 2.25,
    }
    compiled = {key: ours[key] for key in ours if key not in ("memory MiB", "first step seconds")}
    report = {
        "machine": {"device": "a GPU, torch 2", "driver": "1.2"},
        "settings": {"memory": "peak MiB"},
        "records": [
            ours,
            {**compiled, "mode": "compiled", "ratios": {}},
            {**step, "mode": "compiled", "method": "PEFT DoRA", "status": "failed", "reason": "Error: a | b\nc"},
        ],
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    gpu.main(render=tmp_path / "report.json")
    assert capsys.readouterr().out == (
        "device a GPU, torch 2, driver 1.2.\n"
        "\n"
        "Training step, eager:\n"
        "\n"
        "| shape | method | ms | ratio to PEFT LoRA | peak MiB | first step, s |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| vit-base, 32 images | our layers | 11.500 (10.000 to 12.000) | 0.950 (0.900 to 1.000) | 1,234.5 | 2.2 |\n"
        "\n"
        "Training step, compiled:\n"
        "\n"
        "| shape | method | ms |\n"
        "| --- | --- | --- |\n"
        "| vit-base, 32 images | our layers | 11.500 (10.000 to 12.000) |\n"
        "\n"
        "Not measured:\n"
        "\n"
        "| quantity | shape | size | mode | method | status | reason |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        "| training step | vit-base | 32 images | compiled | PEFT DoRA | failed | Error: a &#124; b c |\n"
    )
