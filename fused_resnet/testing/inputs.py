"""Well-scaled random operands for a problem, and the stock answer to it."""

from __future__ import annotations

from typing import Any

import torch

from fused_resnet import int8
from fused_resnet.numerics import DTYPES
from fused_resnet.ops import conv_bn_act as family
from fused_resnet.problem import ConvOperands, ConvProblem, Int8Operands, Int8Problem


def make(problem: ConvProblem, seed: int = 0, device: str | None = None) -> ConvOperands:
    """Random operands whose outputs have unit scale: a ReLU cuts about half of them.

    Norm vectors are fp32 beside 16-bit data; gamma takes both signs, var spans a factor of four.

    Args:
        problem: sizes, dtype and flags.
        seed: of the generator; equal seeds give equal operands on every device.
        device: where to put them; default problem.device.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[problem.dtype]
    vector = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    device = device or problem.device

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype)

    def uniform(size: int, low: float, high: float) -> torch.Tensor:
        return (torch.rand(size, generator=generator, dtype=torch.float64) * (high - low) + low).to(device, vector)

    def nhwc(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous(memory_format=torch.channels_last)

    def norm(size: int) -> list[torch.Tensor]:
        sign = torch.where(torch.rand(size, generator=generator) < 0.25, -1.0, 1.0).to(device, vector)
        return [uniform(size, 0.5, 1.5) * sign, uniform(size, -0.5, 0.5), uniform(size, -0.5, 0.5),
                uniform(size, 0.5, 2.0)]

    p = problem
    parts: dict[str, Any] = {
        "x": nhwc(normal(p.N, p.C, p.H, p.W)),
        "weight": normal(p.K, p.C // p.groups, p.R, p.S, scale=p.depth**-0.5)}
    if p.bias:
        parts["bias"] = normal(p.K, scale=0.5)
    if p.norm:
        parts |= zip(("gamma", "beta", "mean", "var"), norm(p.K), strict=True)
    if p.residual:
        parts["residual"] = nhwc(normal(*p.output_shape))
    if p.prologue:
        parts |= zip(("pre_gamma", "pre_beta", "pre_mean", "pre_var"), norm(p.C), strict=True)
    return ConvOperands(**parts)


def quantised(problem: Int8Problem, seed: int = 0) -> Int8Operands:
    """Random operands of a convolution of 8-bit values: those of `make`, in scales that cut off a few of them."""
    o = make(problem.conv._replace(dtype="fp32"), seed)
    x, r, y = int8.affine(-3.0, 3.5), int8.affine(-2.5, 3.0), int8.affine(-2.0, 4.0)
    if problem.conv.activation != "identity":
        x, y = int8.affine(0.0, 3.0), int8.affine(0.0, 4.0)  # as behind and in front of a ReLU
    residual = o.residual if problem.residual == "fp32" else None
    if problem.residual == "uint8":
        residual = int8.quantize(o.residual, r)
    given = Int8Operands(int8.quantize(o.x, x), *o[1:7], residual, o.eps, *x)
    if problem.residual == "uint8":
        given = given._replace(residual_scale=r.scale, residual_zero=r.zero)
    return given._replace(y_scale=y.scale, y_zero=y.zero) if problem.out == "uint8" else given


def arguments(problem: ConvProblem, o: ConvOperands) -> tuple:
    """Operands and settings in the order of the operator's schema."""
    return (*o[:12], o.eps, o.pre_eps, problem.activation, problem.prologue, problem.stride, problem.padding,
            problem.dilation, problem.groups)


def stock(problem: ConvProblem, o: ConvOperands, dtype: torch.dtype | None = None) -> torch.Tensor:
    """What stock operators return, in the operands' precision or in `dtype` (fp64 is the yardstick)."""
    if dtype is not None:
        wide: dict[str, Any] = {f: v.to(dtype) for f, v in o._asdict().items() if isinstance(v, torch.Tensor)}
        o = o._replace(**wide)
    with torch.no_grad():
        return family.reference(*arguments(problem, o))
