"""The benchmarks run, cut short; what they time is not for a test to say."""

import json
from pathlib import Path

import pytest
import torch

from recipes.benchmarks import adapter_files, allocator, common, condensing, inference, training
from recipes.benchmarks.common import interleave, ratios


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every LLaMA of the benchmarks is a tiny one."""

    def tiny(**settings: object) -> object:
        return config(
            vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
        )  # fmt: skip

    config = common.LlamaConfig
    monkeypatch.setattr(common, "LlamaConfig", tiny)
    monkeypatch.setattr(allocator, "LlamaConfig", lambda **settings: tiny())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
def test_training(tmp_path: Path, capsys: pytest.CaptureFixture, precision: str):
    training.main(
        "llama-small", batch_size=2, length=8, rank=4, precision=precision, repeats=2, json=tmp_path / "out.json"
    )
    report = json.loads((tmp_path / "out.json").read_text())
    assert set(report["methods"]) == set(training.BUILDERS)
    assert "ratio to PEFT LoRA" in capsys.readouterr().out
    for result in report["methods"].values():
        assert len(result["seconds"]) == 2
        assert result["memory MiB"] > 0
    assert report["methods"]["PEFT LoRA"]["ratio to PEFT LoRA"] == [1.0, 1.0, 1.0]
    # What is kept for the backward pass does not vary: ours is no more than PEFT's.
    assert report["methods"]["La-LoRA"]["memory MiB"] <= report["methods"]["PEFT LoRA"]["memory MiB"]


def test_condensing(tmp_path: Path, capsys: pytest.CaptureFixture):
    condensing.main(repeats=2, shapes=(("llama-small", 2),), json=tmp_path / "out.json")
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert (result["projections"], result["rank"]) == (2 * 7, 2)
    # Seven matrices of 32 x 32 in each of two blocks.
    assert result["adapter MiB"] == 14 * 2 * 64 * 4 / 2**20
    assert "llama-small" in capsys.readouterr().out


def test_inference(tmp_path: Path, capsys: pytest.CaptureFixture):
    inference.main("llama-small", prompt=6, tokens=3, rank=4, repeats=2, json=tmp_path / "out.json")
    models = json.loads((tmp_path / "out.json").read_text())["models"]
    merged = {"La-LoRA merged", "La-LoRA merged, remove=True"}
    assert set(models) == {"base", "PEFT LoRA", "La-LoRA", "La-LoRA, not fused", "La-LoRA trimmed", *merged}
    assert all(len(result["inter-token latency"]) == 2 for result in models.values())
    assert models["base"]["weights MiB"] < models["La-LoRA trimmed"]["weights MiB"] < models["La-LoRA"]["weights MiB"]
    # Query and value of 2 layers of width 32: a merged model keeps a copy of them, unless the layers are removed.
    mib = {name: models[name]["weights MiB"] for name in models}
    assert mib["La-LoRA merged, remove=True"] == mib["base"]
    copies = 2 * 2 * 32 * 32 * 4 / 2**20
    assert mib["La-LoRA merged"] == pytest.approx(mib["La-LoRA"] + copies)
    assert "ratio to base" in capsys.readouterr().out


def test_allocator(tmp_path: Path, capsys: pytest.CaptureFixture):
    allocator.main(rank=2, repeats=2, json=tmp_path / "out.json")
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert "projections" in capsys.readouterr().out
    # Operations follow the number of shapes and not that of layers.
    assert len({result["operations"] for result in results if result["projections"] == 7}) == 1
    assert all(result["operations"] <= 75 for result in results)


def test_methods_share_the_frozen_weights():
    model = common.build_model("llama-small", torch.device("cpu"), torch.float32)
    weights = {p.data_ptr() for p in model.parameters()}
    for build in training.BUILDERS.values():
        built, _, _ = build(model, 4, 0.0, False)
        assert weights <= {p.data_ptr() for p in built.parameters()}
    assert not any(p.requires_grad for p in model.parameters())


def test_merging_changes_no_shared_weight():
    model = common.build_model("llama-tiny", torch.device("cpu"), torch.float32).eval()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    models = inference.build_models(model, rank=4)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    # A merged model has the function of the adapted one, with query and value of 2 layers of its own.
    texts = common.build_inputs(model, 2, 5)
    merged = models["La-LoRA merged, remove=True"]
    torch.testing.assert_close(merged(**texts).logits, models["La-LoRA"](**texts).logits)
    shared = {weight.data_ptr() for weight in model.parameters()}
    assert sum(weight.data_ptr() not in shared for weight in merged.parameters()) == 4


def test_layers_without_the_fused_kernels_compute_the_same():
    model = common.build_model("llama-tiny", torch.device("cpu"), torch.float32)
    texts = common.build_inputs(model, 2, 5)
    results = {}
    for name in ("our layers", "our layers, not fused"):
        built, _, _ = training.BUILDERS[name](model, 4, 0.0, False)
        trained = [p for p in built.parameters() if p.requires_grad]
        for seed, parameter in enumerate(trained):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(seed))
        logits = built(**texts).logits
        results[name] = [logits, *torch.autograd.grad(logits.square().mean(), trained, retain_graph=True)]
        assert ("TruncatedLoRAFunctionBackward" in _nodes(logits)) == (name == "our layers")
    torch.testing.assert_close(results["our layers"], results["our layers, not fused"])


def _nodes(output: torch.Tensor) -> set[str]:
    """Return the names of the nodes in the graph of an output."""
    found, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [following for following, _ in node.next_functions]
    return {node.name() for node in found}


def test_the_floor_can_be_compiled():
    model = common.build_model("roberta-tiny", torch.device("cpu"), torch.float32)
    floor, optimizer, after = training.build_floor(model, 4, 0.0, False)
    floor.compile(backend="eager")
    training.train_step(floor, optimizer, after, common.build_inputs(model, 2, 5), False)
    # The gradient has flowed to the first layer.
    assert floor.get_parameter("shift").abs().max() > 0


def test_interleaved_steps_take_turns():
    order = []
    seconds = interleave(
        {name: lambda name=name: order.append(name) for name in "abc"}, 3, torch.device("cpu"), warmup=1
    )
    assert [len(times) for times in seconds.values()] == [3, 3, 3]
    assert order == list("cab" + "abc" + "bca" + "cab")


def test_ratios_compare_within_a_repeat():
    relative = ratios({"a": [1.0, 20.0, 3.0], "b": [2.0, 10.0, 3.0]}, "b")
    # The quotients 0.5, 2, 1; the quartiles of three numbers are the numbers.
    assert relative["a"] == (0.5, 1.0, 2.0)
    assert relative["b"] == (1.0, 1.0, 1.0)


def test_adapter_files(capsys: pytest.CaptureFixture):
    """Query and value of 2 layers of width 32, and the other linear layers, which have 32 rows or columns, too."""
    assert adapter_files.components_parameters("llama-small", ["q_proj", "v_proj"]) == 2 * 2 * (32 + 32)
    assert adapter_files.components_parameters("llama-small", "all-linear") == 7 * 2 * (32 + 32)
    adapter_files.main(average_rank=2, highest_rank=4, padded_to=8)
    sizes = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("RoBERTa-base, query"))
    assert sizes.split()[-3:] == ["0.3", "0.6", "1.1"]
