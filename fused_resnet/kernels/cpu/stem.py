"""Convolution to max-pool on the CPU: the convolution's launch, and a pool that keeps no indices.

PyTorch's pool makes indices, too, which only a gradient needs.
"""

from __future__ import annotations

import torch

from fused_resnet.kernels import raw
from fused_resnet.kernels.cpu import conv_bn_act
from fused_resnet.problem import ConvOperands, ConvProblem

FOLDED = conv_bn_act.FOLDED
needs_finite = conv_bn_act.needs_finite


def refuse(problem: ConvProblem) -> str | None:
    """Why these two cannot run `problem`, or None."""
    if problem.dtype not in ("fp32", "bf16"):
        return f"our pool on the CPU takes fp32 and bf16, not {problem.dtype}"
    return raw.refuse("cpu", "max_pool", problem.device) or conv_bn_act.refuse(problem)


def forward(problem: ConvProblem, o: ConvOperands) -> torch.Tensor:
    """Two launches; x in any strides. NotImplemented where weights that are folded are not finite."""
    x = o.x.contiguous(memory_format=torch.channels_last)
    y = conv_bn_act.forward(problem, o._replace(x=x))
    if y is NotImplemented:
        return y
    return torch.ops.fused_resnet._max_pool.default(y, (3, 3), (2, 2), (1, 1))
