"""Family `conv_bn_stats`: a convolution in training, with the statistics that the batch norm behind it needs.

    u = conv(pro(x), w) + bias,  mean = sum(u) / M,  var = sum((u - mean)^2) / M         over N, P and Q
    pro(x) = act_p((x - pre_mean) * pre_gamma / sqrt(pre_var + pre_eps) + pre_beta), or x

The prologue is the norm and activation of the layer before, so that what they make is never stored. Statistics
are those of u as it is stored, because backward reads that. A kernel takes mean and squared differences of
(u - pivot) tile by tile, and small launches join the tiles in a fixed order: no atomics, the same bits every time.
The pivot, a vector near the mean (the running mean), keeps all digits of the variance where |mean| >> std; it does not
change the result otherwise. x and u are dense in channels_last memory. Zero padding is applied after `pro`.
"""

from __future__ import annotations

import torch

from fused_resnet import backends
from fused_resnet.ops.bn_act import accumulator, affine, normalised
from fused_resnet.ops.conv_bn_act import ACTIVATE
from fused_resnet.problem import ConvOperands, ConvProblem

FAMILY = "conv_bn_stats"


def prologue(problem: ConvProblem, o) -> torch.Tensor:
    """pro(x) in x's dtype: of `ConvOperands` or `GradOperands`."""
    if not problem.prologue:
        return o.x
    z = affine(normalised(o.x, o.pre_mean, o.pre_var, o.pre_eps), o.pre_gamma, o.pre_beta)
    return ACTIVATE[problem.prologue](z).to(o.x.dtype)


def reference(problem: ConvProblem, o: ConvOperands) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(u, mean, var) with vectors of [K] in fp32, or fp64 for fp64 data. `o.mean` is the pivot, which it ignores."""
    u = torch.convolution(prologue(problem, o), o.weight, o.bias, problem.stride, problem.padding, problem.dilation,
                          False, (0, 0), problem.groups)
    var, mean = torch.var_mean(u.to(accumulator(u)), (0, 2, 3), correction=0)
    return u.contiguous(memory_format=torch.channels_last), mean, var


backends.register(FAMILY, reference)
