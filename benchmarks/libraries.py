"""Adapters for other libraries, all of which run on CUDA cards only."""

from __future__ import annotations

from torch import Tensor

from .cases import EPS, Case
from .providers import PROVIDERS, Provider, Subject, composed, loaded


def liger(case: Case, scale: Tensor) -> Subject | None:
    """Rounding as in Llama, which is the reference's; the upstream gradient is left as it is."""
    options = (EPS, 0.0, "llama", False)
    if scale.ndim > 1:
        return None
    if case.op == "add_rms_norm":
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        apply = LigerFusedAddRMSNormFunction.apply
        return Subject(lambda x, residual: apply(x, residual, scale, *options), scale)
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return Subject(lambda x: LigerRMSNormFunction.apply(x, scale, *options), scale)


def quack(case: Case, scale: Tensor) -> Subject | None:
    from quack import rmsnorm

    if scale.ndim > 1:
        return None
    if case.op == "add_rms_norm":
        return Subject(lambda x, r: rmsnorm(x, scale, residual=r, eps=EPS, prenorm=True), scale)
    return Subject(lambda x: rmsnorm(x, scale, eps=EPS), scale)


def apex(case: Case, scale: Tensor) -> Subject | None:
    from apex.normalization.fused_layer_norm import FusedRMSNormAffineMixedDtypesFunction

    if scale.ndim > 1:
        return None
    shape = (case.shape[-1],)
    apply = FusedRMSNormAffineMixedDtypesFunction.apply
    return composed(lambda x: apply(x, scale, shape, EPS), case, scale)


def transformer_engine(case: Case, scale: Tensor) -> Subject | None:
    from transformer_engine.pytorch import RMSNorm

    if scale.ndim > 1:
        return None
    module = RMSNorm(case.shape[-1], eps=EPS, device=scale.device, dtype=scale.dtype)
    return composed(loaded(module, scale), case, module.weight)


def flashinfer(case: Case, scale: Tensor) -> Subject | None:
    """Forward only; its fused addition overwrites its inputs and is not compared."""
    from flashinfer.norm import rmsnorm

    if scale.ndim > 1 or case.op != "rms_norm":
        return None
    weight = scale.detach()
    return Subject(lambda x: rmsnorm(x, weight, EPS), scale, backward=False)


PROVIDERS |= {
    provider.name: provider
    for provider in (
        Provider("liger", liger, "liger_kernel", True, "Liger Kernel (Triton)"),
        Provider("quack", quack, "quack", True, "QuACK (CuTe DSL)"),
        Provider("apex", apex, "apex.normalization", True, "NVIDIA apex, fused norm"),
        Provider(
            "te", transformer_engine, "transformer_engine.pytorch", True, "Transformer Engine"
        ),
        Provider("flashinfer", flashinfer, "flashinfer", True, "FlashInfer (forward only)"),
    )
}
