"""What the kernels of the native library's CPU part share."""

from __future__ import annotations

from fused_resnet.kernels import raw
from fused_resnet.kernels.raw import needs_finite
from fused_resnet.problem import NormProblem

FOLDED = False


def refuse(problem: NormProblem) -> str | None:
    """Why the native library cannot run `problem`, or None."""
    return raw.refuse_norm("cpu", "bn_act", problem)


__all__ = ["FOLDED", "needs_finite", "refuse"]
