"""The family `conv_int8`: its formula, its kernels against exact sums, and how numbers become 8 bits."""

import math

import pytest
import torch
import torch.nn.functional as F

from fused_resnet import backends, int8, numerics
from fused_resnet.ops import conv_int8
from fused_resnet.problem import Int8Operands, Int8Problem
from fused_resnet.testing import inputs
from fused_resnet.testing.cases import INT8, conv

ACTIVATE = {"identity": lambda z: z, "relu": torch.relu, "relu6": F.relu6}
PROBLEM = Int8Problem(conv(16, 24, 6)._replace(dtype="int8"))


def emulated(problem, o):
    """The formula in fp64 on what the quantised numbers stand for."""
    p = problem.conv
    weight, shift = conv_int8.folded(o)
    quantised, scale = int8.by_filter(weight)
    x = (o.x.double() - o.x_zero) * o.x_scale
    z = F.conv2d(x, quantised.double() * scale.double()[:, None, None, None], shift.double(), p.stride, p.padding,
                 p.dilation)
    if o.residual is not None:
        z = z + (o.residual.double() - o.residual_zero) * o.residual_scale
    z = ACTIVATE[p.activation](z)
    return z if problem.out == "fp32" else torch.round(z / o.y_scale + o.y_zero).clamp(0, 255)


def ready(problem):
    reasons = dict(backends.explain(problem, conv_int8.FAMILY))
    if reasons["cpu"] is not None:
        pytest.skip(reasons["cpu"])


@pytest.mark.parametrize("problem", INT8, ids=lambda p: p.id)
def test_the_reference_is_the_formula(problem):
    o = inputs.quantised(problem)
    result, expected = conv_int8.reference(problem, o), emulated(problem, o)
    assert result.shape == problem.output_shape and result.is_contiguous(memory_format=torch.channels_last)
    assert result.dtype == (torch.uint8 if problem.out == "uint8" else torch.float32)
    bound = numerics.check_quantised(result, expected)
    assert bound.ok, str(bound)


@pytest.mark.parametrize("problem", INT8, ids=lambda p: p.id)
def test_the_kernel_has_the_sums_of_the_reference(problem, poison):
    if not problem.conv.N:
        return
    ready(problem)
    o = inputs.quantised(problem)
    with backends.use("cpu"):
        result = conv_int8.execute(problem, o)
    assert backends.last() == "cpu" and result.is_contiguous(memory_format=torch.channels_last)
    bound = numerics.check_quantised(result, conv_int8.reference(problem, o))
    assert bound.ok, str(bound)


def exact_operands(problem, x, weight, **more):
    """Operands whose sums come out as they are: every filter holds a 127, scales are 1."""
    weight = weight.clone()
    weight.flatten(1)[:, 0] = 127
    return Int8Operands(x.contiguous(memory_format=torch.channels_last), weight.float(), **more)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("x_zero", [0, 3, 255])
def test_sums_are_exact(backend, x_zero):
    """All of 24 bits and more, at the borders, too: the largest numbers there are, and random ones."""
    problem = Int8Problem(conv(48, 40, 9, norm=False, activation="identity")._replace(dtype="int8"), out="fp32")
    if backend == "cpu":
        ready(problem)
    x = torch.randint(0, 256, (2, 48, 9, 9), dtype=torch.uint8)
    x[0] = 255
    weight = torch.randint(-127, 128, (40, 48, 3, 3))
    weight[0], weight[1] = 127, -127
    o = exact_operands(problem, x, weight, x_zero=x_zero)
    expected = F.conv2d(x.double() - x_zero, o.weight.double(), None, 1, 1)
    with backends.use(backend):
        assert torch.equal(conv_int8.execute(problem, o), expected.float())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_results_saturate_at_both_ends(backend):
    if backend == "cpu":
        ready(PROBLEM)
    problem = PROBLEM._replace(conv=PROBLEM.conv._replace(norm=False, activation="identity"))
    o = inputs.quantised(problem)._replace(y_scale=1e-4, y_zero=100)
    with backends.use(backend):
        result = conv_int8.execute(problem, o)
    assert set(result.unique().tolist()) >= {0, 255}
    assert torch.equal(result == 255, emulated(problem, o) == 255)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_filters_of_zeros_give_the_shift(backend):
    if backend == "cpu":
        ready(PROBLEM)
    problem = PROBLEM._replace(out="fp32", conv=PROBLEM.conv._replace(activation="identity"))
    o = inputs.quantised(problem)
    o.weight[3], o.gamma[5] = 0, 0
    with backends.use(backend):
        result = conv_int8.execute(problem, o)
    shift = conv_int8.folded(o)[1]
    for k in (3, 5):
        torch.testing.assert_close(result[:, k], shift[k].expand_as(result[:, k]))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("activation", ["identity", "relu", "relu6"])
