"""Families `conv_dgrad` and `conv_wgrad`: gradients of u = conv(pro(x), w), u's norm and x's norm included.

The problem is that of the forward convolution; `problem.prologue` names the activation of the norm in front, or
is "". Both read du, the gradient of u, or make it as they load, from the gradient dz behind u's norm:

    du = gamma / sqrt(var + eps) * (dz - s0 - (u - mean) / sqrt(var + eps) * s1)     (see `ops.bn_act`)

    conv_dgrad:  da = conv_transpose(du, w);  dx = da [+ residual, where its mask is set]          without a prologue
                 dz' = da where act_p let z' pass, z' = norm_p(x), and sum(dz'), sum(dz' * xhat')  with a prologue
    conv_wgrad:  dw = sum over N, P, Q of du * pro(x), which is recomputed as it is loaded

so that neither du nor pro(x) is ever stored. Tensors are dense in channels_last memory, arithmetic is fp32 with one
rounding. ATen's convolution_backward is the reference.
"""

from __future__ import annotations

import torch

from fused_resnet import backends
from fused_resnet.ops import bits
from fused_resnet.ops.bn_act import accumulator, affine, normalised, passes, through_norm
from fused_resnet.ops.conv_bn_stats import prologue
from fused_resnet.problem import ConvProblem, GradOperands


def _du(o: GradOperands) -> torch.Tensor:
    """The gradient of the convolution's output, in its dtype."""
    if o.u is None:
        return o.dy
    return through_norm(o.dy, o.u, o.gamma, o.mean, o.var, o.eps, o.means).to(o.u.dtype)


def _backward(problem: ConvProblem, du: torch.Tensor, x: torch.Tensor, weight: torch.Tensor,
              data: bool) -> torch.Tensor:
    found = torch.ops.aten.convolution_backward(du, x, weight, None, problem.stride, problem.padding, problem.dilation,
                                                False, (0, 0), problem.groups, (data, not data, False))
    return found[0] if data else found[1]


def dgrad(problem: ConvProblem, o: GradOperands) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Reference of `conv_dgrad`.

    Returns:
        (dx, None), or with a prologue (dz', sums [2, C] in the accumulator's type): sum(dz') and sum(dz' * xhat').
    """
    da = _backward(problem, _du(o), o.x if o.x is not None else o.dy.new_empty((problem.N, problem.C, problem.H,
                                                                               problem.W)), o.weight, True)
    if not problem.prologue:
        if o.residual is not None:
            counts = o.residual
            if o.mask is not None:
                counts = torch.where(bits.unpack(o.mask, counts), counts, torch.zeros_like(counts))
            da = da + counts
        return da.contiguous(memory_format=torch.channels_last), None
    xhat = normalised(o.x, o.pre_mean, o.pre_var, o.pre_eps)
    dz = da
    if problem.prologue != "identity":
        z = affine(xhat, o.pre_gamma, o.pre_beta)
        dz = torch.where(passes(z, problem.prologue), da, torch.zeros((), dtype=da.dtype, device=da.device))
    wide = dz.to(accumulator(dz))
    return dz.contiguous(memory_format=torch.channels_last), torch.stack((wide.sum((0, 2, 3)),
                                                                          (wide * xhat).sum((0, 2, 3))))


def wgrad(problem: ConvProblem, o: GradOperands) -> torch.Tensor:
    """Reference of `conv_wgrad`: [K, C / groups, R, S]; kernels return it in the accumulator's type."""
    shape = (problem.K, problem.C // problem.groups, problem.R, problem.S)
    return _backward(problem, _du(o), prologue(problem, o), o.dy.new_empty(shape), False)


backends.register("conv_dgrad", dgrad)
backends.register("conv_wgrad", wgrad)
