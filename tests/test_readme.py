"""The README's Python, run as it stands."""

import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lalora_lightning import RankAllocator
from tests.conftest import TinyTransformer
from tests.test_callback import Task

README = Path(__file__).parents[1] / "README.md"


def test_snippets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(snippets) == 4
    monkeypatch.chdir(tmp_path)
    module = Task()
    module.model = TinyTransformer(width=16)
    x = torch.randn(6, 4, 5, 16)
    names = {
        "torch": torch,
        "module": module,
        "data": DataLoader(TensorDataset(x[0], torch.arange(4) % 2), batch_size=4),
        "model": TinyTransformer(width=16),
        "batches": [(inputs, torch.arange(4) % 2) for inputs in x],
    }
    for snippet in snippets:
        exec(snippet, names)
    assert names["trainer"].global_step == 3
    assert isinstance(names["allocator"], RankAllocator)
    assert names["allocator"].steps == 6
    assert names["callback"].rank == 16
    assert (tmp_path / "adapter.pt").exists()
    # The last line trimmed the model to its ranks.
    assert names["model"].blocks[0].query.max_rank == names["allocator"].ranks[0]


def test_files_it_links_to_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
