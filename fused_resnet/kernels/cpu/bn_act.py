"""The native library's `_bn_act`: y and its mask in one pass over x and the shortcut."""

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
        o: `ops.bn_act.NormOperands`; x and residual are dense in channels_last memory.

    Returns:
        y [N, C, H, W] in x's dtype, channels_last, and its mask, uint8 of [ceil(N * H * W * C / 8)]; None for the
        identity.
    """
    y, mask = torch.ops.fused_resnet._bn_act.default(
        o.x, o.gamma, o.beta, o.mean, o.var, o.eps, problem.activation, o.residual, o.r_gamma, o.r_beta, o.r_mean,
        o.r_var, o.r_eps)
    return y, None if problem.activation == "identity" else mask


__all__ = ["FOLDED", "forward", "needs_finite", "refuse"]
