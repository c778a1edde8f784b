"""conv_int8 on the native library: products of uint8 and int8 in 32-bit integers (VNNI where the processor has it)."""

from __future__ import annotations

from typing import Any

import torch

from fused_resnet import int8
from fused_resnet.kernels import raw
from fused_resnet.kernels.folding import fold, sources
from fused_resnet.kernels.packing import packed
from fused_resnet.kernels.raw import needs_finite
from fused_resnet.problem import ConvOperands, Int8Operands, Int8Problem

FOLDED = False
LIMITS = {"identity": (-float("inf"), float("inf")), "relu": (0.0, float("inf")), "relu6": (0.0, 6.0)}


def refuse(problem: Int8Problem) -> str | None:
    """Why the native library cannot run `problem`, or None."""
    if not hasattr(torch.ops.fused_resnet, "_conv_int8"):
        return "no kernel yet"
    return raw.refuse("cpu", "conv_int8", problem.device)


def forward(problem: Int8Problem, o: Int8Operands) -> torch.Tensor:
    """One launch. Returns NotImplemented where folded weights are not finite."""
    weights = ConvOperands(o.x, o.weight, o.bias, o.gamma, o.beta, o.mean, o.var, eps=o.eps)
    p = problem.conv
    pack = packed(("int8", o.x_zero, o.eps), sources(weights), lambda: _pack(weights, o.x_zero))
    if pack is None:
        return NotImplemented
    quantised, scale, shift = pack
    # in steps of the result: a clamp needs no second multiplication
    inverse = 1.0 / o.y_scale if problem.out == "uint8" else 1.0
    low, high = LIMITS[p.activation]
    return torch.ops.fused_resnet._conv_int8.default(
        o.x, quantised, scale, shift, o.residual, o.x_scale * inverse, inverse, o.x_zero, o.residual_scale * inverse,
        o.residual_zero, o.y_zero, low * inverse, high * inverse, p.K, (p.R, p.S), p.stride, p.padding, p.dilation,
        problem.out == "uint8")


def _pack(o: ConvOperands, x_zero: int) -> tuple[Any, ...] | None:
    with torch.inference_mode(False), torch.no_grad():
        weight, shift = fold(o, torch.float32)
        if shift is None:
            shift = weight.new_zeros(weight.shape[0])
        if not bool(torch.isfinite(weight).all() & torch.isfinite(shift).all()):
            return None
        quantised, scale = int8.by_filter(weight)
        return torch.ops.fused_resnet._conv_int8_pack.default(quantised, x_zero), scale, shift


__all__ = ["FOLDED", "forward", "needs_finite", "refuse"]
