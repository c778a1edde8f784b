"""Operands of `conv_dgrad` and `conv_wgrad`, and how their results are judged: against the references in fp64."""

import torch

from fused_resnet import backends, numerics
from fused_resnet.ops import bits, bn_act, conv_grad
from fused_resnet.problem import GradOperands
from fused_resnet.testing.cases import RAGGED, TINY, conv
from tests.kernels.training import EPS, ROUNDINGS, agree_vector

# Strides with and without taps in every parity class, dilations that share a factor with them, more padding than taps.
STRIDED = [conv(16, 24, (9, 8), stride=2), conv(16, 8, (7, 9), 3, stride=3), conv(16, 16, 9, 1, stride=2),
           conv(8, 16, (10, 9), 2, stride=(4, 3), padding=0), conv(16, 16, 9, stride=2, dilation=2),
           conv(8, 8, (11, 10), 5, stride=(2, 3), dilation=(3, 2)), conv(16, 16, 9, 3, stride=(4, 6), dilation=(6, 4)),
           conv(8, 8, 5, 3, padding=4), conv(8, 8, 4, 1, padding=(2, 1), stride=2), conv(3, 16, 11, 7, stride=2),
           conv(32, 64, 5, groups=2, stride=2), conv(40, 24, (6, 5), groups=4, stride=(1, 2))]
PROBLEMS = list(dict.fromkeys(p._replace(norm=False, bias=False, residual=False, activation="identity", prologue="")
                              for p in TINY + RAGGED + STRIDED if p.N and not p.depthwise))


def make(problem, seed=0, *, through=False, residual=False, mask=False, mean=0.0):
    """Random operands; `through` gives dz and u instead of du, `mean` is that of u's and x's channels."""
    p, generator = problem, torch.Generator().manual_seed(seed)
    dtype = numerics.DTYPES[p.dtype]

    def normal(*shape, scale=1.0, offset=0.0):
        return (torch.randn(shape, generator=generator) * scale + offset).to(p.device, dtype).contiguous(
            memory_format=torch.channels_last)

    def vector(low, high, *shape):
        return (torch.rand(shape, generator=generator) * (high - low) + low).to(p.device)

    def norm(channels, prefix=""):
        values = vector(-1.5, 1.5, channels), vector(mean - 0.5, mean + 0.5, channels), vector(0.5, 2.0, channels)
        return {prefix + name: value for name, value in zip(("gamma", "mean", "var"), values, strict=True)}

    parts = {"dy": normal(*p.output_shape), "x": normal(p.N, p.C, p.H, p.W, offset=mean if p.prologue else 0.0),
             "weight": normal(p.K, p.C // p.groups, p.R, p.S, scale=(p.K // p.groups * p.R * p.S)**-0.5)}
    if through:
        parts |= norm(p.K) | {"u": normal(*p.output_shape, offset=mean), "means": vector(-0.7, 0.7, 2, p.K)}
    if p.prologue:
        parts |= norm(p.C, "pre_") | {"pre_beta": vector(-1.0, 1.0, p.C)}
    if residual:
        parts["residual"] = normal(p.N, p.C, p.H, p.W)
    if mask:
        parts["mask"] = bits.pack(torch.randint(0, 2, (p.N, p.H, p.W, p.C), generator=generator).bool()).to(p.device)
    return GradOperands(**parts, eps=0.25, pre_eps=0.5)


def forms(problem, seed):
    """(problem, operands) of two of the forms that a backward pass has, which differ from seed to seed."""
    activation = ("relu", "relu6", "identity")[seed % 3]
    first = {"residual": True, "mask": seed % 2 == 0}, {}
    yield problem, make(problem, seed, through=seed % 2 == 1, **first[seed % 3 == 0])
    problem = problem._replace(prologue=activation)
    yield problem, make(problem, seed + 1, through=seed % 2 == 0)


def wide(operands):
    return backends.widen(operands)._replace(mask=operands.mask)


def _check(problem, operands, result, stock, exact, depth):
    # What is made while it is loaded takes a dozen roundings in fp32, and one to 16 bits, this way or that.
    made = operands.u is not None or bool(problem.prologue)
    bound = numerics.check(result, stock, exact, dtype=problem.dtype, depth=depth + 12 * made, folded=made)
    assert bound.ok, f"{problem.id}: {bound}"


def agree_dgrad(problem, operands, result):
    """dx, or dz' beside its sums, which are those of dz' as it was stored."""
    p, (dx, sums) = problem, result
    stock, exact = conv_grad.dgrad(p, operands)[0], conv_grad.dgrad(p, wide(operands))[0]
    assert dx.dtype == operands.dy.dtype and dx.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(dx.isnan(), exact.isnan()), f"{p.id}: NaN in other places"
    depth = p.K // p.groups * p.R * p.S
    if not p.prologue:
        assert sums is None
        _check(p, operands, dx, stock, exact, depth)
        return
    o = wide(operands)
    xhat = bn_act.normalised(o.x, o.pre_mean, o.pre_var, o.pre_eps)
    z = bn_act.affine(xhat, o.pre_gamma, o.pre_beta)
    decided = (z.abs() > 1e-5) & ((z - 6).abs() > 1e-5) | z.isnan()  # elsewhere rounding may let da pass or not
    _check(p, operands, *(torch.where(decided, t, torch.zeros_like(t)) for t in (dx, stock, exact)), depth)
    stored = dx.double()
    terms = torch.stack((stored, stored * xhat))
    size = terms.abs().sum((1, 3, 4))
    # What xhat lacks where |mean| >> std is what x, mean and their difference lack in fp32.
    size[1] += (stored * o.x).abs().sum((0, 2, 3)) * (o.pre_var + o.pre_eps).rsqrt()
    agree_vector(p, sums, terms.sum((1, 3, 4)), ROUNDINGS * EPS * size + 1e-30)


def agree_wgrad(problem, operands, result):
    p = problem
    assert result.dtype == torch.float32 and result.is_contiguous(memory_format=torch.channels_last)
    assert result.shape == (p.K, p.C // p.groups, p.R, p.S)
    stock, exact = conv_grad.wgrad(p, operands), conv_grad.wgrad(p, wide(operands))
    assert torch.equal(result.isnan(), exact.isnan()), f"{p.id}: NaN in other places"
    _check(p, operands, result, stock, exact, p.N * p.P * p.Q)
