"""Sums over dz and dz * xhat by the native library's `_bn_act_sums`: parts of rows, joined in a fixed order."""

from __future__ import annotations

from typing import Any

import torch

from fused_resnet.kernels import raw
from fused_resnet.kernels.cuda.native import FOLDED, NORM_VECTORS, needs_finite, refuse_norm, widened
from fused_resnet.problem import NormProblem


def refuse(problem: NormProblem) -> str | None:
    """Why this kernel cannot run `problem`, or None."""
    return refuse_norm("bn_act_sums", problem)


def forward(problem: NormProblem, o: Any) -> torch.Tensor:
    """the sums as `kernels.raw.bn_act_sums` describes them; vectors in any float dtype."""
    return raw.bn_act_sums(problem, widened(o, NORM_VECTORS))


__all__ = ["FOLDED", "forward", "needs_finite", "refuse"]
