"""conv + BN + activation + max-pool in the native library's `_stem`: the convolution's output is never stored."""

from __future__ import annotations

import torch

from fused_resnet.kernels import raw
from fused_resnet.kernels.cuda.conv_bn_act import DTYPES, HALVES
from fused_resnet.kernels.cuda.native import FOLDED, capability, needs_finite, weight_in, widened
from fused_resnet.problem import ConvOperands, ConvProblem

CHANNELS, FILTERS = 4, 64  # of a packed pixel, of a block
SHARED = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448}  # bytes that a block may ask for

def refuse(problem: ConvProblem) -> str | None:
    """Why this kernel cannot run `problem`, or None."""
    if problem.dtype not in DTYPES:
        return f"computes {', '.join(DTYPES)}, not {problem.dtype}"
    if problem.C > CHANNELS:
        return f"takes images of up to {CHANNELS} channels, not {problem.C}"
    if reason := raw.refuse("cuda", "stem", problem.device):
        return reason
    needed, there = shared(problem), SHARED.get(capability(), SHARED[80])
    return f"its windows take {needed} bytes of shared memory, a block has {there}" if needed > there else None


def shared(p: ConvProblem) -> int:
    """Bytes of shared memory of a block, as csrc/cuda/stem.cuh plans them: weights, window, sums, norm, offsets."""
    half, cells = p.dtype in HALVES, p.R * p.S
    size, rows, pixels = (2, 15, 256) if half else (4, 7, 128)
    taps = -(-cells // 4) * 4 if half else cells
    pitch = taps + 2 if half else taps | 1
    window = ((rows - 1) * p.stride[0] + p.R) * (16 * p.stride[1] + p.S)
    parts = (FILTERS * pitch * CHANNELS * size, window * CHANNELS * size, pixels * (FILTERS * size + 16), FILTERS * 12,
             taps * 4)
    return sum(-(-part // 16) * 16 for part in parts)


def forward(problem: ConvProblem, o: ConvOperands) -> torch.Tensor:
    """The pooled map in x's dtype and channels_last memory; x in any strides, vectors in any float dtype."""
    o = widened(o, ("bias", "gamma", "beta", "mean", "var"))
    return torch.ops.fused_resnet._stem.default(
        o.x, weight_in(o.x.dtype, o.weight), *o[2:7], o.eps, problem.activation, problem.stride, problem.padding)


__all__ = ["FOLDED", "forward", "needs_finite", "refuse"]
