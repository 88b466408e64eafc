from pathlib import Path

import pytest
import torch

from recipes.comparison.tasks import TaskSettings
from recipes.digits import new_model


@pytest.fixture
def settings(tmp_path: Path) -> TaskSettings:
    """Three steps on the digits, with a backbone that was not pretrained."""
    state = new_model(1e-3).state_dict()
    (tmp_path / "cache").mkdir()
    backbone = {name: value for name, value in state.items() if not name.startswith("model.head.")}
    torch.save(backbone, tmp_path / "cache" / "digits.pt")
    return TaskSettings(steps=3, batch_size=16, cache=tmp_path / "cache")
