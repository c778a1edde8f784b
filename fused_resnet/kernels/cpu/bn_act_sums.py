"""The native library's `_bn_act_sums`: strips of rows, whose sums meet in an order that only the sizes decide."""

from __future__ import annotations

from typing import Any

import torch

from fused_resnet.kernels.cpu.native import needs_finite, refuse
from fused_resnet.problem import NormProblem

FOLDED = False


def forward(problem: NormProblem, o: Any) -> torch.Tensor:
    """One launch.

    Args:
        problem: what is computed; `refuse(problem)` must be None.
        o: `ops.bn_act.NormOperands`; dy, x and residual are dense in channels_last memory.

    Returns:
        [2, C] in fp32 (fp64 for fp64), or [3, C] for a shortcut with a norm.
    """
    shortcut = (o.residual, o.r_mean, o.r_var) if problem.shortcut == "norm" else (None,) * 3
    return torch.ops.fused_resnet._bn_act_sums.default(o.dy, o.mask, o.x, o.mean, o.var, o.eps, *shortcut, o.r_eps)


__all__ = ["FOLDED", "forward", "needs_finite", "refuse"]
