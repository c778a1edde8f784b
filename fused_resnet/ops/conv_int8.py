"""Family `conv_int8`: conv + BN + residual + activation on quantised values (inference, on the CPU).

    sum[k] = conv(x - x_zero, q[k])                                         exact, in 32-bit integers
    z      = sum[k] * x_scale * scale[k] + shift[k] + (residual - residual_zero) * residual_scale         in fp32
    y      = act(z), or clamp(round(act(z) / y_scale) + y_zero, 0, 255)     rounded once

q [K, C, R, S] and scale [K] are the weights with the norm folded in, quantised by filter (`int8.by_filter`); shift is
what the norm and the bias add. x is uint8, padded with x_zero, which is zero; a residual may be uint8 or fp32. All
parameters are read live: whoever keeps their quantised form answers for its age. A residual in fp32 has the scale 1
and the zero 0. The activations are those that clamp: then y_scale goes into scale and shift, and the result costs one
multiplication. NaN, which only a residual in fp32 can hold, stays NaN in fp32 and is the least value in uint8.

Source: Jacob et al., arXiv:1712.05877, sections 2.2 to 2.4.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fused_resnet import backends, int8
from fused_resnet.problem import Int8Operands, Int8Problem

FAMILY = "conv_int8"
LIMITS = {"identity": (-math.inf, math.inf), "relu": (0.0, math.inf), "relu6": (0.0, 6.0)}


class NotFinite(ArithmeticError):
    """Weights or a norm hold NaN or Inf, which have no 8-bit form."""


class Epilogue(NamedTuple):
    """z = clamp(sum * scale + shift + (r - zero) * residual, low, high), in steps of y where that is uint8."""

    scale: torch.Tensor  # [K]
    shift: torch.Tensor  # [K]
    residual: float
    low: float
    high: float


def epilogue(problem: Int8Problem, o: Int8Operands, scale: torch.Tensor, shift: torch.Tensor) -> Epilogue:
    """What follows the sums.

    Args:
        problem: what is computed.
        o: of which only the numbers are read.
        scale: of the quantised weights, fp32 [K].
        shift: of the folded norm, fp32 [K].
    """
    inverse = 1.0 / o.y_scale if problem.out == "uint8" else 1.0
    low, high = LIMITS[problem.conv.activation]
    return Epilogue(scale * (o.x_scale * inverse), shift * inverse, o.residual_scale * inverse, low * inverse,
                    high * inverse)


def folded(o: Int8Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights [K, C, R, S] and the shift [K] of the convolution with its norm folded in, in fp32."""
    weight = o.weight.detach()
    shift = o.bias.detach() if o.bias is not None else weight.new_zeros(weight.shape[0])
    if o.mean is None:
        return weight, shift
    scale = torch.rsqrt(o.var.detach() + o.eps)
    if o.gamma is not None:
        scale = scale * o.gamma.detach()
    shift = (shift - o.mean.detach()) * scale
    return weight * scale[:, None, None, None], shift if o.beta is None else shift + o.beta.detach()


def reference(problem: Int8Problem, o: Int8Operands) -> torch.Tensor:
    """The formula; a sum of at most 2^53 is exact in fp64."""
    p = problem.conv
    weight, shift = folded(o)
    if not bool(torch.isfinite(weight).all() & torch.isfinite(shift).all()):
        raise NotFinite("weights, bias or norm hold NaN or Inf")
    quantised, scale = int8.by_filter(weight)
    sums = F.conv2d(o.x.double() - o.x_zero, quantised.double(), None, p.stride, p.padding, p.dilation)
    e = epilogue(problem, o, scale, shift)
    z = sums.float() * e.scale[:, None, None] + e.shift[:, None, None]
    if o.residual is not None:
        z = z + (o.residual.float() - o.residual_zero) * e.residual
    z = z.clamp(e.low, e.high)
    if problem.out == "uint8":
        z = torch.round(z.nan_to_num_(e.low, math.inf, -math.inf)).add_(o.y_zero).clamp_(0, 255).to(torch.uint8)
    return z.contiguous(memory_format=torch.channels_last)


def execute(problem: Int8Problem, operands: Int8Operands) -> torch.Tensor:
    """Chooses a kernel and launches it. Callers have checked shapes, dtypes and devices.

    Args:
        problem: what the operands pose.
        operands: x and residual are dense in channels_last memory.

    Returns:
        [N, K, P, Q], uint8 or fp32, in channels_last memory.

    Raises:
        NotFinite: a parameter is NaN or Inf.
    """
    return backends.run(FAMILY, problem, operands, finite=True)


def max_pool(x: torch.Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
             ) -> torch.Tensor:
    """torch.max_pool2d for uint8 [N, C, H, W] of any size, in channels_last memory.

    PyTorch's own keeps indices in the type of its values and refuses images of more than 255 pixels.
    """
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))  # 0 is the least value
    for d in (3, 2):
        size, step = kernel[d - 2], stride[d - 2]
        count = (x.shape[d] - size) // step + 1
        taps = [x.narrow(d, i, (count - 1) * step + 1)[(slice(None),) * d + (slice(None, None, step),)]
                for i in range(size)]
        x = taps[0]
        for other in taps[1:]:
            x = torch.maximum(x, other)
    return x.contiguous(memory_format=torch.channels_last)


backends.register(FAMILY, reference)
