"""conv + BN + residual + activation on oneDNN: `mkldnn::_convolution_pointwise`, the op Inductor emits.

The norm is folded into weights that are reordered once into oneDNN's blocked format, so that no call
does it again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fused_resnet.kernels.folding import fold, sources
from fused_resnet.kernels.packing import packed
from fused_resnet.problem import ConvOperands, ConvProblem

# activation -> (oneDNN name, scalars) after a plain convolution
_UNARY: dict[str, tuple[str, list[float]]] = {
    "identity": ("none", []), "relu": ("relu", []), "relu6": ("hardtanh", [0.0, 6.0]), "silu": ("swish", []),
    "hardswish": ("hardswish", [])}
_BINARY = {"relu": "relu"}  # after the residual add; other activations follow in place

# activation in place, for what follows a sum that oneDNN has no such activation for
ACTIVATE = {"identity": lambda x: x, "relu": torch.relu_, "relu6": lambda x: F.relu6(x, True),
            "silu": lambda x: F.silu(x, True), "hardswish": lambda x: F.hardswish(x, True)}


def refuse(problem: ConvProblem) -> str | None:
    """Why oneDNN cannot run `problem`, or None."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return "this build of PyTorch has no oneDNN, or it is switched off"
    if problem.dtype == "fp64":
        return "oneDNN has no fp64 convolution"
    if problem.dtype == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU has no bf16 that oneDNN uses (needs AVX-512 or AVX-NE-CONVERT)"
    if problem.dtype == "fp16" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return "this CPU has no fp16 that oneDNN uses (needs AVX512-FP16 or AVX-NE-CONVERT)"
    return None


def needs_finite(problem: ConvProblem) -> bool:
    """oneDNN clips with max(x, 0), which turns NaN into 0: such problems need finite operands."""
    return problem.activation in ("relu", "relu6")


def forward(problem: ConvProblem, o: ConvOperands, x: torch.Tensor) -> torch.Tensor:
    """One launch on x, what the prologue made of `o.x`; NotImplemented where folded weights are not finite."""
    pack = packed(("onednn", x.dtype, problem.stride, problem.padding, problem.dilation, o.eps), sources(o),
                  lambda: _pack(problem, o))
    if pack is None:
        return NotImplemented
    weight, bias = pack
    if problem.residual:
        return _added(problem, o, x, weight, bias)
    name, scalars = _UNARY[problem.activation]
    return torch.ops.mkldnn._convolution_pointwise.default(
        x, weight, bias, problem.padding, problem.stride, problem.dilation, problem.groups, name, scalars, "")


def _added(problem: ConvProblem, o: ConvOperands, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
           ) -> torch.Tensor:
    """The convolution and its residual in one launch, and an activation that oneDNN has none of after a sum."""
    relu = _BINARY.get(problem.activation)
    if o.reuse:  # a sum into the residual: 0.77x the time of a third buffer at 56x56, batch 8
        out = torch.ops.mkldnn._convolution_pointwise_.binary(
            o.residual, x, weight, bias, problem.padding, problem.stride, problem.dilation, problem.groups,
            "add", 1.0, relu, [], "")
    else:
        out = torch.ops.mkldnn._convolution_pointwise.binary(
            x, o.residual, weight, bias, problem.padding, problem.stride, problem.dilation, problem.groups,
            "add", None, relu, [], "")
    return ACTIVATE["identity" if relu else problem.activation](out)


def _pack(problem: ConvProblem, o: ConvOperands) -> tuple | None:
    with torch.inference_mode(False), torch.no_grad():
        weight, bias = fold(o, o.x.dtype)
        if not all(bool(torch.isfinite(t).all()) for t in (weight, bias) if t is not None):
            return None
        blocked = torch.ops.mkldnn._reorder_convolution_weight(
            weight.contiguous(), problem.padding, problem.stride, problem.dilation, problem.groups,
            list(o.x.shape))  # one format serves every batch and image size (measured)
        return blocked, bias
