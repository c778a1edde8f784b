"""The CUDA kernels of conv_bn_act for sm_80, source unchanged, emulated on the CPU, beside the reference."""

import pytest
import torch

from fused_resnet import backends, numerics
from fused_resnet.ops import conv_bn_act as family
from fused_resnet.problem import ACTIVATIONS, ConvProblem
from fused_resnet.testing import inputs
from fused_resnet.testing.memory import guarded

VECTORS = ("bias", "gamma", "beta", "mean", "var", "pre_gamma", "pre_beta", "pre_mean", "pre_var")


def addresses_of(o, y):
    """What a kernel reads and writes, and what must live while it does."""
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    vectors = {name: getattr(o, name).to(wide) for name in VECTORS if getattr(o, name) is not None}
    weight = o.weight.contiguous(memory_format=torch.channels_last)
    tensors = {"x": o.x, "weight": weight, "residual": o.residual, "y": y, **vectors}
    return {name: t.data_ptr() for name, t in tensors.items() if t is not None}, tensors


def sizes_of(p):
    return [p.N, p.H, p.W, p.C, p.K, p.R, p.S, p.P, p.Q, *p.stride, *p.padding, *p.dilation, p.groups]


def emulate(emulation, p, o, seed=0, aligned=True, filters=0):
    """y of one launch; `aligned` says that y and the residual start at a multiple of 16 bytes."""
    y = torch.empty(p.output_shape, dtype=o.x.dtype, memory_format=torch.channels_last)
    addresses, _alive = addresses_of(o, y)
    emulation.conv(p.dtype, addresses, sizes_of(p), ACTIVATIONS.index(p.activation), o.eps,
                   ACTIVATIONS.index(p.prologue or "identity"), o.pre_eps, aligned, seed, filters)
    return y


def agree(p, o, y, name=family.FAMILY):
    reference = backends.reference(name)
    exact = reference(p._replace(dtype="fp64"), backends.widen(o))
    if p.dtype == "fp64":  # the yardstick, stock's own error against fp64, would be 0
        torch.testing.assert_close(y, exact, rtol=1e-12, atol=1e-12)
        return
    bound = numerics.check(y, reference(p, o), exact, dtype=p.dtype, depth=p.depth)
    assert bound.ok, f"{p.id}: {bound}"


def guarded_run(run, p, o, name=family.FAMILY):
    """`run` with every tensor between guard bands, which start at no multiple of 16 bytes."""
    with guarded() as guards:
        fenced = {name: guards.copy(value) for name, value in o._asdict().items()
                  if isinstance(value, torch.Tensor) and value.is_floating_point()}
        y = run(o._replace(**fenced))
        assert guards.touched() == 0
    agree(p, o, y, name)


