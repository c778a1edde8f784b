"""y = act(norm(x) + shortcut) and one bit an element in one pass, by the native library's `_bn_act`."""

from __future__ import annotations

from typing import Any

import torch

from fused_resnet.kernels import raw
from fused_resnet.kernels.cuda.native import FOLDED, NORM_VECTORS, needs_finite, refuse_norm, widened
from fused_resnet.problem import NormProblem


def refuse(problem: NormProblem) -> str | None:
    """Why this kernel cannot run `problem`, or None."""
    return refuse_norm("bn_act", problem)


def forward(problem: NormProblem, o: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(y, mask) as `kernels.raw.bn_act` describes them; vectors in any float dtype."""
    return raw.bn_act(problem, widened(o, NORM_VECTORS))


__all__ = ["FOLDED", "forward", "needs_finite", "refuse"]
