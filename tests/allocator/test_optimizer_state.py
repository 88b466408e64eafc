"""Optimizers whose state for some parameters is reset: from then on they are as if they had just been built."""

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lalora_lightning import RankAllocator, add_lora, lora_layers
from lalora_lightning.allocator import reset_optimizer_state
from tests.helpers.models import TinyTransformer

X, Y = torch.randn(8, 5, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2


def optimizer_settings() -> Iterator[Any]:
    """Every optimizer of torch, in every implementation, that can be built for dense matrices on the CPU."""
    variants: list[dict[str, Any]] = [{}]
    for name in ("foreach", "fused", "capturable", "amsgrad", "nesterov", "centered", "differentiable"):
        variants.append({name: True})
    variants += [
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "fused": True},
        {"momentum": 0.9, "centered": True, "foreach": True},
        {"amsgrad": True, "fused": True},
        {"amsgrad": True, "foreach": True},
        {"initial_accumulator_value": 0.5},
        {"initial_accumulator_value": 0.5, "fused": True},
        {"line_search_fn": "strong_wolfe"},
        {"weight_decay": 0.1},
    ]
    for name, kind in vars(torch.optim).items():
        if not inspect.isclass(kind) or not issubclass(kind, Optimizer) or kind is Optimizer:
            continue
        names = inspect.signature(kind).parameters
        for variant in variants:
            if not variant.keys() <= names.keys():
                continue
            try:
                step(kind([nn.Parameter(torch.ones(2, 2))], lr=0.01, **variant))
            except (RuntimeError, ValueError, TypeError, AssertionError):
                continue
            yield pytest.param(kind, {"lr": 0.01, **variant}, id=f"{name} {' '.join(map(str, variant.items()))}")


def step(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            p.grad = torch.full_like(p, 0.1 + i)
    # Differentiable ones change their parameters in place, within a graph.
    with torch.no_grad():
        optimizer.step(lambda: torch.tensor(1.0))


def model_and_adapters() -> tuple[nn.Module, list[nn.Parameter]]:
    torch.manual_seed(0)
    model = TinyTransformer(depth=2)
    add_lora(model, rank=4)
    # Biases are no matrices, which Muon asks for.
    model.head.bias.requires_grad_(False)
    return model, [p for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)]


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    def closure() -> Tensor:
        with torch.enable_grad():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(X), Y)
            loss.backward()
        return loss

    for _ in range(steps):
        with torch.no_grad():
            optimizer.step(closure)


SETTINGS = list(optimizer_settings())


def test_the_optimizers_of_torch_are_tried():
    kinds = {setting.values[0].__name__ for setting in SETTINGS}
    assert {"SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta"} <= kinds
    assert {"RMSprop", "Rprop", "ASGD", "Adafactor", "LBFGS"} <= kinds
    assert sum("fused" in setting.values[1] for setting in SETTINGS) >= 6


@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_the_next_step_is_the_first_of_a_new_optimizer(kind: type[Optimizer], settings: dict[str, Any]):
    model, adapters = model_and_adapters()
    head = model.head.weight
    optimizer = kind([*adapters, head], **settings)
    train(model, optimizer, 3)
    of_head = copy.deepcopy(optimizer.state.get(head, {}))
    reset_optimizer_state(optimizer, adapters)
    assert all(p.grad is None for p in adapters)
    for key, value in of_head.items():
        if kind is not LBFGS:
            assert torch.equal(torch.as_tensor(optimizer.state[head][key]), torch.as_tensor(value))

    fresh = copy.deepcopy(model)
    fresh_adapters = [p for layer in lora_layers(fresh).values() for p in (layer.lora_A, layer.lora_B)]
    train(model, optimizer, 2)
    if kind is LBFGS:
        train(fresh, kind([*fresh_adapters, fresh.head.weight], **settings), 2)
        assert torch.equal(fresh.head.weight, head)
    else:
        # The head as without a reset, in the first step; then adapters and head act on one another.
        rebuilt = kind(fresh_adapters, **settings)
        fresh_head = kind([fresh.head.weight], **settings)
        if of_head:
            fresh_head.state[fresh.head.weight] = copy.deepcopy(of_head)
        for _ in range(2):
            fresh.zero_grad()
            nn.functional.cross_entropy(fresh(X), Y).backward()
            with torch.no_grad():
                rebuilt.step()
                fresh_head.step()
        assert torch.equal(fresh.head.weight, head)
    for p, expected in zip(adapters, fresh_adapters, strict=True):
        assert torch.equal(p, expected)
    # The state can be saved and loaded.
    again = kind([*adapters, head], **settings)
    again.load_state_dict(optimizer.state_dict())
    train(model, again, 1)


