"""The native library's `_bn_act_grad`: dx and the shortcut's gradient in one pass."""

from __future__ import annotations

from typing import Any

import torch

from fused_resnet.kernels.cpu.native import needs_finite, refuse
from fused_resnet.problem import NormProblem

FOLDED = False


def forward(problem: NormProblem, o: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One launch.

    Args:
        problem: what is computed; `refuse(problem)` must be None.
        o: `ops.bn_act.NormOperands`; dy, x and residual are dense in channels_last memory, `means` and `r_means`
            are dense.

    Returns:
        dx and dr [N, C, H, W] in x's dtype, channels_last; dr is None without a shortcut.
    """
    norm = problem.shortcut == "norm"
    shortcut = (o.residual, o.r_gamma, o.r_mean, o.r_var) if norm else (None,) * 4
    dx, dr = torch.ops.fused_resnet._bn_act_grad.default(
        o.dy, o.mask, o.x, o.gamma, o.mean, o.var, o.eps, o.means, bool(problem.shortcut), *shortcut, o.r_eps,
        o.r_means if norm else None)
    return dx, dr if problem.shortcut else None


__all__ = ["FOLDED", "forward", "needs_finite", "refuse"]
