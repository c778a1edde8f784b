"""Tiles that the heuristic leaves to tuning or takes for few problems, each forced over all that it is legal for."""

import functools
import itertools

import pytest
import torch

from fused_resnet.kernels.triton import conv_bn_act as family
from fused_resnet.kernels.triton import conv_bn_act_tma as tma
from fused_resnet.kernels.triton import launch
from fused_resnet.kernels.triton.legal import TMA, Tile, legal
from fused_resnet.problem import ACTIVATIONS
from fused_resnet.testing import inputs
from fused_resnet.testing.cases import CATALOGUE, conv
from tests.kernels.judge import agree, guarded_run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = ("tf32", "fp16", "bf16") if torch.cuda.is_available() else ("fp32", "fp16")
ARCH = 90
KINDS = {
    "gemm1x1": [Tile("gemm1x1", 64, 16, 16), Tile("gemm1x1", 64, 64, 32)],
    "gemm1x1 swap": [Tile("gemm1x1", 64, 64, 16, SWAP=True)],
    "gemm1x1 split": [Tile("gemm1x1", 64, 16, 16, SPLIT_K=2), Tile("gemm1x1", 64, 64, 16, SWAP=True, SPLIT_K=2)],
    "box": [Tile("box", 64, 16, 16), Tile("box", 64, 64, 16)],
    "box swap": [Tile("box", 64, 64, 16, SWAP=True)],
    "box split": [Tile("box", 64, 16, 16, SPLIT_K=2), Tile("box", 64, 64, 16, SWAP=True, SPLIT_K=4)],
    "ws": [Tile("ws", 64, 16, 16), Tile("ws", 64, 64, 16, SWAP=True)],
    "split": [Tile("gemm", 64, 16, 16, SPLIT_K=2), Tile("gemm", 64, 32, 16, SPLIT_K=7)],
    "grouped": [Tile("grouped", 64, 16, 16), Tile("grouped", 64, 32, 32), Tile("grouped", 64, 32, 16),
                Tile("grouped", 64, 16, 32)],
}
# Several tiles in every direction, none of them full; strides that take each remainder; lone rows and columns.
POINTWISE = [conv(40, 72, (9, 8), 1, n=3, residual=True), conv(24, 24, 13, 1, n=1, bias=True, norm=False),
             *[conv(32, 24, 5, 1, n=3, residual=True, activation=activation) for activation in ACTIVATIONS]]
WINDOWS = [conv(32, 24, (9, 11), n=3, residual=True), conv(16, 24, (10, 14), 3, n=3, stride=2, residual=True),
           conv(16, 40, (9, 12), (2, 5), stride=(3, 2), padding=(4, 3)),
           conv(16, 16, (12, 9), 3, dilation=(3, 2), stride=(2, 1), bias=True, norm=False),
           conv(16, 16, (1, 70), (1, 7)), conv(16, 16, (16, 8), 7, stride=2),
           *[conv(16, 24, 5, residual=True, activation=activation) for activation in ACTIVATIONS]]
MORE = {
    "gemm1x1": [*POINTWISE, *[conv(40, 24, 5, 1, prologue=activation) for activation in ACTIVATIONS]],
    "gemm1x1 swap": POINTWISE, "gemm1x1 split": [*POINTWISE, conv(40, 24, 5, 1, prologue="silu")],
    "box": [*WINDOWS, *[conv(16, 16, size, 1, stride=2, padding=0) for size in ((9, 7), (8, 6))],
            conv(16, 16, 1, 1, n=70), conv(64, 32, (5, 7), groups=2, residual=True),
            conv(32, 64, (6, 10), groups=2, stride=2, prologue="relu"),
            *[conv(16, 24, 5, prologue=activation, residual=True) for activation in ACTIVATIONS]],
    "box swap": [*WINDOWS, *[conv(16, 64, size, 1, stride=2, padding=0) for size in ((9, 7), (8, 6))],
                 conv(32, 128, 5, groups=2)],
    "box split": [*WINDOWS, conv(64, 32, (5, 7), groups=2, residual=True, prologue="relu")],
    "ws": [*WINDOWS, *[conv(16, 16, size, 1, stride=2, padding=0) for size in ((9, 7), (8, 6))],
           conv(16, 16, 1, 1, n=70), conv(48, 72, (9, 8), 1, n=3, residual=True),
           conv(16, 24, 13, 1, n=1, bias=True, norm=False)],
    "split": [conv(32, 24, (9, 11), residual=True), conv(48, 40, 6, 1, n=3, activation="silu")],
    "grouped": [conv(64, 64, (9, 7), groups=16, residual=True), conv(32, 64, 6, groups=8, stride=2),
                conv(64, 32, 5, groups=16, dilation=2, prologue="relu"), conv(16, 16, 7, 5, groups=2),
                conv(64, 64, 5, 1, groups=8, activation="hardswish")],
}
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def legal_pairs():
    """(problem, tile) for every problem that a kind's tiles are legal for, in every dtype."""
    for kind, shapes in KINDS.items():
        pairs = [*itertools.product(MORE[kind], shapes), *itertools.product(CATALOGUE, shapes[:1])]
        for (problem, tile), dtype in itertools.product(pairs, DTYPES):
            problem = problem._replace(dtype=dtype, device=DEVICE)
            if legal(tile, problem, ARCH) is None:
                yield problem, tile


