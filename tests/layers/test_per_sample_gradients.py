"""The gradients of each sample that the documentation computes for Opacus, which is not needed here."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from lalora_lightning import TruncatedLoRALinear

PAGE = Path(__file__).parents[2] / "docs" / "interoperability.md"
Sampler = Callable[[TruncatedLoRALinear, list[Tensor], Tensor], dict[nn.Parameter, Tensor]]


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch) -> Sampler:
    """The function of the documentation."""
    functions = {}
    opacus = ModuleType("opacus.grad_sample")
    opacus.register_grad_sampler = lambda kind: lambda function: functions.setdefault(kind, function)
    opacus.GradSampleModule = lambda model, strict: model
    monkeypatch.setitem(sys.modules, "opacus", ModuleType("opacus"))
    monkeypatch.setitem(sys.modules, "opacus.grad_sample", opacus)
    (code,) = re.findall(r"```python\n([^`]*register_grad_sampler[^`]*)```", PAGE.read_text(encoding="utf-8"))
    exec(code, {"model": None})
    return functions[TruncatedLoRALinear]


@pytest.mark.parametrize("shape", [(4, 6), (4, 5, 6), (4, 2, 5, 6)])
@pytest.mark.parametrize("settings", [{}, {"out_slices": [(0, 3), (5, 8)]}, {"freeze_A": True}, {"init": "pissa"}])
def test_they_are_those_of_one_sample_at_a_time(sampler: Sampler, shape: tuple[int, ...], settings: dict):
    layer = TruncatedLoRALinear(nn.Linear(6, 8).requires_grad_(False), rank=3, alpha=6.0, **settings)
    nn.init.normal_(layer.lora_B)
    layer.set_rank(2)
    x = torch.randn(shape)
    g = torch.randn(*shape[:-1], 8)
    factors = [p for p in layer.parameters() if p.requires_grad]
    grads = sampler(layer, [x], g)
    assert set(grads) == set(factors)
    for i in range(len(x)):
        for factor, grad in zip(factors, torch.autograd.grad(layer(x[i]), factors, g[i]), strict=True):
            torch.testing.assert_close(grads[factor][i], grad)


def test_dropout_is_refused(sampler: Sampler):
    layer = TruncatedLoRALinear(nn.Linear(6, 8), rank=3, dropout=0.1)
    with pytest.raises(ValueError, match="without dropout"):
        sampler(layer, [torch.randn(4, 6)], torch.randn(4, 8))