def test_nan_in_a_residual_stays_or_is_the_least_value(backend, activation):
    for out in ("fp32", "uint8"):
        problem = Int8Problem(conv(16, 32, 5, residual=True, activation=activation)._replace(dtype="int8"), "fp32", out)
        if backend == "cpu":
            ready(problem)
        o = inputs.quantised(problem)
        o.residual[0, 2, 1, 1] = math.nan
        with backends.use(backend):
            result = conv_int8.execute(problem, o)
        value = result[0, 2, 1, 1].item()
        assert math.isnan(value) if out == "fp32" else value == (o.y_zero if activation != "identity" else 0)
        assert out == "uint8" or not result.isnan()[1:].any()


def test_weights_that_are_not_finite_are_refused():
    for name in ("weight", "mean"):
        o = inputs.quantised(PROBLEM)
        getattr(o, name).flatten()[0] = math.inf
        with pytest.raises(conv_int8.NotFinite):
            conv_int8.execute(PROBLEM, o)


def test_a_problem_says_what_it_moves():
    problem = Int8Problem(conv(64, 128, 10, 1, residual=True)._replace(dtype="int8"), "fp32", "uint8")
    assert problem.id == "n2c64h10w10k128r1s1-norm+residual+relu-int8-cpu-add_fp32-to_uint8"
    assert problem.bytes == 2 * 64 * 100 + 128 * (64 + 8) + 2 * 128 * 100 * 5
    assert (problem.flops, problem.layer.N, problem.C) == (2 * 2 * 128 * 100 * 64, 1, 64)
    assert len({p.id for p in INT8}) == len(INT8)


@pytest.mark.parametrize("low, high", [(0.0, 3.0), (-1.0, 2.0), (-4.0, -1.0), (0.5, 1.0), (-1e-3, 1e4), (0.0, 0.0)])
def test_a_scale_covers_its_range_and_zero(low, high):
    a = int8.affine(low, high)
    assert 0 <= a.zero <= 255 and int8.dequantize(torch.tensor(a.zero), a) == 0
    values = torch.linspace(low, high, 1001).reshape(1, 1, 7, 143)
    error = int8.dequantize(int8.quantize(values, a), a) - values
    assert error.abs().max() <= 0.501 * a.scale


def test_numbers_outside_of_the_range_and_nan_are_cut_off():
    a = int8.affine(-1.0, 2.0)
    x = torch.tensor([-9.0, 9.0, math.inf, -math.inf, math.nan]).reshape(1, 5, 1, 1)
    assert int8.quantize(x, a).flatten().tolist() == [0, 255, 255, 0, 0]
    for low, high in ((math.nan, 1.0), (0.0, math.inf), (2.0, 1.0)):
        with pytest.raises(ValueError, match="finite"):
            int8.affine(low, high)


def test_weights_are_rounded_to_the_nearest_by_filter():
    weight = torch.randn(6, 5, 3, 3) * torch.logspace(-6, 6, 6)[:, None, None, None]
    q, scale = int8.by_filter(weight)
    assert q.dtype is torch.int8 and q.flatten(1).abs().amax(1).eq(127).all()
    assert ((q * scale[:, None, None, None] - weight).abs() <= 0.501 * scale[:, None, None, None]).all()
    assert int8.by_filter(torch.zeros(2, 3, 1, 1))[1].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("kernel, stride, padding", [(3, 2, 1), (2, 2, 0), (3, 1, 1), ((1, 4), (2, 3), (0, 2))])
def test_the_pool_is_that_of_floats(kernel, stride, padding):
    x = torch.randint(0, 256, (2, 5, 17, 21), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    pair = lambda v: (v, v) if isinstance(v, int) else v
    result = conv_int8.max_pool(x, pair(kernel), pair(stride), pair(padding))
    assert result.dtype is torch.uint8 and result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(result.float(), F.max_pool2d(x.float(), kernel, stride, padding))