CASES = list(legal_pairs())


@pytest.mark.parametrize(("problem", "tile"), CASES, ids=[f"{tile}-{problem.id}" for problem, tile in CASES])
def test_agrees_with_stock(problem, tile):
    operands = inputs.make(problem)
    agree(problem, operands, guarded_run(functools.partial(family.forward, tile=tile), problem, operands))


def test_every_kind_is_legal_for_enough_of_the_catalogue():
    own = {kind: set(problems) for kind, problems in MORE.items()}
    for kind, shapes in KINDS.items():
        reached = {problem._replace(dtype="fp32", device="cpu") for problem, tile in CASES if tile in shapes}
        assert own[kind] <= reached, f"{kind}: {own[kind] - reached} runs on no tile"
        assert len(reached) > len(own[kind]), f"{kind} runs nothing of the catalogue"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", [
    conv(32, 32, 5, groups=8), conv(32, 64, (9, 8), groups=8, stride=2, residual=True)],
                         ids=lambda p: p.id)
def test_nan_and_inf_stay_in_their_group(problem, dtype):
    problem = problem._replace(dtype=dtype, device=DEVICE)
    operands = inputs.make(problem)
    operands.x[0, 5, 1, 2], operands.x[1, 17, 3, 0] = float("nan"), float("inf")
    operands.weight[-1] = float("nan")
    result = family.forward(problem, operands, KINDS["grouped"][2 * (problem.K > 32)])
    own = problem.K // 8
    assert result[0, 2 * own:-1].isfinite().all() and result[0, own:2 * own].isnan().any()
    assert result[:, -1].isnan().all()
    agree(problem, operands, result)


@pytest.mark.parametrize("kind", KINDS)
def test_repeated_runs_give_the_same_bits(kind):
    problem, tile = MORE[kind][0]._replace(device=DEVICE, dtype=DTYPES[-1]), KINDS[kind][0]
    operands = inputs.make(problem)
    first, second = (family.forward(problem, operands, tile) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", ["split", "grouped"])
def test_long_offsets_give_the_same_bits(kind, monkeypatch):
    problem, tile = MORE[kind][0]._replace(device=DEVICE, dtype=DTYPES[0]), KINDS[kind][0]
    operands = inputs.make(problem)
    short = family.forward(problem, operands, tile)
    family.constants.cache_clear()
    monkeypatch.setattr(family, "LARGEST_INDEX", 0)
    assert family.constants(problem, tile)["WIDE"]
    assert torch.equal(short, family.forward(problem, operands, tile))
    family.constants.cache_clear()


@pytest.mark.parametrize("kind", TMA)
def test_a_tensor_that_no_descriptor_can_stand_for_takes_the_shipped_tile(kind, monkeypatch):
    problem, tile = MORE[kind][0]._replace(device=DEVICE, dtype=DTYPES[0]), KINDS[kind][0]
    operands = inputs.make(problem)
    flat = operands.x.new_empty(operands.x.numel() + 1)[1:]
    moved = operands._replace(x=flat.as_strided(operands.x.shape, operands.x.stride(), 1).copy_(operands.x))
    assert moved.x.data_ptr() % 16
    monkeypatch.setattr(tma, "bind", None)
    agree(problem, moved, family.forward(problem, moved, tile))


def test_descriptors_are_cached_by_address_and_keep_no_memory_alive():
    tensor = torch.empty(4, 8, device="meta")
    first, second = (launch.descriptor(tensor, (4, 8), (8, 1), (2, 8)) for _ in range(2))
    assert first is second and first is not launch.descriptor(tensor, (4, 8), (8, 1), (4, 8))
    assert not isinstance(first.base, torch.Tensor)
    assert (first.base.data_ptr(), first.base.dtype) == (tensor.data_ptr(), tensor.dtype)
