"""Files that lalora-lightning 0.1.0 wrote still load; see tests/fixtures/0.1.0/README.md."""

import json
from pathlib import Path

import pytest
import torch

from lalora_lightning import LaLoraCallback, add_lora, load_lora_state_dict, load_peft_adapter, lora_layers
from lalora_lightning.runs import read_run
from tests.helpers.models import TinyTransformer
from tests.helpers.training import TinyClassifier, loader, new_trainer

WRITTEN = Path(__file__).parents[1] / "fixtures" / "0.1.0"
EXPECTED = json.loads((WRITTEN / "expected.json").read_text())
X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


def new_model() -> TinyTransformer:
    torch.manual_seed(0)
    return TinyTransformer()


def same_logits(model: TinyTransformer, run: str) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(X), torch.tensor(EXPECTED[run]["logits"]))


@pytest.mark.parametrize("file", ["adapter.pt", "trainer.ckpt"])
@pytest.mark.parametrize("adapted", [True, False])
def test_a_state_goes_into_an_adapted_and_into_a_plain_model(file: str, adapted: bool):
    model = new_model()
    if adapted:
        add_lora(model, rank=4)
    load_lora_state_dict(model, WRITTEN / file)
    same_logits(model, "trainer")
    ranks = [int(block.query.rank) for block in model.blocks]
    assert ranks == EXPECTED["trainer"]["ranks"]


@pytest.mark.parametrize("folder", ["peft", "peft_uniform"])
def test_an_adapter_in_pefts_format(folder: str):
    model = new_model()
    load_peft_adapter(model, WRITTEN / folder)
    same_logits(model, "trainer")


def test_a_state_with_initial_factors():
    model = new_model()
    load_lora_state_dict(model, WRITTEN / "pissa.pt")
    same_logits(model, "pissa")
    assert [int(layer.rank) for layer in lora_layers(model).values()] == EXPECTED["pissa"]["ranks"]


def test_a_run_continues_from_a_checkpoint_as_if_it_had_never_stopped(tmp_path: Path):
    torch.manual_seed(0)
    module, callback = TinyClassifier(), LaLoraCallback(rank=4, gamma=20.0)
    new_trainer(tmp_path, callback, max_epochs=3).fit(module, loader(), ckpt_path=WRITTEN / "trainer.ckpt")
    uninterrupted = EXPECTED["resumed"]
    same_logits(module.model, "resumed")
    assert callback.allocator.ranks.tolist() == uninterrupted["ranks"]
    assert callback.allocator.budget.item() == pytest.approx(uninterrupted["budget"])
    assert [[step, ranks] for step, ranks, _ in callback.history] == [
        [step, ranks] for step, ranks, _ in uninterrupted["history"]
    ]


def test_a_checkpoint_is_reported_on():
    run = read_run(WRITTEN / "trainer.ckpt")
    assert list(run.ranks[-1]) == EXPECTED["trainer"]["ranks"]
    assert run.steps[-1] == 14