def test_groups_keep_their_own_settings():
    model, adapters = model_and_adapters()
    slow, fast = adapters[:2], adapters[2:]
    groups = [
        {"params": slow, "lr_decay": 0.5, "name": "slow"},
        {"params": [*fast, model.head.weight], "lr": 0.1},
    ]
    optimizer = torch.optim.Adagrad(groups, lr=0.01, initial_accumulator_value=0.5)
    train(model, optimizer, 3)
    sums = optimizer.state[model.head.weight]["sum"].clone()
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    reset_optimizer_state(optimizer, adapters)
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == settings
    assert all((optimizer.state[p]["sum"] == 0.5).all() and optimizer.state[p]["step"] == 0 for p in adapters)
    assert torch.equal(optimizer.state[model.head.weight]["sum"], sums)
    train(model, optimizer, 1)


def test_optimizers_of_some_of_the_parameters():
    model, adapters = model_and_adapters()
    optimizer = torch.optim.Adam([model.head.weight], lr=0.01)
    train(model, optimizer, 2)
    exp_avg = optimizer.state[model.head.weight]["exp_avg"].clone()
    reset_optimizer_state(optimizer, adapters)
    assert torch.equal(optimizer.state[model.head.weight]["exp_avg"], exp_avg)
    lbfgs = torch.optim.LBFGS([model.head.weight])
    train(model, lbfgs, 1)
    reset_optimizer_state(lbfgs, adapters)
    assert lbfgs.state[model.head.weight]["n_iter"] > 0


class Foreign(Optimizer):
    """With a constructor of its own, and a state for each parameter."""

    def __init__(self, model: nn.Module, rate: float) -> None:
        super().__init__([p for p in model.parameters() if p.requires_grad], {"rate": rate})

    def step(self, closure: Callable[[], Tensor]) -> None:
        closure()
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["mean"] = 0.9 * state["mean"] + p.grad if "mean" in state else p.grad.clone()
            p.sub_(self.param_groups[0]["rate"] * state["mean"])


def test_an_optimizer_of_another_library():
    model, adapters = model_and_adapters()
    optimizer = Foreign(model, 0.01)
    train(model, optimizer, 2)
    reset_optimizer_state(optimizer, adapters)
    assert list(optimizer.state) == [model.head.weight]
    train(model, optimizer, 1)
    assert all(torch.equal(optimizer.state[p]["mean"], p.grad) for p in adapters)


@pytest.mark.parametrize("wrapper", ["lightning", "accelerate"])
def test_wrapped_optimizers(wrapper: str):
    model, adapters = model_and_adapters()
    inner = torch.optim.Adagrad([*adapters, model.head.weight], lr=0.01, initial_accumulator_value=0.25)
    train(model, inner, 2)
    if wrapper == "lightning":
        wrapped = LightningOptimizer(inner)
    else:
        accelerate = pytest.importorskip("accelerate")
        accelerate.Accelerator(cpu=True)
        wrapped = accelerate.optimizer.AcceleratedOptimizer(inner)
    reset_optimizer_state(wrapped, adapters)
    assert all((inner.state[p]["sum"] == 0.25).all() for p in adapters)
    assert (inner.state[model.head.weight]["sum"] > 0.25).any()
    train(model, inner, 1)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_a_plain_loop_condenses(kind: type[Optimizer]):
    """The optimizer of a loop goes on where a new one would begin, and the function is that of the kept components."""
    model, adapters = model_and_adapters()
    allocator = RankAllocator(model, group_by="module")
    optimizer = kind([*adapters, model.head.weight], lr=0.05)
    for _ in range(8):
        train(model, optimizer, 1)
        allocator.step()
    increments = [layer.increment().detach() for layer in lora_layers(model).values()]
    summary = allocator.condense(1.5, [optimizer])
    assert allocator.condensed
    assert allocator.ranks.tolist() == list(summary.ranks.values())
    assert sum(summary.ranks.values()) == 6
    for layer, increment in zip(lora_layers(model).values(), increments, strict=True):
        dropped = torch.linalg.svdvals(increment)[int(layer.rank) :].norm()
        torch.testing.assert_close((layer.increment() - increment).norm(), dropped, rtol=1e-4, atol=1e-6)
    before = allocator.ranks.tolist()
    for _ in range(3):
        train(model, optimizer, 1)
        allocator.step()
    assert allocator.ranks.tolist() == before
    assert [int(layer.rank) for layer in lora_layers(model).values()] == before
