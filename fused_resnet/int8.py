"""How real numbers become 8 bits: affine for activations, symmetric by channel for weights.

    q = clamp(round(r / scale) + zero, 0, 255)      r ~ (q - zero) * scale           activations, one scale a tensor
    q = clamp(round(w / scale[k]), -127, 127)       w ~ q * scale[k]                 weights, one scale a filter

Source: Jacob et al., arXiv:1712.05877, section 2.1; weights by channel and symmetric: Krishnamoorthi, arXiv:1806.08342,
section 3.1. Rounding is to the nearest, ties to even. Zero is always a value, so that zero padding is exact.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

SMALLEST = 2.0**-100  # a scale below is that of a tensor of zeros


class Affine(NamedTuple):
    """The scale and the zero point of a tensor in uint8."""

    scale: float
    zero: int


def affine(low: float, high: float) -> Affine:
    """The finest scale whose 256 values cover [low, high] and zero.

    Raises:
        ValueError: a bound is not finite, or low > high.
    """
    if not (math.isfinite(low) and math.isfinite(high)) or low > high:
        raise ValueError(f"a range to quantise must be finite, got [{low}, {high}]")
    low, high = min(low, 0.0), max(high, 0.0)
    # in fp32, as kernels have it: what is quantised here and there is the same number
    scale = torch.tensor((high - low) / 255, dtype=torch.float32).item()
    return Affine(scale, round(-low / scale)) if scale > SMALLEST else Affine(1.0, 0)


def quantize(x: torch.Tensor, to: Affine) -> torch.Tensor:
    """x as uint8, images in channels_last memory; NaN becomes 0, as the least of all values."""
    steps = torch.round(x * (1.0 / to.scale)).nan_to_num_(-math.inf, math.inf, -math.inf)
    return steps.add_(to.zero).clamp_(0, 255).to(
        torch.uint8, memory_format=torch.channels_last if x.dim() == 4 else torch.preserve_format)


def dequantize(q: torch.Tensor, of: Affine) -> torch.Tensor:
    """The numbers that `q` stands for, in fp32."""
    return (q.to(torch.float32) - of.zero) * of.scale


def by_filter(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises finite weights.

    Args:
        weight: [K, C, R, S] in fp32, with the norm folded in.

    Returns:
        int8 [K, C, R, S] and the scales, fp32 [K]. A filter of zeros has the scale 1.
    """
    scale = weight.flatten(1).abs().amax(1) / 127 if weight.numel() else weight.new_zeros(weight.shape[0])
    scale = torch.where(scale > SMALLEST, scale, 1.0)
    return torch.round(weight / scale[:, None, None, None]).clamp_(-127, 127).to(torch.int8), scale
