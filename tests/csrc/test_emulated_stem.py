"""The CUDA kernel of stem, source unchanged, on the CPU's emulation of a GPU, beside the reference."""

import pytest
import torch

from fused_resnet import backends
from fused_resnet.kernels.cuda.stem import shared
from fused_resnet.ops.stem import FAMILY, StemProblem
from fused_resnet.problem import ACTIVATIONS
from fused_resnet.testing import inputs
from tests.csrc import test_emulated_conv as convs


def emulate(emulation, p, o, seed=0, aligned=True, limit=2):
    """y of one launch of at most `limit` blocks."""
    y = torch.empty(p.output_shape, dtype=o.x.dtype, memory_format=torch.channels_last)
    addresses, _alive = convs.addresses_of(o, y)
    emulation.stem(p.dtype, addresses, convs.sizes_of(p), o.x.stride(), ACTIVATIONS.index(p.activation), o.eps, aligned,
                   limit, seed)
    return y


# Tiles that end inside of the image, images smaller than a tile, windows that leave it on every side; strides that
# place the taps of a window at odd pixels; more filters than a tile has.
RESNET = StemProblem("cpu", "bf16", 1, 33, 37, 3, 64, 7, 7, (2, 2), (3, 3))
PROBLEMS = [
    RESNET,
    StemProblem("cpu", "fp16", 2, 9, 12, 3, 10, 7, 7, (2, 2), (3, 3), bias=True, activation="silu"),
    StemProblem("cpu", "bf16", 1, 20, 19, 1, 72, 5, 3, (1, 1), (2, 1), activation="relu6"),
    StemProblem("cpu", "fp16", 1, 18, 35, 4, 8, 3, 3, (1, 2), (1, 0), activation="identity"),
    StemProblem("cpu", "bf16", 3, 1, 1, 3, 5, 7, 7, (2, 2), (3, 3), activation="hardswish"),
    StemProblem("cpu", "bf16", 1, 12, 11, 2, 16, 2, 1, (3, 2), (0, 0)),
    StemProblem("cpu", "fp32", 1, 21, 24, 3, 64, 7, 7, (2, 2), (3, 3), bias=True),
    StemProblem("cpu", "fp32", 2, 7, 6, 3, 70, 3, 3, (1, 1), (1, 1), activation="silu"),
    StemProblem("cpu", "fp64", 1, 9, 10, 3, 33, 3, 3, (2, 1), (1, 1)),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)
def test_agrees_with_the_reference(emulation, problem):
    operands = inputs.make(problem)
    convs.agree(problem, operands, emulate(emulation, problem, operands), FAMILY)
    convs.guarded_run(lambda o: emulate(emulation, problem, o, aligned=False), problem, operands, FAMILY)


@pytest.mark.parametrize("lay", [
    lambda x: x.contiguous(), lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    lambda x: x.repeat(1, 2, 2, 1)[:, ::2, ::2], lambda x: x[:1].expand(x.shape)],
    ids=["nchw", "whcn", "step", "expand"])
def test_the_image_may_have_any_strides(emulation, lay):
    operands = inputs.make(PROBLEMS[1])
    operands = operands._replace(x=lay(operands.x))
    convs.agree(PROBLEMS[1], operands, emulate(emulation, PROBLEMS[1], operands), FAMILY)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("problem", [PROBLEMS[1], PROBLEMS[7]], ids=lambda p: p.id)
def test_what_is_no_number_goes_where_stock_sends_it(emulation, problem, value):
    problem = problem._replace(activation="identity")
    operands = inputs.make(problem)
    operands.x[0, 1, 3, 2], operands.x[1, 0, 4, 5] = value, -value  # one stands left of a window's first tap
    y, expected = emulate(emulation, problem, operands), backends.reference(FAMILY)(problem, operands)
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isfinite(), expected.isfinite())


def test_every_order_of_the_threads_and_number_of_blocks_gives_the_same_bits(emulation):
    operands = inputs.make(PROBLEMS[2])
    first, *others = (emulate(emulation, PROBLEMS[2], operands, seed, limit=1 + seed * 2) for seed in range(3))
    convs.agree(PROBLEMS[2], operands, first, FAMILY)
    assert all(torch.equal(first, other) for other in others)


def test_an_empty_batch(emulation):
    problem = RESNET._replace(N=0)
    assert emulate(emulation, problem, inputs.make(problem)).shape == problem.output_shape


@pytest.mark.parametrize(("N", "size", "K"), [(2, 29, 64), (1, 5, 130), (2**20, 224, 8)])
def test_tiles_cover_every_pooled_pixel_and_filter_once(emulation, N, size, K):
    p = RESNET._replace(N=N, H=size, W=size, K=K)
    tiles, (_, _, P, Q) = emulation.stem_place(convs.sizes_of(p), 0)[4], p.output_shape
    assert tiles == N * -(-P // 7) * -(-Q // 8) * -(-K // 64)
    some = range(tiles) if tiles < 10**4 else (0, 1, tiles // 3, tiles - 1)
    places = [emulation.stem_place(convs.sizes_of(p), tile)[:4] for tile in some]
    assert len(set(places)) == len(places)
    for n, row, column, filters in places:
        assert n < N and row < P and column < Q and filters < K and not (row % 7 or column % 8 or filters % 64)


def test_the_stem_of_resnet_fits_into_the_shared_memory_of_every_gpu_from_sm_80_on(emulation):
    """Three blocks of 16-bit elements on a Hopper's multiprocessor, two on an A100's, one on an sm_86's 99 KiB."""
    for dtype, room in (("bf16", 76 << 10), ("fp32", 99 << 10), ("fp64", 163 << 10)):
        problem = RESNET._replace(dtype=dtype, N=0)
        operands = inputs.make(problem)
        addresses, _alive = convs.addresses_of(operands, torch.empty(problem.output_shape, dtype=operands.x.dtype))
        sizes, strides = convs.sizes_of(problem), operands.x.stride()
        needed = emulation.stem(dtype, addresses, sizes, strides, 1, 1e-5, True, 1, 0)
        assert needed <= room and (dtype == "fp64" or needed == shared(problem))
