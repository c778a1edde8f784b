"""Triton's conv_bn_stats: u against stock in fp64, the statistics against those of the stored u in fp64."""

import pytest
import torch

from fused_resnet import backends
from fused_resnet.kernels.triton import conv_bn_act
from fused_resnet.kernels.triton import conv_bn_stats as kernel
from fused_resnet.kernels.triton.legal import Tile
from fused_resnet.testing.cases import RAGGED, TINY, conv
from tests.kernels.training import agree_stats, run, stats_operands, stats_problem

DTYPES = ("fp32", "tf32", "fp16", "bf16") if torch.cuda.is_available() else ("fp32", "fp16")
FEATURES = [conv(24, 20, (7, 5), prologue="relu", bias=True), conv(40, 16, 6, groups=2, dilation=2, prologue="relu6"),
            conv(16, 24, 5, 1, stride=2, prologue="identity"), conv(32, 32, 4, groups=8, prologue="relu", bias=True),
            conv(3, 16, 9, 7, stride=2), conv(16, 64, 3, n=1, prologue="silu")]
PROBLEMS = list(dict.fromkeys(stats_problem(p) for p in TINY + RAGGED + FEATURES if p.N and not p.depthwise))
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)
def test_agrees_with_stock(problem, dtype, device):
    problem = problem._replace(dtype=dtype, device=device)
    assert kernel.refuse(problem) is None
    operands = stats_operands(problem)
    agree_stats(problem, operands, run(kernel.forward, problem, operands))


@pytest.mark.parametrize(("problem", "tile"), [
    (conv(24, 72, (5, 7), n=3), Tile("gemm", 16, 64, 16, SWAP=True)),
    (conv(24, 72, (5, 7), n=3, bias=True), Tile("gemm", 32, 16, 16, SWAP=True)),
    (conv(24, 40, (5, 7), n=3, prologue="relu"), Tile("gemm", 64, 16, 32)),
    (conv(32, 32, (5, 3), n=3, groups=8, prologue="relu"), Tile("grouped", 16, 16, 16)),
    (conv(24, 40, (5, 7), 1, n=3, prologue="relu", bias=True), Tile("gemm1x1", 32, 16, 16)),
    (conv(40, 72, (5, 7), 1, n=3, bias=True), Tile("gemm1x1", 32, 64, 16, SWAP=True)),
    (conv(16, 16, 3, n=1), Tile("gemm", 64, 16, 16))], ids=lambda v: str(v) if isinstance(v, Tile) else v.id)
def test_other_tiles_agree(problem, tile, device):
    problem = stats_problem(problem)._replace(device=device)
    operands = stats_operands(problem)
    if device == "cuda" and (reason := kernel.lawful(tile, problem, conv_bn_act.arch_of(operands.x.device))):
        pytest.skip(reason)
    agree_stats(problem, operands, run(kernel.with_tile(vars(tile)), problem, operands))


@pytest.mark.parametrize("pivot", [None, 0.0, 0.999])
@pytest.mark.parametrize("mean", [1e3, -1e4])
def test_a_mean_far_beyond_the_deviation_costs_no_digits(mean, pivot, device):
    """`agree_stats` asks for as many digits as the pivot allows: with one near the mean, for all of them."""
    problem = stats_problem(conv(16, 24, 12, 1, bias=True))._replace(device=device)
    operands = stats_operands(problem)
    operands.bias.add_(mean)
    if pivot is not None:
        operands = operands._replace(mean=torch.full((24,), pivot * mean, device=device))
    u, _, var = result = kernel.with_tile(vars(Tile("gemm", 32, 16, 16)))(problem, operands)
    agree_stats(problem, operands, result)
    exact = u.double().var((0, 2, 3), correction=0)
    assert ((var.double() - exact).abs() <= 1e-3 * exact).all()


@pytest.mark.parametrize(("one", "block"), [(4, 2), (1, 2), (0, 4), (100, 8)])
def test_tiles_are_joined_whatever_their_number(one, block, device, monkeypatch):
    """37 tiles: in one launch of several steps, and in two to six launches."""
    problem = stats_problem(conv(16, 16, (14, 14), 1, n=3))._replace(device=device)
    monkeypatch.setattr(kernel, "ONE_LAUNCH", one)
    monkeypatch.setitem(kernel.JOIN, "BLOCK_T", block)
    operands = stats_operands(problem)
    operands.x[2].add_(50.0)  # the tiles' means differ
    forward = kernel.with_tile(vars(Tile("gemm", 16, 16, 16)))
    agree_stats(problem, operands, run(forward, problem, operands))


