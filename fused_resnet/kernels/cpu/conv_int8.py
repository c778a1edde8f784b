"""conv_int8 on the native library: products of uint8 and int8 in 32-bit integers (VNNI where the processor has it)."""

from __future__ import annotations

import torch

from fused_resnet import int8, tape
from fused_resnet.kernels import raw
from fused_resnet.kernels.folding import fold, sources
from fused_resnet.kernels.packing import packed
from fused_resnet.kernels.raw import needs_finite
from fused_resnet.problem import ConvOperands, Int8Operands, Int8Problem

FOLDED = False
LIMITS = {"identity": (-float("inf"), float("inf")), "relu": (0.0, float("inf")), "relu6": (0.0, 6.0)}


def refuse(problem: Int8Problem) -> str | None:
    """Why the native library cannot run `problem`, or None."""
    return raw.refuse("cpu", "conv_int8", problem.device)


def forward(problem: Int8Problem, o: Int8Operands) -> torch.Tensor:
    """One launch. Returns NotImplemented where folded weights are not finite."""
    weights = ConvOperands(o.x, o.weight, o.bias, o.gamma, o.beta, o.mean, o.var, eps=o.eps)
    p = problem.conv
    # in steps of the result: what clamps needs no second multiplication
    inverse = 1.0 / o.y_scale if problem.out == "uint8" else 1.0
    numbers = (o.x_scale * inverse, inverse, o.x_zero, p.dilation[1])
    pack = packed(("int8", numbers, o.eps), sources(weights), lambda: _pack(weights, *numbers))
    if pack is None:
        return NotImplemented
    low, high = LIMITS[p.activation]
    return tape.conv_int8(o.x, pack, o.residual, (p.K, p.R, p.S), p.stride, p.padding, p.dilation,
                          o.residual_scale * inverse, (o.residual_zero, o.y_zero), (low * inverse, high * inverse),
                          problem.out == "uint8")


def _pack(o: ConvOperands, scale_by: float, shift_by: float, x_zero: int, dilation_w: int) -> torch.Tensor | None:
    with torch.inference_mode(False), torch.no_grad():
        weight, shift = fold(o, torch.float32)
        if shift is None:
            shift = weight.new_zeros(weight.shape[0])
        if not bool(torch.isfinite(weight).all() & torch.isfinite(shift).all()):
            return None
        quantised, scale = int8.by_filter(weight)
        return torch.ops.fused_resnet._conv_int8_pack.default(
            quantised.contiguous(), scale * scale_by, shift * shift_by, dilation_w, x_zero)


__all__ = ["FOLDED", "forward", "needs_finite", "refuse"]
