"""A model whose norms were replaced converts: each of them is the composite op rms_norm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from convert_cases import ATTRIBUTES, calls, composite_graphs, text
from replace_cases import MODELS, MORE_MODELS, Gemma, PerHead, inputs, make
from torch import Tensor, nn

from coreai_torch import replace_rms_norm
from coreai_torch.composite_ops import RMSNorm
from coreai_torch.conversion import convert, load


class Block(nn.Module):
    """Two kinds of norms: one adds 1 to its weight, one has a weight per head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head_norm = Gemma(), PerHead()
        self.linear = nn.Linear(32, 128)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.head_norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.linear(self.norm(x)).unflatten(-1, (4, 32)).transpose(1, 2)
        return self.head_norm(heads)


def to_coreai(model: nn.Module, x: Tensor):
    return convert(model.eval(), (x,), input_names=["x"], output_names=["y"])


def test_an_offset_is_added_outside_of_the_op(tmp_path):
    """So that the op has the scale, 1 + weight, as an input."""
    model, x = Block(), torch.randn(2, 6, 32)
    expected = model(x)
    replace_rms_norm(model)
    program = to_coreai(model, x)
    graphs = composite_graphs(program)
    assert len(graphs) == 2
    assert calls(program) == 2
    for graph in graphs:
        assert 'composite_declaration<"rms_norm" = {input_names = ["input", "scale"]' in graph
        assert ATTRIBUTES in graph
    program.save_asset(tmp_path / "model.aimodel")
    with load(tmp_path / "model.aimodel") as run:
        torch.testing.assert_close(run(x=x)["y"], expected, rtol=1e-5, atol=1e-5)


def test_the_program_is_that_of_our_own_norm():
    """Where the norm has no offset and takes the same dtype everywhere."""

    class Model(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)

    theirs = Model(nn.RMSNorm(32, eps=1e-6))
    replace_rms_norm(theirs)
    x = torch.randn(4, 32)
    assert text(to_coreai(theirs, x)) == text(to_coreai(Model(RMSNorm(32, 1e-6)), x))


class Logits(nn.Module):
    """A model of transformers with tokens in and logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        options = {"decoder_input_ids": tokens} if self.model.config.is_encoder_decoder else {}
        return self.model(input_ids=tokens, use_cache=False, **options).logits


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "OLMo2", "Phi-3", "T5"],
)
def test_models_of_transformers(name, tmp_path: Path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    model = make(name)
    count = len(replace_rms_norm(model).replaced)
    assert count == (MODELS | MORE_MODELS)[name][-1]
    tokens = inputs()["input_ids"]
    logits = Logits(model).eval()
    program = convert(logits, (tokens,), input_names=["tokens"], output_names=["logits"])
    assert calls(program, "rms_norm") == count
    program.save_asset(tmp_path / "model.aimodel")
    with load(tmp_path / "model.aimodel") as run:
        converted = run(tokens=tokens)["logits"]
    torch.testing.assert_close(converted, logits(tokens), rtol=1e-4, atol=1e-5)
