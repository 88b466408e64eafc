"""``disable_adapters``: the base model for a while, in one thread."""

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lalora_lightning import add_lora, disable_adapters, lora_layers, merge_lora
from tests.helpers import families
from tests.helpers.families import run
from tests.helpers.models import TinyTransformer

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


def adapted_pair(build: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A plain model and an adapted one whose adapters do something."""
    plain = build().eval()
    model = copy.deepcopy(plain)
    add_lora(model, rank=4, target_modules="all-linear", modules_to_save=[])
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.2)
    return plain, model


@pytest.mark.parametrize("build", [families.llama, families.gpt2, families.timm_vit])
def test_the_model_without_its_adapters_is_the_base_model(build: Callable[[], nn.Module]):
    plain, model = adapted_pair(build)
    before = run(model)
    with disable_adapters(model):
        torch.testing.assert_close(run(model), run(plain), atol=0, rtol=0)
    torch.testing.assert_close(run(model), before, atol=0, rtol=0)
    assert (before - run(plain)).abs().max() > 0.01


@pytest.mark.parametrize("training", [True, False])
def test_an_attention_that_reads_weights(training: bool):
    plain = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = copy.deepcopy(plain)
    add_lora(model, rank=2, target_modules="all-linear", modules_to_save=[])
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B)
    plain.train(training)
    model.train(training)
    with disable_adapters(model):
        torch.testing.assert_close(model(X), plain(X))
    assert (model(X) - plain(X)).abs().max() > 0.01


def test_it_can_be_nested_and_ends_with_an_error():
    plain, model = adapted_pair(TinyTransformer)
    on, off = model(X), plain(X)
    with disable_adapters(model):
        with disable_adapters(model):
            assert torch.equal(model(X), off)
        assert torch.equal(model(X), off)
        # A part of the model.
        with disable_adapters(model.blocks[0]):
            pass
        assert torch.equal(model(X), off)
    assert torch.equal(model(X), on)

    def fail() -> None:
        with disable_adapters(model):
            raise KeyError("anything")

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(model(X), on)


def test_other_threads_and_copies_are_not_affected():
    plain, model = adapted_pair(TinyTransformer)
    on, off = model(X), plain(X)
    outputs: dict[str, list[Tensor]] = {"policy": [], "reference": []}
    barrier = threading.Barrier(3)

    def policy() -> None:
        for _ in range(20):
            barrier.wait()
            outputs["policy"].append(model(X))

    def reference() -> None:
        for _ in range(20):
            barrier.wait()
            with disable_adapters(model):
                outputs["reference"].append(model(X))

    threads = [threading.Thread(target=target) for target in (policy, reference, reference)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(output, on) for output in outputs["policy"])
    assert all(torch.equal(output, off) for output in outputs["reference"])
    assert (len(outputs["policy"]), len(outputs["reference"])) == (20, 40)

    with disable_adapters(model):
        assert torch.equal(copy.deepcopy(model)(X), on)
    twin = copy.deepcopy(model)
    with disable_adapters(twin):
        assert torch.equal(model(X), on)


def test_a_compiled_model_is_not_compiled_again_when_it_is_switched():
    torch._dynamo.reset()
    plain, model = adapted_pair(TinyTransformer)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for _ in range(4):
            torch.testing.assert_close(compiled(X), model(X))
            with disable_adapters(model):
                torch.testing.assert_close(compiled(X), plain(X))
    assert len(graphs) == 2


def test_preference_optimization_with_the_reference_from_the_same_weights():
    """DPO's loss (Rafailov et al., arXiv 2305.18290, Eq. 7) and its gradients equal those with a copy as reference."""
    plain, model = adapted_pair(families.llama)
    chosen, rejected = torch.randint(50, (2, 2, 6), generator=torch.Generator().manual_seed(2))

    def log_probability(policy: nn.Module, tokens: Tensor) -> Tensor:
        logits = policy(tokens).logits[:, :-1].log_softmax(-1)
        return logits.gather(-1, tokens[:, 1:, None]).sum((1, 2))

    def loss(reference: Callable[[Tensor], Tensor]) -> Tensor:
        margins = [log_probability(model, tokens) - reference(tokens) for tokens in (chosen, rejected)]
        return -nn.functional.logsigmoid(0.1 * (margins[0] - margins[1])).mean()

    def by_switching(tokens: Tensor) -> Tensor:
        with disable_adapters(model), torch.no_grad():
            return log_probability(model, tokens)

    gradients = []
    for reference in (by_switching, lambda tokens: log_probability(plain, tokens).detach()):
        model.zero_grad()
        value = loss(reference)
        value.backward()
        gradients.append([value.detach(), *(layer.lora_B.grad.clone() for layer in lora_layers(model).values())])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_cannot_be_switched_off_is_refused(model: TinyTransformer, adapted: TinyTransformer):
    with pytest.raises(ValueError, match="LoRA layers but it has none"), disable_adapters(TinyTransformer()):
        pass
    merge_lora(adapted)
    with pytest.raises(RuntimeError, match="unmerged adapters"), disable_adapters(adapted):
        pass
