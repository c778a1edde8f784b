"""What the kernels of the native library's CUDA part share.

They read vectors in the accumulator's type, live, and images and weights from multiples of 16 bytes on. Where a model
has its norms in 16 bits, their vectors are widened once and kept while they are the same; nothing is folded.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from fused_resnet.kernels import raw
from fused_resnet.kernels.packing import packed
from fused_resnet.kernels.raw import needs_finite
from fused_resnet.problem import NormProblem

FOLDED = False
CHANNELS_LAST = torch.channels_last
MOST_CHANNELS = 2**20
BYTES = 16  # of one load
NORM_VECTORS = ("gamma", "beta", "mean", "var", "r_gamma", "r_beta", "r_mean", "r_var", "means", "r_means")


@functools.cache
def capability() -> int:
    """Of the current GPU, without the dot: 90 for Hopper."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def refuse_norm(family: str, problem: NormProblem) -> str | None:
    """Why these kernels cannot run a problem of the families `bn_act*`, or None."""
    if problem.C >= MOST_CHANNELS:
        return f"takes fewer than 2^20 channels, not {problem.C}"
    return raw.refuse_norm("cuda", family, problem)


def widened(o: Any, names: tuple[str, ...]) -> Any:
    """Operands with the vectors `names` in the accumulator's type: fp64 beside fp64 data, else fp32."""
    dtype = torch.float64 if o.x.dtype is torch.float64 else torch.float32
    given = {name: v for name in names if (v := getattr(o, name)) is not None and v.dtype is not dtype}
    if not given:
        return o
    return o._replace(**dict(zip(given, wide(tuple(given.values()), dtype), strict=True)))


def wide(vectors: tuple, dtype: torch.dtype = torch.float32) -> tuple:
    """Copies of vectors, absent ones being None, in `dtype`: kept while the vectors are the same."""
    return packed(("wide", dtype), vectors, lambda: tuple(
        [None if v is None else v.detach().to(dtype, copy=True) for v in vectors]))


def aligned(t: torch.Tensor) -> torch.Tensor:
    """`t` at a multiple of 16 bytes: a view may begin elsewhere, and is copied."""
    return t if t.data_ptr() % BYTES == 0 else t.clone(memory_format=torch.preserve_format)


def weight_in(dtype: torch.dtype, weight: torch.Tensor) -> torch.Tensor:
    """[K, C / groups, R, S] in `dtype`, dense in channels_last memory (KRSC); a copy is kept while it is the same."""
    if (weight.dtype is dtype and weight.is_contiguous(memory_format=CHANNELS_LAST)
            and weight.data_ptr() % BYTES == 0):
        return weight
    return packed(("krsc", dtype, BYTES), (weight,), lambda: torch.empty_like(
        weight, dtype=dtype, memory_format=CHANNELS_LAST).copy_(weight.detach()))


__all__ = ["FOLDED", "aligned", "capability", "needs_finite", "refuse_norm", "weight_in", "wide", "widened"]
