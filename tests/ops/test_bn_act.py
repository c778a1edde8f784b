"""The references of bn_act* and conv_bn_stats beside autograd and stock operators in fp64, and the masks' bits."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from fused_resnet.ops import bits, bn_act, conv_bn_stats
from fused_resnet.ops.bn_act import NormOperands
from fused_resnet.problem import ConvOperands, ConvProblem, NormProblem

ACTIVATIONS = {"identity": lambda z: z, "relu": F.relu, "relu6": F.relu6}
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def channels_last(*shape):
    return torch.randn(shape, dtype=torch.float64).contiguous(memory_format=torch.channels_last)


def operands(problem):
    """Operands of forward, and the statistics of this very batch."""
    def norm(u):
        c = problem.C
        return [torch.randn(c, dtype=torch.float64), torch.randn(c, dtype=torch.float64), u.mean((0, 2, 3)),
                u.var((0, 2, 3), correction=0)]

    x = channels_last(*problem.output_shape)
    r = channels_last(*problem.output_shape) if problem.shortcut else None
    return NormOperands(x, *norm(x), r, *(norm(r) if problem.shortcut == "norm" else [None] * 4), eps=0.1, r_eps=0.2)


def stock(problem, o):
    """(y, the tensors that have a gradient) of batch norm in training mode, add and activation."""
    x, gamma, beta = (t.clone().requires_grad_() for t in (o.x, o.gamma, o.beta))
    given, z = [x, gamma, beta], F.batch_norm(x, None, None, gamma, beta, True, 0.0, o.eps)
    if problem.shortcut:
        given.append(o.residual.clone().requires_grad_())
    if problem.shortcut == "tensor":
        z = z + given[-1]
    elif problem.shortcut == "norm":
        given += [o.r_gamma.clone().requires_grad_(), o.r_beta.clone().requires_grad_()]
        z = z + F.batch_norm(*given[3:4], None, None, *given[4:], True, 0.0, o.r_eps)
    return ACTIVATIONS[problem.activation](z), given


@pytest.mark.parametrize(("activation", "shortcut", "c"),
                         itertools.product(ACTIVATIONS, ("", "tensor", "norm"), (1, 3, 8)))
def test_forward_and_gradients_are_those_of_autograd(activation, shortcut, c):
    problem = NormProblem("cpu", "fp64", 3, 4, 5, c, activation, shortcut)
    o, dy = operands(problem), channels_last(*problem.output_shape)
    expected, given = stock(problem, o)
    grads = torch.autograd.grad(expected, given, dy)
    y, mask = bn_act.forward(problem, o)
    torch.testing.assert_close(y, expected.detach(), **EXACT)
    assert y.is_contiguous(memory_format=torch.channels_last) and (mask is None) == (activation == "identity")
    o = o._replace(dy=dy, mask=mask)
    sums = bn_act.sums(problem, o)
    assert sums.shape == (3 if shortcut == "norm" else 2, c) and sums.dtype == torch.float64
    torch.testing.assert_close(sums[1], grads[1], **EXACT)
    torch.testing.assert_close(sums[0], grads[2], **EXACT)
    count = problem.depth
    o = o._replace(means=sums[:2] / count, r_means=sums[::2] / count if shortcut == "norm" else None)
    dx, dr = bn_act.grad(problem, o)
    torch.testing.assert_close(dx, grads[0], **EXACT)
    if not shortcut:
        assert dr is None
        return
    torch.testing.assert_close(dr, grads[3], **EXACT)
    if shortcut == "norm":
        torch.testing.assert_close(sums[2], grads[4], **EXACT)


def test_fixed_statistics_have_no_means():
    problem = NormProblem("cpu", "fp64", 2, 3, 3, 4, "relu", "")
    o, dy = operands(problem), channels_last(*problem.output_shape)
    o = o._replace(mean=torch.randn(4, dtype=torch.float64), var=torch.rand(4, dtype=torch.float64) + 0.5)
    x = o.x.clone().requires_grad_()
    expected = F.relu(F.batch_norm(x, o.mean, o.var, o.gamma, o.beta, False, 0.0, o.eps))
    _, mask = bn_act.forward(problem, o)
    dx, _ = bn_act.grad(problem, o._replace(dy=dy, mask=mask, means=torch.zeros(2, 4, dtype=torch.float64)))
    torch.testing.assert_close(dx, *torch.autograd.grad(expected, x, dy), **EXACT)


@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_the_gradient_at_the_kinks_and_at_nan_is_stock_s(activation):
    z = torch.tensor([-1.0, -0.0, 0.0, 1e-30, 3.0, 6.0, 6.5, float("inf"), float("-inf"), float("nan")],
                     dtype=torch.float64, requires_grad=True)
    grad, = torch.autograd.grad(ACTIVATIONS[activation](z).sum(), z)
    assert torch.equal(bn_act.passes(z.detach(), activation), grad != 0)


@pytest.mark.parametrize(("shape", "layout"), itertools.product(
    ((1,), (7,), (64,), (2, 3, 5, 7), (2, 8, 3, 3)), (torch.contiguous_format, torch.channels_last)))
def test_bit_i_of_byte_b_is_element_8b_plus_i_in_memory(shape, layout):
    if len(shape) < 4 and layout is torch.channels_last:
        layout = torch.contiguous_format
    like = torch.randn(shape).contiguous(memory_format=layout)
    flags = like > 0
    packed = bits.pack(flags)
    row = bits.dense(flags).tolist()
    assert packed.tolist() == [sum(flag << i for i, flag in enumerate(row[b:b + 8])) for b in range(0, len(row), 8)]
    assert torch.equal(bits.unpack(packed, like), flags)


@pytest.mark.parametrize("prologue", ["", "relu", "identity"])
def test_statistics_are_those_of_what_the_convolution_stores(prologue):
    problem = ConvProblem("cpu", "fp16", 2, 5, 6, 4, 8, 3, 3, padding=(1, 1), norm=False, activation="identity",
                          prologue=prologue)
    x, weight = channels_last(2, 4, 5, 6).half(), torch.randn(8, 4, 3, 3).half()
    pre = {"pre_mean": torch.randn(4), "pre_var": torch.rand(4) + 0.5, "pre_gamma": torch.randn(4)} if prologue else {}
    u, mean, var = conv_bn_stats.reference(problem, ConvOperands(x, weight, **pre, pre_eps=0.1))
    before = x
    if prologue:
        z = F.batch_norm(x.float(), pre["pre_mean"], pre["pre_var"], pre["pre_gamma"], None, False, 0.0, 0.1)
        before = ACTIVATIONS[prologue](z).half()
    torch.testing.assert_close(u, F.conv2d(before, weight, padding=1), rtol=2e-3, atol=2e-3)
    assert mean.dtype == var.dtype == torch.float32
    torch.testing.assert_close(mean.double(), u.double().mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var.double(), u.double().var((0, 2, 3), correction=0), rtol=1e-5, atol=1e-6)
