"""The references of conv_dgrad and conv_wgrad against autograd in fp64."""

import pytest
import torch
import torch.nn.functional as F

from fused_resnet.ops import bits, conv_grad
from fused_resnet.problem import GradOperands
from fused_resnet.testing.cases import conv

CHANNELS_LAST = torch.channels_last
ACT = {"relu": F.relu, "relu6": F.relu6, "identity": lambda z: z}
PROBLEMS = [conv(6, 8, 5), conv(6, 8, (7, 6), stride=(2, 3)), conv(4, 8, 5, 1, stride=2), conv(8, 4, 6, groups=2),
            conv(4, 4, 8, dilation=2, padding=3), conv(3, 8, 9, 7, stride=2), conv(4, 4, 5, groups=4, padding=4)]


def same(mine, theirs):
    torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


def norm(x, gamma, beta, eps):
    return F.batch_norm(x, None, None, gamma, beta, True, 0.0, eps)


def statistics(x):
    return x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)


def leaf(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def forward(problem):
    """x -> norm and activation -> convolution u -> norm z, with the leaves; two norms of the batch's own statistics."""
    p = problem
    x, weight = leaf(p.N, p.C, p.H, p.W), leaf(p.K, p.C // p.groups, p.R, p.S)
    vectors = [leaf(p.C), leaf(p.C), leaf(p.K), leaf(p.K)]
    pre = ACT[p.prologue](norm(x, *vectors[:2], 0.3)) if p.prologue else x
    u = F.conv2d(pre, weight, None, p.stride, p.padding, p.dilation, p.groups)
    u.retain_grad()
    return x, weight, vectors, u, norm(u, *vectors[2:], 0.2)


def operands(x, weight, vectors, u, dz):
    """What a backward pass that comes from z knows."""
    x, weight, u = x.detach(), weight.detach(), u.detach()
    pre_gamma, pre_beta, gamma, _ = (v.detach() for v in vectors)
    mean, var = statistics(u)
    xhat = (u - mean[:, None, None]) / (var + 0.2).sqrt()[:, None, None]
    means = torch.stack((dz.mean((0, 2, 3)), (dz * xhat).mean((0, 2, 3))))
    pre_mean, pre_var = statistics(x)
    return GradOperands(dz.contiguous(memory_format=CHANNELS_LAST), weight, u.contiguous(memory_format=CHANNELS_LAST),
                        gamma, mean, var, means, x.contiguous(memory_format=CHANNELS_LAST), pre_gamma, pre_beta,
                        pre_mean, pre_var, eps=0.2, pre_eps=0.3)


@pytest.mark.parametrize("prologue", ["", "relu", "relu6", "identity"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)
def test_gradients_are_those_of_autograd(problem, prologue):
    """With a prologue, dz' and its sums give the gradients of the norm in front: of beta, gamma, and of x."""
    problem = problem._replace(prologue=prologue, dtype="fp64")
    x, weight, vectors, u, z = forward(problem)
    dz = torch.randn_like(z)
    z.backward(dz)
    o = operands(x, weight, vectors, u, dz)
    dx, sums = conv_grad.dgrad(problem, o)
    same(conv_grad.wgrad(problem, o), weight.grad)
    plain = o._replace(dy=u.grad.contiguous(memory_format=CHANNELS_LAST), u=None, means=None)
    same(conv_grad.wgrad(problem, plain), weight.grad)
    same(conv_grad.dgrad(problem, plain)[0], dx)
    if not prologue:
        assert sums is None
        same(dx, x.grad)
        return
    same(sums[0], vectors[1].grad)
    same(sums[1], vectors[0].grad)
    count = dx.numel() // problem.C
    through = conv_grad.through_norm(dx, o.x, o.pre_gamma, o.pre_mean, o.pre_var, o.pre_eps, sums / count)
    same(through, x.grad)
    assert dx.is_contiguous(memory_format=CHANNELS_LAST)


@pytest.mark.parametrize("masked", [False, True])
def test_a_residual_is_added_where_its_mask_is_set(masked):
    """NaN that the mask hides does not count."""
    problem = conv(6, 8, 5)._replace(dtype="fp64")
    x, weight, vectors, u, z = forward(problem)
    z.sum().backward()
    o = operands(x, weight, vectors, u, torch.ones_like(z))
    residual = torch.randn_like(o.x)
    flags = torch.rand(problem.N, problem.H, problem.W, problem.C) < 0.5 if masked else torch.ones(1, dtype=torch.bool)
    shown = flags.permute(0, 3, 1, 2).expand_as(residual) if masked else flags
    given = torch.where(shown, residual, float("nan"))
    o = o._replace(residual=given.contiguous(memory_format=CHANNELS_LAST), mask=bits.pack(flags) if masked else None)
    same(conv_grad.dgrad(problem, o)[0], x.grad + torch.where(shown, residual, 0.0))