# Tiles that end inside of the image, of the filters and of the depth; windows that leave the image on every side.
PROBLEMS = [
    ConvProblem("cpu", "bf16", 1, 4, 4, 8, 8, 1, 1),
    ConvProblem("cpu", "bf16", 2, 9, 8, 16, 64, 3, 3, padding=(1, 1), residual=True),
    ConvProblem("cpu", "fp16", 1, 12, 13, 8, 24, 3, 3, stride=(2, 2), padding=(1, 1), activation="relu6"),
    ConvProblem("cpu", "bf16", 1, 7, 9, 40, 136, 1, 1, stride=(2, 1), bias=True, activation="identity"),
    ConvProblem("cpu", "fp16", 3, 5, 6, 8, 5, 3, 2, padding=(2, 1), dilation=(2, 1), residual=True, activation="silu"),
    ConvProblem("cpu", "fp16", 1, 6, 6, 24, 72, 5, 3, padding=(2, 1), norm=False, bias=True, activation="hardswish"),
    ConvProblem("cpu", "fp32", 2, 7, 9, 12, 40, 3, 3, (2, 1), (1, 1), residual=True),
    ConvProblem("cpu", "fp32", 1, 12, 12, 8, 72, 1, 1, bias=True, activation="silu"),
    ConvProblem("cpu", "fp64", 1, 5, 5, 6, 10, 3, 3, padding=(1, 1), activation="hardswish"),
]
# Of 4, 8, 16, 32 and 64 channels; bundles that end behind the last group; groups that share no size with a tile.
GROUPED = [
    ConvProblem("cpu", "bf16", 1, 7, 6, 32, 32, 3, 3, padding=(1, 1), groups=8),
    ConvProblem("cpu", "fp16", 2, 6, 7, 48, 48, 3, 3, (2, 2), (1, 1), groups=6, residual=True),
    ConvProblem("cpu", "bf16", 1, 5, 9, 48, 48, 3, 3, padding=(1, 1), groups=3, bias=True),
    ConvProblem("cpu", "fp16", 1, 6, 6, 64, 64, 3, 3, padding=(1, 1), groups=2),
    ConvProblem("cpu", "bf16", 1, 4, 5, 128, 144, 1, 3, groups=2, activation="identity"),
    ConvProblem("cpu", "fp16", 2, 5, 5, 30, 20, 3, 2, (1, 2), (2, 1), (2, 1), groups=5, activation="relu6"),
    ConvProblem("cpu", "fp32", 1, 6, 5, 20, 30, 3, 3, padding=(1, 1), groups=5),
    ConvProblem("cpu", "fp32", 1, 5, 5, 48, 24, 3, 3, padding=(1, 1), groups=2),
]
DEPTHWISE = [
    ConvProblem("cpu", "bf16", 2, 9, 7, 72, 72, 3, 3, (2, 1), (1, 1), groups=72, residual=True),
    ConvProblem("cpu", "fp16", 1, 5, 6, 5, 15, 3, 2, (1, 1), (2, 1), (2, 1), groups=5, bias=True, activation="silu"),
    ConvProblem("cpu", "fp32", 1, 6, 6, 8, 16, 5, 5, padding=(2, 2), groups=8, norm=False),
    ConvProblem("cpu", "bf16", 1, 13, 12, 8, 8, 12, 11, padding=(5, 5), groups=8),
    ConvProblem("cpu", "fp64", 1, 4, 4, 3, 3, 3, 3, padding=(1, 1), groups=3),
]
RAGGED = [
    ConvProblem("cpu", "bf16", 2, 6, 5, 3, 16, 3, 3, padding=(1, 1)),
    ConvProblem("cpu", "fp16", 1, 5, 5, 20, 33, 3, 3, padding=(1, 1), residual=True),
    ConvProblem("cpu", "bf16", 1, 1, 1, 1, 1, 3, 3, padding=(1, 1), activation="identity"),
    ConvProblem("cpu", "fp32", 1, 5, 4, 3, 7, 2, 2, bias=True),
    ConvProblem("cpu", "fp16", 1, 4, 5, 12, 8, 3, 3, padding=(1, 1)),
]
PROLOGUES = [
    ConvProblem("cpu", "bf16", 2, 6, 7, 16, 24, 3, 3, padding=(1, 1), prologue="relu"),
    ConvProblem("cpu", "fp16", 1, 7, 6, 40, 72, 3, 3, (2, 2), (1, 1), prologue="silu", residual=True),
    ConvProblem("cpu", "bf16", 1, 5, 5, 8, 136, 1, 1, prologue="identity"),
    ConvProblem("cpu", "fp16", 1, 5, 5, 11, 9, 3, 3, padding=(2, 1), prologue="hardswish"),
    ConvProblem("cpu", "bf16", 1, 5, 6, 24, 24, 3, 3, padding=(1, 1), groups=6, prologue="relu6"),
    ConvProblem("cpu", "fp16", 1, 5, 5, 20, 20, 3, 3, padding=(1, 1), groups=20, prologue="relu"),
    ConvProblem("cpu", "fp32", 1, 5, 5, 8, 12, 3, 3, padding=(1, 1), prologue="relu"),
    ConvProblem("cpu", "fp32", 1, 5, 5, 6, 12, 3, 3, padding=(1, 1), groups=6, prologue="relu"),
]
EVERY = [*PROBLEMS, *GROUPED, *DEPTHWISE, *RAGGED, *PROLOGUES]


@pytest.mark.parametrize("problem", EVERY, ids=lambda p: p.id)
def test_agrees_with_the_reference(emulation, problem):
    operands = inputs.make(problem)
    agree(problem, operands, emulate(emulation, problem, operands))
    guarded_run(lambda o: emulate(emulation, problem, o, aligned=False), problem, operands)


def test_a_forced_tile_gives_the_same_bits(emulation):
    operands = inputs.make(PROBLEMS[1])
    first, *others = (emulate(emulation, PROBLEMS[1], operands, filters=n) for n in (8, 16, 32, 64, 128))
    agree(PROBLEMS[1], operands, first)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("problem", [PROBLEMS[1], GROUPED[0], DEPTHWISE[0], PROLOGUES[0]], ids=lambda p: p.id)
def test_every_order_of_the_threads_gives_the_same_bits(emulation, problem):
    """What a missing barrier or wait lets happen depends on the order in which threads run."""
    operands = inputs.make(problem)
    first, *others = (emulate(emulation, problem, operands, seed) for seed in range(4))
    agree(problem, operands, first)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("problem", [PROBLEMS[1], GROUPED[0], GROUPED[2], DEPTHWISE[0], RAGGED[1]], ids=lambda p: p.id)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_reaches_its_windows_and_its_group_alone(emulation, problem, value):
    operands = inputs.make(problem)
    operands.x[-1, 1, 3, 4] = value
    y, expected = emulate(emulation, problem, operands), backends.reference(family.FAMILY)(problem, operands)
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isfinite(), expected.isfinite())


@pytest.mark.parametrize("problem", [EVERY[1], GROUPED[0], DEPTHWISE[0]], ids=lambda p: p.id)
def test_an_empty_batch(emulation, problem):
    problem = problem._replace(N=0)
    assert emulate(emulation, problem, inputs.make(problem)).shape == problem.output_shape
