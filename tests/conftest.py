import os

# The suite runs in two processes; threads of their own, also of what they start, would only get in each other's way.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from torch import nn

from lalora_lightning import TruncatedLoRALinear, add_lora
from tests.helpers.models import TinyTransformer

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def model() -> TinyTransformer:
    return TinyTransformer()


@pytest.fixture
def adapted(model: TinyTransformer) -> TinyTransformer:
    """Three layers of query and value at rank 4, with adapters that do something."""
    add_lora(model, rank=4, alpha=8.0)
    for module in model.modules():
        if isinstance(module, TruncatedLoRALinear):
            nn.init.normal_(module.lora_B, std=0.2)
    return model
