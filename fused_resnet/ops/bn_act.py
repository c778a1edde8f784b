"""Families `bn_act`, `bn_act_sums`, `bn_act_grad`: the end of a residual block in training, forward and backward.

    z = (x - mean) / sqrt(var + eps) * gamma + beta + shortcut,  y = act(z)
    shortcut = nothing, a tensor r, or a second norm of its own of a tensor r (a projection's)

Forward reads x and the shortcut once and writes y and one bit for each element: whether the activation let it
pass. Backward needs two launches, because a batch norm's gradient holds means over the batch: with
dz = dy where the bit is set, xhat = (x - mean) / sqrt(var + eps) and M elements a channel,

    bn_act_sums:  sum(dz), sum(dz * xhat) [, sum(dz * xhat of r)]              reads dy, bits, x [, r]
    bn_act_grad:  dx = gamma / sqrt(var + eps) * (dz - s0 - xhat * s1),  dr     reads the same, writes dx [, dr]

where s0 and s1 are the sums over M, or zeros for a norm with fixed statistics. All tensors are dense in
channels_last memory; vectors are [C] in fp32 (fp64 beside fp64 data); arithmetic is fp32, rounded once.
Source: Ioffe and Szegedy 2015, arXiv:1502.03167, for the gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fused_resnet import backends
from fused_resnet.ops import bits
from fused_resnet.problem import NormProblem

CHANNELS_LAST = torch.channels_last


class NormOperands(NamedTuple):
    """What the three families read; what a launch does not need is None."""

    x: Any  # [N, C, H, W], what the norm normalises
    gamma: Any = None  # [C], as all vectors; None stands for 1
    beta: Any = None  # None stands for 0
    mean: Any = None
    var: Any = None  # biased
    residual: Any = None  # [N, C, H, W]: r
    r_gamma: Any = None  # the norm of r, where problem.shortcut == "norm"
    r_beta: Any = None
    r_mean: Any = None
    r_var: Any = None
    eps: float = 1e-5
    r_eps: float = 1e-5
    dy: Any = None  # [N, C, H, W]: backward
    mask: Any = None  # uint8 of [ceil(N * H * W * C / 8)] as `bits.pack` lays them; None for the identity
    means: Any = None  # [2, C]: s0, s1
    r_means: Any = None  # [2, C]: those of the norm of r
    reuse: bool = False


def vector(v: torch.Tensor | None, like: torch.Tensor) -> Any:
    """A [C] vector for arithmetic with NCHW tensors, in the accumulator's type."""
    return None if v is None else v.to(accumulator(like)).view(1, -1, 1, 1)


def accumulator(t: torch.Tensor) -> torch.dtype:
    """The type that sums over elements of `t` are kept in."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def normalised(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, eps: float) -> torch.Tensor:
    """(x - mean) / sqrt(var + eps) in the accumulator's type."""
    return (x.to(accumulator(x)) - vector(mean, x)) * vector(var.to(accumulator(x)).add(eps).rsqrt(), x)


def affine(xhat: torch.Tensor, gamma: torch.Tensor | None, beta: torch.Tensor | None) -> torch.Tensor:
    """xhat * gamma + beta."""
    z = xhat if gamma is None else xhat * vector(gamma, xhat)
    return z if beta is None else z + vector(beta, xhat)


def passes(z: torch.Tensor, activation: str) -> torch.Tensor:
    """Where the gradient goes through the activation; NaN lets it, as in stock."""
    return ~(z <= 0) if activation == "relu" else ~((z <= 0) | (z >= 6))


def masked(o: NormOperands) -> torch.Tensor:
    """dz: dy where the activation let z pass, in the accumulator's type."""
    dy = o.dy.to(accumulator(o.dy))
    return dy if o.mask is None else torch.where(bits.unpack(o.mask, o.dy), dy, torch.zeros((), dtype=dy.dtype,
                                                                                             device=dy.device))


def forward(problem: NormProblem, o: NormOperands) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Reference of `bn_act`: (y, mask)."""
    z = affine(normalised(o.x, o.mean, o.var, o.eps), o.gamma, o.beta)
    if problem.shortcut == "tensor":
        z = z + o.residual.to(z.dtype)
    elif problem.shortcut == "norm":
        z = z + affine(normalised(o.residual, o.r_mean, o.r_var, o.r_eps), o.r_gamma, o.r_beta)
    if problem.activation == "identity":
        return _like(z, o.x), None
    flags = passes(z, problem.activation)
    high = 6.0 if problem.activation == "relu6" else None
    return _like(z.clamp(min=0.0, max=high), o.x), bits.pack(flags.contiguous(memory_format=CHANNELS_LAST))


def sums(problem: NormProblem, o: NormOperands) -> torch.Tensor:
    """Reference of `bn_act_sums`: [2, C] or [3, C] in the accumulator's type."""
    dz = masked(o)
    found = [dz, dz * normalised(o.x, o.mean, o.var, o.eps)]
    if problem.shortcut == "norm":
        found.append(dz * normalised(o.residual, o.r_mean, o.r_var, o.r_eps))
    return torch.stack([t.sum((0, 2, 3)) for t in found])


def grad(problem: NormProblem, o: NormOperands) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Reference of `bn_act_grad`: (dx, dr), dr None without a shortcut."""
    dz = masked(o)
    dx = _like(through_norm(dz, o.x, o.gamma, o.mean, o.var, o.eps, o.means), o.x)
    if problem.shortcut == "norm":
        return dx, _like(through_norm(dz, o.residual, o.r_gamma, o.r_mean, o.r_var, o.r_eps, o.r_means), o.x)
    return dx, _like(dz, o.x) if problem.shortcut == "tensor" else None


def through_norm(dz: torch.Tensor, u: torch.Tensor, gamma: torch.Tensor | None, mean: torch.Tensor, var: torch.Tensor,
                 eps: float, means: torch.Tensor) -> torch.Tensor:
    """du = gamma / sqrt(var + eps) * (dz - s0 - xhat * s1), in the accumulator's type."""
    scale = var.to(accumulator(u)).add(eps).rsqrt()
    scale = scale if gamma is None else scale * gamma.to(scale.dtype)
    return (dz.to(scale.dtype) - vector(means[0], u) - normalised(u, mean, var, eps) * vector(means[1], u)) * vector(
        scale, u)


def _like(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return t.to(x.dtype).contiguous(memory_format=CHANNELS_LAST)


backends.register("bn_act", forward)
backends.register("bn_act_sums", sums)
backends.register("bn_act_grad", grad)
