"""Method `grouped` of `_conv_packed`: groups of few channels, beside the reference on every instruction set."""

import pytest
import torch

from fused_resnet import numerics
from fused_resnet.kernels.cpu import conv_bn_act, packed
from fused_resnet.testing import inputs
from fused_resnet.testing.cases import conv
from fused_resnet.testing.memory import BAND, Guards

pytestmark = pytest.mark.usefixtures("library")
OPS = torch.ops.fused_resnet
NAN = float("nan")


def grouped(c, of, size, kernel=3, **flags):
    return conv(c, c, size, kernel, groups=c // of, **flags)


PROBLEMS = [
    # Channels: whole vectors, a last vector that reaches back, by 15 lanes or one.
    grouped(16, 1, 9), grouped(17, 1, (5, 8), residual=True), grouped(24, 4, 7, residual=True),
    grouped(31, 1, 6, residual=True, activation="silu"), grouped(40, 8, (6, 15), residual=True, activation="relu6"),
    grouped(32, 2, (4, 23), activation="hardswish"), grouped(48, 4, 11), grouped(96, 8, 8, activation="identity"),
    grouped(18, 2, 6, residual=True), grouped(128, 4, 14, n=1),
    # Kernels: rows of one to eight taps, strides with a path of their own and without, dilation, much padding.
    grouped(24, 1, 15, stride=2), grouped(32, 4, (9, 30), stride=2, residual=True), grouped(24, 1, 9, 5),
    grouped(32, 8, 10, 7, residual=True), grouped(16, 2, 8, 5, stride=2), grouped(40, 1, 12, 5, dilation=2),
    grouped(24, 4, (9, 12), dilation=(2, 3), residual=True), grouped(16, 1, 17, 3, stride=3),
    grouped(20, 4, 7, (1, 4), padding=(0, 2)), grouped(24, 8, 8, (5, 1), padding=(2, 0), stride=(2, 1)),
    grouped(16, 1, (3, 8), 6, padding=(4, 3)), grouped(24, 2, 6, 1), grouped(16, 8, 5, 1, stride=2, residual=True),
    grouped(16, 4, (4, 6), 2, padding=(3, 0)), grouped(16, 1, 5, (3, 8), padding=(1, 4), stride=(1, 2)),
    # Padding that is longer than the image, a single pixel, nothing at all.
    grouped(16, 1, 1), grouped(24, 4, 1, 7, residual=True), grouped(32, 1, 2, 5, dilation=3, n=3),
    grouped(16, 8, 4, n=0, residual=True), grouped(16, 1, 3, bias=True, norm=False),
]


def pack(p, o, isa=""):
    return OPS._conv_pack(o.weight, *o[2:7], o.eps, p.dilation, p.groups, "grouped", isa)


def launch(p, y, x, weights, residual):
    OPS._conv_packed(y, x, weights, residual, (p.R, p.S), p.stride, p.padding, p.dilation, p.groups, p.activation,
                     "grouped")
    return y


def image(p):
    return torch.full(p.output_shape, NAN, dtype=numerics.DTYPES[p.dtype]).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)
def test_results_are_right_and_memory_around_them_is_left_alone(problem, dtype, isa):
    """Out of place and into the residual; y is full of NaN before, x lies among NaN."""
    p = problem._replace(dtype=dtype)
    o, guards = inputs.make(p), Guards()
    x = o.x.new_full((o.x.numel() + 2 * BAND,), NAN).as_strided(o.x.shape, o.x.stride(), BAND).copy_(o.x)
    weights, y = pack(p, o, isa), guards.empty(image(p))
    launch(p, y, x, weights, o.residual)
    bound = numerics.check(y, inputs.stock(p, o), inputs.stock(p, o, torch.float64), dtype=dtype, depth=p.depth)
    assert bound.ok, str(bound)
    if p.residual:
        own = guards.copy(o.residual)
        # A last vector that reaches back finishes its own channels one by one, which may round otherwise.
        bound = numerics.check(launch(p, own, x, weights, own), inputs.stock(p, o), inputs.stock(p, o, torch.float64),
                               dtype=dtype, depth=p.depth)
        assert bound.ok, f"into the residual: {bound}"
    assert guards.touched() == 0 and torch.equal(x, o.x)