def test_many_tiles_keep_their_digits(device):
    """Tiles of 128 elements of 256 images of 112 x 112, whose means drift with the image, joined in two launches."""
    problem = stats_problem(conv(16, 4, 112, 1, n=256))._replace(device=device)
    count = 256 * 112 * 112 // 128
    means = (torch.randn(count, 4) * 0.1 + torch.linspace(-3.0, 3.0, count)[:, None]).to(device)
    squares = (torch.rand(count, 4) * 256.0).to(device)
    mean, var = kernel.join(problem, stats_operands(problem._replace(N=1)), (means, squares), 128)
    far = means.double()
    exact = far.mean(0)
    spread = far.var(0, correction=0) + squares.double().sum(0) / (128 * count)
    assert ((mean[0].double() - exact).abs() <= 16 * 2.0**-24 * far.abs().mean(0)).all()
    assert ((var[0].double() - spread).abs() <= 16 * 2.0**-24 * spread).all()


@pytest.mark.parametrize("problem", [conv(16, 16, 5, n=3), conv(32, 32, 4, groups=8), conv(24, 16, 4, prologue="relu")],
                         ids=lambda p: p.id)
def test_nan_and_inf_stay_in_their_channels(problem, device):
    problem = stats_problem(problem)._replace(device=device)
    operands = stats_operands(problem)
    operands.x[0, 1, 2, 2], operands.x[1, 0, 0, 0] = float("nan"), float("inf")
    u, mean, var = result = run(kernel.forward, problem, operands)
    agree_stats(problem, operands, result)
    assert mean.isnan().any() and var.isnan().any()
    if problem.groups > 1:
        assert u[:, 4:].isfinite().all() and mean[4:].isfinite().all() and var[4:].isfinite().all()


def test_sixty_four_bit_offsets_give_the_same(device, monkeypatch):
    problem = stats_problem(conv(20, 36, (7, 4), (3, 5), stride=(2, 1), prologue="relu"))._replace(device=device)
    operands = stats_operands(problem)
    expected = kernel.forward(problem, operands)
    monkeypatch.setattr(conv_bn_act, "LARGEST_INDEX", 100)
    conv_bn_act.constants.cache_clear()
    try:
        assert conv_bn_act.constants(problem, kernel.pick(problem, 90))["WIDE"]
        for one, other in zip(kernel.forward(problem, operands), expected, strict=True):
            assert torch.equal(one, other)
    finally:
        conv_bn_act.constants.cache_clear()


def test_repeated_runs_give_the_same_bits(device):
    problem = stats_problem(conv(24, 40, 9, n=3, prologue="relu"))._replace(device=device, dtype="fp16")
    operands = stats_operands(problem)
    for one, other in zip(*(kernel.forward(problem, operands) for _ in range(2)), strict=True):
        assert torch.equal(one, other)


def test_candidates_are_whole_sums_in_gathering_kernels():
    for problem in (conv(64, 64, 56, n=64, prologue="relu"), conv(512, 512, 7, n=1), conv(256, 64, 56, 1, n=64),
                    conv(128, 128, 56, n=32, groups=32)):
        problem = stats_problem(problem)._replace(device="cuda", dtype="bf16")
        found = kernel.candidates(problem, 90)
        assert found[0] == kernel.pick(problem, 90) and len(set(found)) == len(found) > 4
        assert all(kernel.lawful(tile, problem, 90) is None for tile in found)


def test_a_tile_that_does_not_fit_is_refused(device):
    problem = stats_problem(conv(16, 16, 5))._replace(device=device)
    with pytest.raises(ValueError, match="whole sums"):
        kernel.with_tile(vars(Tile("gemm", 16, 16, 16, SPLIT_K=2)))(problem, stats_operands(problem))


@pytest.mark.parametrize(("change", "reason"), [
    ({}, None), ({"dtype": "fp64"}, "not fp64"), ({"groups": 16}, "depthwise"), ({"dtype": "bf16"}, "interpreter"),
    ({"prologue": "mish"}, "'mish'")])
def test_refusals(change, reason):
    found = kernel.refuse(stats_problem(conv(16, 16, 4))._replace(**change))
    assert found is None if reason is None else reason in found
    assert "triton" in backends.kernels("conv_bn_stats", stats_problem(conv(16, 16, 4)))
