"""The sm_90a convolution, source unchanged, on the CPU's emulation of TMA, barriers, clusters and wgmma."""

import itertools

import pytest
import torch

from fused_resnet import backends, native
from fused_resnet.ops import conv_bn_act as family
from fused_resnet.problem import ACTIVATIONS, ConvProblem
from fused_resnet.testing import inputs
from fused_resnet.testing.memory import guarded
from tests.csrc import test_emulated_conv as convs
from tests.csrc.test_sm90 import SM90, sizes


def emulate(module, p, o, tile, seed=0, processors=2):
    """y of one launch on a GPU of so many multiprocessors: the fewer, the more tiles a block makes."""
    y = torch.full(p.output_shape, float("nan"), dtype=o.x.dtype).contiguous(memory_format=torch.channels_last)
    weight = o.weight.contiguous(memory_format=torch.channels_last)
    vectors = {name: getattr(o, name).float() for name in ("bias", "gamma", "beta", "mean", "var")
               if getattr(o, name) is not None}
    tensors = {"x": o.x, "weight": weight, "residual": o.residual, "y": y, **vectors}
    addresses = {name: t.data_ptr() for name, t in tensors.items() if t is not None}
    module.conv(p.dtype, addresses, sizes(p), ACTIVATIONS.index(p.activation), o.eps, tile, processors, seed)
    return y


# Tiles and channels that are ragged; blocks that take several tiles, and one; windows that leave the image everywhere.
PROBLEMS = [
    ConvProblem("cpu", "bf16", 1, 4, 4, 8, 8, 1, 1),
    ConvProblem("cpu", "bf16", 2, 9, 8, 16, 64, 3, 3, padding=(1, 1), residual=True),
    ConvProblem("cpu", "fp16", 1, 12, 13, 8, 24, 3, 3, stride=(2, 2), padding=(1, 1), activation="relu6"),
    ConvProblem("cpu", "bf16", 1, 17, 21, 72, 136, 1, 1, bias=True, activation="identity"),
    ConvProblem("cpu", "fp16", 3, 11, 12, 8, 8, 3, 2, padding=(2, 1), dilation=(2, 3), residual=True,
                activation="silu"),
    ConvProblem("cpu", "fp16", 1, 9, 9, 24, 72, 2, 3, padding=(2, 1), norm=False, bias=True, activation="hardswish"),
]
LARGE = [
    ConvProblem("cpu", "bf16", 2, 19, 17, 136, 192, 1, 1, stride=(2, 1), residual=True, bias=True),
    ConvProblem("cpu", "bf16", 3, 13, 15, 72, 136, 3, 3, padding=(1, 1), residual=True),
    ConvProblem("cpu", "fp16", 4, 7, 7, 64, 64, 7, 7, stride=(3, 5), padding=(5, 6), norm=False, residual=True),
    ConvProblem("cpu", "fp16", 5, 18, 16, 40, 200, 2, 2, stride=(1, 2), padding=(1, 0), activation="identity"),
]


@pytest.mark.parametrize("tile", SM90, ids=native.CONV_TILES.__getitem__)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)
def test_agrees_with_the_reference(sm90, problem, tile):
    operands = inputs.make(problem)
    with guarded() as guards:
        fenced = {name: guards.copy(value) for name, value in operands._asdict().items()
                  if isinstance(value, torch.Tensor) and value.is_floating_point()}
        y = emulate(sm90, problem, operands._replace(**fenced), tile)
        assert guards.touched() == 0
    convs.agree(problem, operands, y)


@pytest.mark.parametrize("tile", SM90, ids=native.CONV_TILES.__getitem__)
def test_every_order_of_threads_and_copies_gives_the_same_bits(sm90, tile):
    """What a missing wait, a wrong phase or an early release lets happen depends on the order of events."""
    problem = PROBLEMS[1]._replace(N=6, K=72)
    operands = inputs.make(problem)
    found = [emulate(sm90, problem, operands, tile, seed, processors)
             for seed, processors in zip(range(4), itertools.cycle((1, 2, 4)))]
    convs.agree(problem, operands, found[0])
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.gate
@pytest.mark.parametrize("tile", SM90, ids=native.CONV_TILES.__getitem__)
@pytest.mark.parametrize("problem", LARGE, ids=lambda p: p.id)
def test_many_tiles_in_many_orders(sm90, problem, tile):
    operands = inputs.make(problem)
    for seed, processors in ((0, 1), (1, 2), (2, 6)):
        convs.agree(problem, operands, emulate(sm90, problem, operands, tile, seed, processors))


@pytest.mark.parametrize("tile", SM90, ids=native.CONV_TILES.__getitem__)
def test_a_pixel_that_is_not_a_number_reaches_its_windows_alone(sm90, tile):
    problem = PROBLEMS[1]
    operands = inputs.make(problem)
    operands.x[1, 3, 4, 5] = float("nan")
    y = emulate(sm90, problem, operands, tile)
    assert torch.equal(y.isnan(), backends.reference(family.FAMILY)(problem, operands).isnan())