@pytest.mark.parametrize("activation", ["identity", "relu", "relu6", "silu", "hardswish"])
def test_nan_and_inf_stand_exactly_where_stock_has_them(activation, isa):
    for p in (grouped(24, 1, 9, residual=True, activation=activation), grouped(24, 4, 9, 5, activation=activation)):
        o = inputs.make(p)
        o.x[0, 3, 1, 2], o.x[1, 0, 4, 4], o.x[1, 5, 0, 0] = NAN, float("inf"), -float("inf")
        if p.residual:
            o.residual[0, 1, 3, 3], o.residual[1, 2, 2, 1] = NAN, -float("inf")
        found, stock = launch(p, image(p), o.x, pack(p, o, isa), o.residual), inputs.stock(p, o, torch.float64)
        # Channels of a group see each other's weights alone: no value crosses to another group.
        assert torch.isnan(stock).any() and torch.equal(torch.isnan(found), torch.isnan(stock))
        infinite = torch.isinf(stock)
        assert torch.equal(torch.isinf(found), infinite) and torch.equal(found[infinite].double(), stock[infinite])


@pytest.mark.parametrize("activation", ["silu", "hardswish"])
def test_activations_of_every_size_of_sum(activation, isa):
    """Their vectors beside fp64, from where e^x is 0 to where it is infinite."""
    values = torch.cat([torch.linspace(-110, 110, 16 * 400), torch.linspace(-1e-3, 1e-3, 16 * 16)])
    x = values.view(1, 1, -1, 16).permute(0, 3, 1, 2)
    p = grouped(16, 1, tuple(x.shape[2:]), 1, n=1, norm=False, activation=activation)
    weights = OPS._conv_pack(torch.ones(16, 1, 1, 1), *[None] * 5, 0.0, (1, 1), 16, "grouped", isa)
    found = launch(p, image(p), x, weights, None)
    act = getattr(torch.nn.functional, activation)
    exact = act(x.double())
    bound = numerics.check(found, act(x), exact, dtype="fp32", depth=1)
    assert bound.ok, str(bound)
    near = exact.abs() > 1e-30
    assert float(((found - exact) / exact)[near].abs().max()) <= 8 * numerics.EPS["fp32"]


@pytest.mark.parametrize("of", packed.GROUPED)
def test_results_do_not_depend_on_the_number_of_threads(of, isa):
    p = grouped(136, of, (37, 160), 5, n=3, residual=True)
    o, found, before = inputs.make(p), [], torch.get_num_threads()
    weights = pack(p, o, isa)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(launch(p, image(p), o.x, weights, o.residual))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_what_it_takes(isa):
    for p in (grouped(15, 1, 4), grouped(48, 3, 4), grouped(32, 16, 4), conv(16, 32, 4, groups=16), conv(32, 32, 4)):
        assert "grouped takes groups of" in packed.refuse(p, "grouped")
        if p.C >= 16:
            with pytest.raises(RuntimeError, match="grouped takes groups of 1, 2, 4 or 8 channels"):
                pack(p, inputs.make(p), isa)
    assert packed.refuse(grouped(17, 1, 4), "grouped") is None


@pytest.mark.parametrize("problem", [grouped(128, 4, 14), grouped(256, 8, 7), grouped(576, 1, 7, n=1)],
                         ids=lambda p: p.id)
def test_the_default_and_a_forced_tile_agree_with_the_reference(problem):
    o = inputs.make(problem)
    for tile in (None, conv_bn_act.Tile("grouped")):
        bound = numerics.check(conv_bn_act.forward(problem, o, tile), inputs.stock(problem, o),
                               inputs.stock(problem, o, torch.float64), dtype="fp32", depth=problem.depth)
        assert bound.ok, f"{tile}: {bound}"
