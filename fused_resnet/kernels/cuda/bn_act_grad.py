"""dx and the shortcut's gradient in one pass, by the native library's `_bn_act_grad`."""

from __future__ import annotations

from typing import Any

import torch

from fused_resnet.kernels import raw
from fused_resnet.kernels.cuda.native import FOLDED, NORM_VECTORS, needs_finite, refuse_norm, widened
from fused_resnet.problem import NormProblem


def refuse(problem: NormProblem) -> str | None:
    """Why this kernel cannot run `problem`, or None."""
    return refuse_norm("bn_act_grad", problem)


def forward(problem: NormProblem, o: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(dx, dr) as `kernels.raw.bn_act_grad` describes them; vectors in any float dtype."""
    return raw.bn_act_grad(problem, widened(o, NORM_VECTORS))


__all__ = ["FOLDED", "forward", "needs_finite", "refuse"]
