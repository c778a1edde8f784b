"""The CUDA kernel of conv_bn_act for sm_80, source unchanged, on the CPU's emulation of a GPU, beside the reference."""

import pytest
import torch

from fused_resnet import backends, native, numerics
from fused_resnet.ops import conv_bn_act as family
from fused_resnet.problem import ACTIVATIONS, ConvProblem
from fused_resnet.testing import inputs
from fused_resnet.testing.memory import guarded

VECTORS = ("bias", "gamma", "beta", "mean", "var")


def emulate(emulation, p, o, seed=0, aligned=True, tile=-1):
    """y of one launch; `aligned` says that the tensors start at a multiple of 16 bytes."""
    y = torch.empty(p.output_shape, dtype=o.x.dtype, memory_format=torch.channels_last)
    weight = o.weight.contiguous(memory_format=torch.channels_last)
    vectors = {name: getattr(o, name).float() for name in VECTORS if getattr(o, name) is not None}
    tensors = {"x": o.x, "weight": weight, "residual": o.residual, "y": y, **vectors}
    addresses = {name: t.data_ptr() for name, t in tensors.items() if t is not None}
    sizes = [p.N, p.H, p.W, p.C, p.K, p.R, p.S, p.P, p.Q, *p.stride, *p.padding, *p.dilation, p.groups]
    emulation.conv(p.dtype, addresses, sizes, ACTIVATIONS.index(p.activation), o.eps, aligned, seed,
                   tile)
    return y


def agree(p, o, y):
    reference = backends.reference("conv_bn_act")
    exact = reference(p._replace(dtype="fp64"), backends.widen(o))
    bound = numerics.check(y, reference(p, o), exact, dtype=p.dtype, depth=p.depth)
    assert bound.ok, f"{p.id}: {bound}"


# Tiles that end inside of the image, of the filters and of the depth; windows that leave the image on every side.
PROBLEMS = [
    ConvProblem("cpu", "bf16", 1, 4, 4, 8, 8, 1, 1),
    ConvProblem("cpu", "bf16", 2, 9, 8, 16, 64, 3, 3, padding=(1, 1), residual=True),
    ConvProblem("cpu", "fp16", 1, 12, 13, 8, 24, 3, 3, stride=(2, 2), padding=(1, 1), activation="relu6"),
    ConvProblem("cpu", "bf16", 1, 7, 9, 40, 136, 1, 1, stride=(2, 1), bias=True, activation="identity"),
    ConvProblem("cpu", "fp16", 3, 5, 6, 8, 5, 3, 2, padding=(2, 1), dilation=(2, 1), residual=True, activation="silu"),
    ConvProblem("cpu", "fp16", 1, 6, 6, 24, 72, 5, 3, padding=(2, 1), norm=False, bias=True, activation="hardswish"),
]



def test_a_forced_tile_gives_the_same_bits(emulation):
    operands = inputs.make(PROBLEMS[1])
    found = [emulate(emulation, PROBLEMS[1], operands, tile=native.CONV_TILES.index(f"mma_128x{n}")) for n in (64, 128)]
    agree(PROBLEMS[1], operands, found[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)
def test_agrees_with_the_reference(emulation, problem):
    operands = inputs.make(problem)
    with guarded() as guards:
        fenced = {name: guards.copy(value) for name, value in operands._asdict().items()
                  if isinstance(value, torch.Tensor) and value.is_floating_point()}
        y = emulate(emulation, problem, operands._replace(**fenced), aligned=False)
        assert guards.touched() == 0
    agree(problem, operands, y)


def test_every_order_of_the_threads_gives_the_same_bits(emulation):
    """What a missing barrier or wait lets happen depends on the order in which threads run."""
    problem = PROBLEMS[1]
    operands = inputs.make(problem)
    first, *others = (emulate(emulation, problem, operands, seed) for seed in range(4))
    agree(problem, operands, first)
    assert all(torch.equal(first, other) for other in others)


def test_a_pixel_that_is_not_a_number_reaches_its_windows_alone(emulation):
    problem = PROBLEMS[1]
    operands = inputs.make(problem)
    operands.x[1, 3, 4, 5] = float("nan")
    y = emulate(emulation, problem, operands)
    assert torch.equal(y.isnan(), backends.reference(family.FAMILY)(problem, operands).isnan())
