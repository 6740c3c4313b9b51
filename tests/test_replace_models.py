"""Models of `transformers`, small, with random weights, with and without their norms replaced."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import names
from replace_cases import MODELS, MORE_MODELS, inputs, make
from torch import Tensor, nn

from coreai_torch import replace_rms_norm, restore_rms_norm
from coreai_torch.composite_ops import RMSNormImpl

pytest.importorskip("transformers", reason="transformers is not installed")

EVERY_MODEL = pytest.mark.parametrize("name", MODELS)


def with_and_without(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    model = make(name, dtype)
    fused = copy.deepcopy(model)
    report = replace_rms_norm(fused)
    expected = (MODELS | MORE_MODELS)[name][-1]
    assert len(report.replaced) == expected
    assert sum(isinstance(m, RMSNormImpl) for m in fused.modules()) == expected
    return fused, model


def gradients(model: nn.Module) -> Tensor:
    """Of the loss, in one vector."""
    model.zero_grad()
    model(**inputs()).loss.backward()
    return torch.cat([p.grad.flatten().float() for p in model.parameters()])


@contextmanager
def recorded_ops() -> Iterator[set[str]]:
    found: set[str] = set()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield found
    found.update(event.key for event in profile.key_averages())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=names)
@EVERY_MODEL
def test_logits_loss_and_gradients(name, dtype):
    """Logits to the bit. Gradients differ by rounding; in bfloat16, where that is much, they are as
    close to those of the same weights in float32."""
    fused, model = with_and_without(name, dtype)
    with torch.no_grad(), recorded_ops() as ops:
        ours = fused(**inputs())
    with torch.no_grad():
        theirs = model(**inputs())
    assert "coreai_torch::fused_rms_norm" in ops
    assert not any("rsqrt" in op for op in ops)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)
    ours, theirs = gradients(fused), gradients(model)
    exact = gradients(copy.deepcopy(model).float())
    if dtype == torch.float32:
        assert (ours - theirs).norm() < 2e-6 * theirs.norm()
    else:
        assert (ours - exact).norm() < 1.02 * (theirs - exact).norm()


@EVERY_MODEL
def test_training(name):
    """Replaced after two steps, with the same optimizer."""

    def losses(replace: bool) -> list[float]:
        model = make(name).train()
        found = []
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(6):
            if replace and step == 2:
                replace_rms_norm(model)
            loss = model(**inputs()).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    expected = losses(replace=False)
    assert expected[-1] < expected[0]
    assert losses(replace=True) == pytest.approx(expected, rel=1e-4)


@EVERY_MODEL
def test_generation_with_a_cache(name):
    fused, model = with_and_without(name)
    options = {"max_new_tokens": 8, "do_sample": False, "use_cache": True, "eos_token_id": None}
    prompt = {"input_ids": inputs()["input_ids"]}
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    expected = model.generate(**prompt, **options)
    assert torch.equal(fused.generate(**prompt, **options), expected)


@EVERY_MODEL
def test_saved_and_loaded(name, tmp_path):
    """What is saved is the same model, which loads with its own norms; replaced or not."""
    fused, model = with_and_without(name)
    fused.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not any(isinstance(m, RMSNormImpl) for m in loaded.modules())
    expected = model(**inputs()).logits
    assert torch.equal(loaded(**inputs()).logits, expected)
    replace_rms_norm(loaded)
    assert torch.equal(loaded(**inputs()).logits, expected)


@EVERY_MODEL
def test_gradient_checkpointing(name):
    fused, _ = with_and_without(name)
    fused.train()
    expected = gradients(fused)
    fused.gradient_checkpointing_enable()
    assert (gradients(fused) - expected).norm() < 1e-6 * expected.norm()


@EVERY_MODEL
def test_autocast(name):
    """The dtypes within the model are what they were: it runs, and to the same accuracy."""
    fused, model = with_and_without(name)
    exact = model(**inputs()).logits
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = fused(**inputs()).logits, model(**inputs()).logits
    assert ours.dtype == theirs.dtype
    assert (ours - exact).norm() < 1.1 * (theirs - exact).norm()


@pytest.mark.slow
@EVERY_MODEL
def test_compiled(name):
    """One graph, with one fused op for each norm."""
    torch._dynamo.reset()
    fused, model = with_and_without(name)
    calls: list[str] = []

    def count(graph: torch.fx.GraphModule, args: list[Any]) -> Any:
        calls.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, args)

    compiled = torch.compile(fused, fullgraph=True, backend=count)
    logits = compiled(**inputs(), use_cache=False).logits
    expected = model(**inputs()).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert calls.count("coreai_torch.fused_rms_norm.default") == MODELS[name][-1]
    logits.square().mean().backward()
    expected.square().mean().backward()
    for ours, theirs in zip(fused.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "Gemma3"])
def test_compiled_by_inductor(name):
    torch._dynamo.reset()
    fused, model = with_and_without(name)
    compiled = torch.compile(fused)
    torch.testing.assert_close(
        compiled(**inputs()).logits, model(**inputs()).logits, rtol=1e-4, atol=1e-5
    )


@EVERY_MODEL
def test_initialized_anew(name):
    """transformers looks for norms by the names of their classes, to set their weights."""
    fused, model = with_and_without(name)
    for each in (fused, model):
        torch.manual_seed(0)
        each.init_weights()
    assert torch.equal(fused(**inputs()).logits, model(**inputs()).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=names)
@pytest.mark.parametrize("name", MORE_MODELS)
def test_more_models(name, dtype):
    fused, model = with_and_without(name, dtype)
    expected = model(**inputs()).logits
    assert torch.equal(fused(**inputs()).logits, expected)
    restored = restore_rms_norm(fused)
    assert len(restored) == MORE_MODELS[name][-1]
    assert [type(m) for m in fused.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(fused(**inputs()).logits, expected)


def test_what_is_left_in_qwen3_next():
    """A norm with a gate is not this op."""
    report = replace_rms_norm(make("Qwen3-Next"), dry_run=True)
    (path,) = report.skipped
    assert path == "model.layers.0.linear_attn.norm"
    assert "gate" in report.skipped[path]
