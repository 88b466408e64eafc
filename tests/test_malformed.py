"""Whatever is given, there is a clear error and nothing has changed, or what was asked for is what happened."""

import copy
import functools
import json
import math
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save_file
from torch import Tensor

from lalora_lightning import (
    LaLoraCallback,
    RankAllocator,
    add_lora,
    load_lora_state_dict,
    load_peft_adapter,
    lora_layers,
    lora_state_dict,
    save_peft_adapter,
)
from tests.helpers.models import TinyTransformer

NUMBERS = st.one_of(
    st.integers(-3, 12), st.floats(-3.0, 12.0), st.sampled_from([math.nan, math.inf, -math.inf, 1e30, -0.0])
)
# What may stand in a state in place of anything.
VALUES = st.one_of(
    NUMBERS,
    st.none(),
    st.text(max_size=3),
    st.lists(st.integers(0, 9), max_size=4),
    st.builds(
        lambda shape, dtype, fill: torch.full(shape, fill).to(dtype),
        st.lists(st.integers(0, 5), max_size=3),
        st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64]),
        st.floats(-2.0, 9.0),
    ),
)
JSON = st.one_of(NUMBERS, st.none(), st.booleans(), st.text(max_size=3), st.lists(st.integers(0, 9), max_size=4))
many = functools.partial(settings, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def build(adapted: bool) -> TinyTransformer:
    torch.manual_seed(0)
    model = TinyTransformer(depth=2)
    if adapted:
        add_lora(model, rank=4)
    return model


def trained() -> TinyTransformer:
    model = build(adapted=True)
    for i, layer in enumerate(lora_layers(model).values()):
        torch.nn.init.normal_(layer.lora_B)
        layer.set_rank(1 + i)
    return model


def unchanged(model: TinyTransformer, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


@st.composite
def mutated(draw: st.DrawFn, state: dict[Any, Any]) -> dict[Any, Any]:
    """A state with one to three entries taken out, renamed, replaced or added."""
    state = dict(state)
    for _ in range(draw(st.integers(1, min(3, len(state))))):
        key = draw(st.sampled_from(list(state)))
        what = draw(st.sampled_from(["drop", "rename", "value", "shape", "add"]))
        if what == "drop":
            del state[key]
        elif what == "rename":
            state[draw(st.sampled_from(["", "x", f"{key}.x", f"blocks.7.{key}", 3]))] = state.pop(key)
        elif what == "shape" and isinstance(state[key], Tensor):
            reshape = draw(st.sampled_from([Tensor.flatten, lambda t: t[None], lambda t: torch.cat([t.flatten()] * 2)]))
            state[key] = reshape(state[key])
        elif what == "add":
            state[f"{key}.more"] = draw(VALUES)
        else:
            state[key] = draw(VALUES)
    return state


@many(max_examples=250)
@given(state=mutated(lora_state_dict(trained())), adapted=st.booleans())
def test_adapter_states(state: dict[str, Any], adapted: bool):
    model = build(adapted)
    before = copy.deepcopy(model.state_dict())
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        load_lora_state_dict(model, state)
    except ValueError as error:
        assert str(error).startswith(("Cannot load the adapter state: ", "Expected a state of LoRA layers"))
        assert unchanged(model, before)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    else:
        after = model.state_dict()
        assert state.keys() <= after.keys()
        for key, value in state.items():
            torch.testing.assert_close(after[key], value.to(after[key].dtype), rtol=0, atol=0, equal_nan=True)
        assert all(1 <= int(layer.rank) <= layer.max_rank for layer in lora_layers(model).values())
        model(torch.randn(2, 3, 8))


def allocator_state(contribution: str) -> dict[str, Any]:
    allocator = RankAllocator(trained(), contribution=contribution)
    allocator.observe_gradients()
    allocator.step()
    return allocator.state_dict()


@many(max_examples=150)
@given(
    state=st.one_of(mutated(allocator_state("norm")), mutated(allocator_state("fisher")), VALUES),
    contribution=st.sampled_from(["norm", "fisher"]),
)
@example(state={**allocator_state("norm"), "max_rank": torch.empty(0)}, contribution="norm")
@example(state={**allocator_state("norm"), "max_rank": torch.ones(2)}, contribution="norm")
@example(state={**allocator_state("norm"), "max_rank": torch.tensor(4)}, contribution="norm")
def test_allocator_states(state: Any, contribution: Any):
    model = trained()
    allocator = RankAllocator(model, contribution=contribution)
    before, weights = allocator.state_dict(), copy.deepcopy(model.state_dict())
    try:
        allocator.load_state_dict(state)
    except ValueError as error:
        assert str(error).startswith("Cannot load the state of the rank allocator: ")
        after = allocator.state_dict()
        assert all(torch.equal(after[key], before[key]) for key in ("ranks", "budget", "value", "skipped"))
        assert after["steps"] == 0
        assert unchanged(model, weights)
    else:
        assert allocator.ranks.tolist() == state["ranks"].tolist()
        assert float(allocator.budget) == float(state["budget"])
        allocator.observe_gradients()
        allocator.step()
        assert all(1 <= rank <= 4 for rank in allocator.ranks.tolist())
        assert 2 <= allocator.budget <= 8


def callback_with_allocator() -> LaLoraCallback:
    callback = LaLoraCallback(rank=4)
    callback.allocator = RankAllocator(trained())
    callback.history.append((0, [1, 1], 2.0))
    return callback


def mutated_inside(state: dict[str, Any], key: str) -> st.SearchStrategy[dict[str, Any]]:
    return mutated(state[key]).map(lambda part: {**state, key: part})


@many(max_examples=200)
@given(
    state=st.one_of(
        mutated(callback_with_allocator().state_dict()),
        mutated_inside(callback_with_allocator().state_dict(), "allocator"),
        mutated_inside(callback_with_allocator().state_dict(), "random"),
        VALUES,
    )
)
@example(state={**callback_with_allocator().state_dict(), "history": torch.ones(2, 3, 0)})
@example(state={**callback_with_allocator().state_dict(), "history": torch.ones(2, 3, 1)})
@example(state={**callback_with_allocator().state_dict(), "history": torch.ones(2, 3, 2)})
@example(state={**callback_with_allocator().state_dict(), "history": [[math.inf, [1, 1], 2.0]]})
@example(state={**callback_with_allocator().state_dict(), "random": {"cpu": torch.get_rng_state(), "cuda": 0}})
@example(state=torch.ones(2))
def test_callback_states(state: Any):
    callback = callback_with_allocator()
    before = callback.state_dict()
    # Before fit, a state is kept to be restored later.
    LaLoraCallback(rank=4).load_state_dict(state)
    try:
        callback.load_state_dict(state)
    except ValueError as error:
        assert str(error).startswith(("Expected", "Cannot load the state of the rank allocator"))
        after = callback.state_dict()
        assert after["history"] == before["history"]
        assert after["allocator"]["ranks"].tolist() == before["allocator"]["ranks"].tolist()
    else:
        assert callback.state_dict()["last_step"] == state["last_step"]
        assert callback.state_dict()["history"] == list(map(list, state["history"]))


@pytest.fixture(scope="module")
def adapter_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter") / "adapter.pt"
    torch.save(lora_state_dict(trained()), path)
    return path


@many(max_examples=200)
@given(data=st.data(), adapted=st.booleans())
def test_damaged_files(adapter_file: Path, data: st.DataObject, adapted: bool):
    content = bytearray(adapter_file.read_bytes())
    if data.draw(st.booleans(), "truncated"):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    damaged = adapter_file.with_name("damaged.pt")
    damaged.write_bytes(content)
    model = build(adapted)
    before = copy.deepcopy(model.state_dict())
    try:
        load_lora_state_dict(model, damaged)
    except ValueError as error:
        assert str(error).startswith(("Expected", "Cannot load the adapter state"))
        assert unchanged(model, before)
    else:
        x = torch.randn(2, 3, 8)
        assert torch.equal(model(x), trained()(x))


@pytest.mark.parametrize(
    ("signature", "offset"), [(b"PK\x01\x02", 38), (b"PK\x06\x07", 16)], ids=["entry is a directory", "many disks"]
)
def test_damage_outside_of_what_has_a_checksum(adapter_file: Path, signature: bytes, offset: int):
    content = bytearray(adapter_file.read_bytes())
    for start in [match.start() for match in re.finditer(re.escape(signature), content)]:
        changed = content.copy()
        changed[start + offset] = 16
        damaged = adapter_file.with_name("damaged.pt")
        damaged.write_bytes(changed)
        with pytest.raises(ValueError, match="to be as it was written but it is damaged"):
            load_lora_state_dict(build(adapted=False), damaged)


def peft_files() -> tuple[dict[str, Any], dict[str, Tensor]]:
    with tempfile.TemporaryDirectory() as folder:
        save_peft_adapter(trained(), folder)
        config = json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf-8"))
        return config, load(Path(folder, "adapter_model.safetensors").read_bytes())


PEFT_CONFIG, PEFT_TENSORS = peft_files()


@many(max_examples=200)
@given(
    files=st.one_of(
        st.tuples(st.one_of(mutated(PEFT_CONFIG), JSON), st.just(PEFT_TENSORS)),
        st.tuples(st.just(PEFT_CONFIG), mutated(PEFT_TENSORS)),
    )
)
@example(files=([], PEFT_TENSORS))
@example(files=({**PEFT_CONFIG, "lora_alpha": "8"}, PEFT_TENSORS))
@example(files=({**PEFT_CONFIG, "alpha_pattern": [1]}, PEFT_TENSORS))
@example(files=({**PEFT_CONFIG, "alpha_pattern": {"(": 1}}, PEFT_TENSORS))
@example(files=(PEFT_CONFIG, {key: value[:0] for key, value in PEFT_TENSORS.items()}))
@example(files=(PEFT_CONFIG, {key: value.flatten()[0] for key, value in PEFT_TENSORS.items()}))
def test_peft_folders(tmp_path_factory: pytest.TempPathFactory, files: tuple[Any, dict[Any, Any]]):
    config, tensors = files
    tensors = {str(key): value.clone() for key, value in tensors.items() if isinstance(value, Tensor)}
    folder = tmp_path_factory.getbasetemp() / "malformed"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, default=str), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors")
    model = build(adapted=False)
    before = copy.deepcopy(model.state_dict())
    try:
        load_peft_adapter(model, folder)
    except ValueError as error:
        assert str(error).startswith(("Expected", "Cannot adapt the model"))
        assert unchanged(model, before)
    else:
        assert lora_layers(model)
        model(torch.randn(2, 3, 8))


@many(max_examples=200)
@given(
    adapter=st.fixed_dictionaries({}, optional={"rank": NUMBERS, "alpha": NUMBERS, "dropout": NUMBERS}),
    arguments=st.fixed_dictionaries(
        {},
        optional={
            "gamma": NUMBERS,
            "temperature": NUMBERS,
            "average_rank": st.one_of(st.none(), NUMBERS),
            "interval": NUMBERS,
            "freeze_after": st.one_of(st.none(), NUMBERS),
            "contribution": st.sampled_from(["norm", "fisher", "letter"]),
            "contribution_scale": st.sampled_from(["relative", "absolute", ""]),
            "growth": st.sampled_from(["matched", "stored", "x"]),
            "group_by": st.sampled_from(["block", "parent", "module", "layer"]),
            "gradual_budget": st.booleans(),
            "fidelity": st.booleans(),
        },
    ),
)
def test_settings(adapter: dict[str, Any], arguments: dict[str, Any]):
    model = build(adapted=False)
    try:
        add_lora(model, **adapter)
        allocator = RankAllocator(model, **arguments)
    except ValueError as error:
        assert str(error).startswith(("Expected", "Cannot adapt"))
        return
    for _ in range(3):
        for layer in lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B)
        allocator.observe_gradients()
        allocator.step()
        assert all(1 <= rank <= allocator.max_rank for rank in allocator.ranks.tolist())
        assert allocator.min_budget <= allocator.budget <= allocator.max_budget
