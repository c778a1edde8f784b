"""conv + BN + ReLU + max-pool: cuDNN's convolution, then PyTorch's pool.

Two launches, because PyTorch offers no cuDNN operator that ends in a pool. They stand here so that a kernel which
stores nothing between the two is measured against them and not against stock's four.
"""

from __future__ import annotations

import torch

from fused_resnet.kernels.cudnn import conv_bn_act
from fused_resnet.kernels.cudnn.conv_bn_act import FOLDED, needs_finite, refuse
from fused_resnet.problem import ConvOperands, ConvProblem


def forward(problem: ConvProblem, o: ConvOperands) -> torch.Tensor:
    """The pooled map in channels_last memory; x may have any strides."""
    x = o.x.contiguous(memory_format=torch.channels_last)
    return torch.max_pool2d(conv_bn_act.forward(problem, o._replace(x=x)), 3, 2, 1)


__all__ = ["FOLDED", "forward", "needs_finite", "refuse"]
