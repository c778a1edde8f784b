"""What the kernels of the native library's CPU part share."""

from __future__ import annotations

from fused_resnet import native
from fused_resnet.problem import NormProblem


def refuse(problem: NormProblem) -> str | None:
    """Why the native library cannot run `problem`, or None."""
    if problem.device != "cpu":
        return f"runs on the CPU, the tensors are on {problem.device}"
    if problem.activation not in ("identity", "relu", "relu6"):
        return f"has no mask for {problem.activation}"
    if problem.shortcut not in ("", "tensor", "norm"):
        return f"does not know the shortcut {problem.shortcut!r}"
    reason = native.missing("cpu")
    return reason and f"the native library's CPU part: {reason}"


def needs_finite(problem: NormProblem) -> bool:
    """Never: NaN passes, as in stock."""
    return False
