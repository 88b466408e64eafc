import os
from collections.abc import Iterator

# The suite runs in two processes; threads of their own, also of what they start, would only get in each other's way.
os.environ["OMP_NUM_THREADS"] = "1"
# Tables and help texts are as wide as this, whatever the terminal, and what the tests start writes this encoding.
os.environ.update(COLUMNS="80", LINES="24", PYTHONIOENCODING="utf-8")

import pytest
import torch
from hypothesis import settings
from torch import nn

from lalora_lightning import TruncatedLoRALinear, add_lora
from tests.helpers.models import TinyTransformer

torch.set_num_threads(1)

# The same examples in every run, so that a run passes or fails by the code alone. To look for new ones:
# python -m pytest tests/test_malformed.py --hypothesis-profile=search
settings.register_profile("suite", derandomize=True)
settings.register_profile("search", print_blob=True)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def default_bfloat16() -> Iterator[None]:
    """A default data type of bfloat16, as after ``torch.set_default_dtype``."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


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
