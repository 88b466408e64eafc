"""Small models that the tests adapt."""

import torch
from torch import nn

from lalora_lightning import lora_layers


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.query(x) @ self.key(x).transpose(-1, -2) / x.shape[-1] ** 0.5
        return x + scores.softmax(-1) @ self.value(x)


class TinyTransformer(nn.Module):
    """Attention blocks, mean over the sequence, a head: (N, T, width) to (N, classes)."""

    def __init__(self, depth: int = 3, width: int = 8, classes: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention(width) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Experts(nn.Module):
    """Experts whose weights are 3-D parameters, as in transformers since version 5."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 32, 32))
        self.down_proj = nn.Parameter(torch.randn(4, 32, 16))


class MixtureOfExperts(nn.Module):
    """The modules of Qwen2-MoE by their names; with ``shared=False`` those of Mixtral. It has no forward pass."""

    def __init__(self, shared: bool = True) -> None:
        super().__init__()
        layers = []
        for _ in range(2):
            mlp = {"experts": Experts()}
            if shared:
                sizes = {"gate_proj": (32, 48), "up_proj": (32, 48), "down_proj": (48, 32)}
                mlp["shared_expert"] = nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})
                mlp["shared_expert_gate"] = nn.Linear(32, 1)
            attention = {name: nn.Linear(32, 32) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
            layers.append(nn.ModuleDict({"self_attn": nn.ModuleDict(attention), "mlp": nn.ModuleDict(mlp)}))
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(50, 32), "layers": nn.ModuleList(layers)})
        self.lm_head = nn.Linear(32, 50, bias=False)


def unchanged(model: nn.Module) -> bool:
    """Return whether nothing was adapted and nothing frozen."""
    return not lora_layers(model) and all(p.requires_grad for p in model.parameters())
