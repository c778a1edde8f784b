"""conv + BN + activation + max-pool in the native library's `_stem`: the convolution's output is never stored."""

from __future__ import annotations

import torch

from fused_resnet.kernels import raw
from fused_resnet.kernels.cuda.conv_bn_act import DTYPES
from fused_resnet.kernels.cuda.native import FOLDED, needs_finite, weight_in, widened
from fused_resnet.problem import ConvOperands, ConvProblem


def refuse(problem: ConvProblem) -> str | None:
    """Why this kernel cannot run `problem`, or None."""
    if problem.dtype not in DTYPES:
        return f"computes {' and '.join(DTYPES)}, not {problem.dtype}"
    return raw.refuse("cuda", "stem", problem.device)


def forward(problem: ConvProblem, o: ConvOperands) -> torch.Tensor:
    """The pooled map in x's dtype and channels_last memory; x in any strides, vectors in any float dtype."""
    o = widened(o, ("bias", "gamma", "beta", "mean", "var"))
    return torch.ops.fused_resnet._stem.default(
        o.x, weight_in(o.x.dtype, o.weight), *o[2:7], o.eps, problem.activation, problem.stride, problem.padding)


__all__ = ["FOLDED", "forward", "needs_finite", "refuse"]
