"""What the kernels share that call the native library's raw operators, on the CPU or on CUDA.

What each of the two asks of the operands beyond the family's contract stands in `kernels/cpu` and `kernels/cuda`.
"""

from __future__ import annotations

from typing import Any

import torch

from fused_resnet import native
from fused_resnet.problem import NormProblem

WHERE = {"cpu": "the CPU", "cuda": "CUDA"}


def refuse(part: str, family: str, device: str) -> str | None:
    """Why a part of the library cannot run a family on tensors of `device`, or None."""
    if device != part:
        return f"runs on {WHERE[part]}, the tensors are on {device}"
    reason = native.refusal(part)
    if reason is None and not torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_resnet::_{family}", part.upper()):
        return f"the native library's {part.upper()} part has no kernel of the family {family}"
    return reason


def refuse_norm(part: str, family: str, problem: NormProblem) -> str | None:
    """Why a part of the library cannot run a problem of the families `bn_act*`, or None."""
    if problem.activation not in ("identity", "relu", "relu6"):
        return f"has no mask for {problem.activation}"
    if problem.shortcut not in ("", "tensor", "norm"):
        return f"does not know the shortcut {problem.shortcut!r}"
    return refuse(part, family, problem.device)


def needs_finite(problem: Any) -> bool:
    """Never: NaN and Inf go through these kernels as they go through stock's."""
    return False


def bn_act(problem: NormProblem, o: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One launch.

    Args:
        problem: what is computed.
        o: `ops.bn_act.NormOperands`; x and residual are dense in channels_last memory.

    Returns:
        y [N, C, H, W] in x's dtype, channels_last, and its mask, uint8 of [ceil(N * H * W * C / 8)]; None for the
        identity.
    """
    y, mask = torch.ops.fused_resnet._bn_act.default(
        o.x, o.gamma, o.beta, o.mean, o.var, o.eps, problem.activation, o.residual, o.r_gamma, o.r_beta, o.r_mean,
        o.r_var, o.r_eps)
    return y, None if problem.activation == "identity" else mask


def bn_act_sums(problem: NormProblem, o: Any) -> torch.Tensor:
    """One launch and, on a GPU, a small one that adds up its parts.

    Args:
        problem: what is computed.
        o: `ops.bn_act.NormOperands`; dy, x and residual are dense in channels_last memory.

    Returns:
        [2, C] in fp32 (fp64 for fp64), or [3, C] for a shortcut with a norm.
    """
    shortcut = (o.residual, o.r_mean, o.r_var) if problem.shortcut == "norm" else (None,) * 3
    return torch.ops.fused_resnet._bn_act_sums.default(o.dy, o.mask, o.x, o.mean, o.var, o.eps, *shortcut, o.r_eps)


def bn_act_grad(problem: NormProblem, o: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One launch.

    Args:
        problem: what is computed.
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
