"""For the tests of replacing: norms as models have them, and models of `transformers`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

DIM = 32


class Llama(nn.Module):
    """Rounds before it multiplies, in the dtype that both promote to."""

    def __init__(self, dim: int = DIM, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(hidden_states.dtype)


class Gemma(Llama):
    """The scale is 1 + weight; rounds at the end."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (wide * (1.0 + self.weight.float())).type_as(hidden_states)


class Olmo(Llama):
    """Rounds at the end."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight * wide).to(hidden_states.dtype)


class T5(Llama):
    """The result has the dtype of the weight."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.float().pow(2).mean(-1, keepdim=True)
        normalized = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        if self.weight.dtype != torch.float32:
            normalized = normalized.to(self.weight.dtype)
        return self.weight * normalized


class HardCoded(nn.Module):
    """Shows its eps nowhere, and its parameter has another name."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(DIM))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide / (wide.pow(2).mean(-1, keepdim=True) + 3e-5).sqrt()).type_as(x) * self.gain


class PerHead(nn.Module):
    """A weight per head around a norm that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(DIM, eps=1e-6, elementwise_affine=False)
        self.weight = nn.Parameter(torch.ones(4, 1, DIM))

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(x) * self.weight).type_as(x)


class L2Norm(nn.Module):
    """Without weight and without a width of its own."""

    eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x)


SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SMALL_T5 = {
    "vocab_size": 96,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}

# Class of the configuration, its arguments, class of the model, number of norms in it.
MODELS: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "Llama": ("LlamaConfig", SMALL, "LlamaForCausalLM", 5),
    "Mistral": ("MistralConfig", SMALL, "MistralForCausalLM", 5),
    "Qwen2": ("Qwen2Config", SMALL, "Qwen2ForCausalLM", 5),
    "Qwen3": ("Qwen3Config", SMALL | HEADS, "Qwen3ForCausalLM", 9),
    "Gemma2": ("Gemma2Config", SMALL | HEADS, "Gemma2ForCausalLM", 9),
    "Gemma3": ("Gemma3TextConfig", SMALL | HEADS, "Gemma3ForCausalLM", 13),
    "OLMo2": ("Olmo2Config", SMALL, "Olmo2ForCausalLM", 9),
    "Phi-3": ("Phi3Config", SMALL, "Phi3ForCausalLM", 5),
    "T5": ("T5Config", SMALL_T5, "T5ForConditionalGeneration", 12),
}
MORE_MODELS: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "Gemma": ("GemmaConfig", SMALL | HEADS, "GemmaForCausalLM", 5),
    "Mixtral": ("MixtralConfig", SMALL | {"num_local_experts": 4}, "MixtralForCausalLM", 5),
    "Qwen3-MoE": ("Qwen3MoeConfig", SMALL | HEADS | EXPERTS, "Qwen3MoeForCausalLM", 9),
    "Llama 4": (
        "Llama4TextConfig",
        SMALL | HEADS | {"num_local_experts": 4, "intermediate_size_mlp": 96},
        "Llama4ForCausalLM",
        7,
    ),
    "Qwen3-Next": (
        "Qwen3NextConfig",
        SMALL
        | HEADS
        | EXPERTS
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "shared_expert_intermediate_size": 32,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
        "Qwen3NextForCausalLM",
        7,
    ),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model, with scales that are not all the same."""
    import transformers

    config, arguments, model_class, _ = (MODELS | MORE_MODELS)[name]
    torch.manual_seed(0)
    config = getattr(transformers, config)(**arguments)
    model = getattr(transformers, model_class)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape)
    return model.to(dtype).eval()


def inputs(length: int = 12) -> dict[str, Tensor]:
    tokens = torch.randint(3, 96, (2, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "labels": tokens}
