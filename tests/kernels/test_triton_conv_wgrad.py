"""Triton's conv_wgrad against ATen in fp64, on poisoned memory between guard bands."""

import pytest
import torch

from fused_resnet.kernels.triton import conv_wgrad as kernel
from fused_resnet.kernels.triton import grad
from fused_resnet.kernels.triton.legal import Tile
from fused_resnet.ops import conv_grad
from fused_resnet.testing.cases import conv
from tests.kernels.grads import PROBLEMS, agree_wgrad, forms, make
from tests.kernels.training import run

DTYPES = ("fp32", "tf32", "fp16", "bf16") if torch.cuda.is_available() else ("fp32", "fp16")
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)
def test_agrees_with_the_reference(problem, dtype, device):
    problem = problem._replace(dtype=dtype, device=device)
    assert kernel.refuse(problem) is None
    for form, operands in forms(problem, PROBLEMS.index(problem._replace(dtype="fp32", device="cpu"))):
        agree_wgrad(form, operands, run(kernel.forward, form, operands))


@pytest.mark.parametrize("tile", [Tile("wgrad", 32, 64, 16, SPLIT_K=1), Tile("wgrad", 64, 64, 16, SPLIT_K=4),
                                  Tile("wgrad", 16, 32, 32, SPLIT_K=3), Tile("wgrad", 32, 128, 16, SPLIT_K=7)], ids=str)
@pytest.mark.parametrize("problem", [conv(24, 40, (9, 15), n=3, stride=2, prologue="relu"),
                                     conv(36, 24, (6, 7), n=3, groups=2, prologue="relu6"),
                                     conv(72, 24, (9, 5), 1, n=3), conv(3, 16, (15, 11), 7, n=3, stride=2)],
                         ids=lambda p: p.id)
def test_other_tiles_and_splits_agree(problem, tile, device):
    problem = problem._replace(device=device)
    for through in (False, True):
        operands = make(problem, through=through)
        agree_wgrad(problem, operands, run(kernel.with_tile(vars(tile)), problem, operands))


def test_shares_leave_no_part_without_a_step():
    problem = conv(16, 16, 16, n=1)  # 16 steps of 16 pixels
    for split, parts in ((1, 1), (5, 4), (9, 8), (15, 8), (16, 16)):
        assert kernel.parts(problem, Tile("wgrad", 16, 16, 16, SPLIT_K=split)) == parts


def test_pixels_are_walked_over_images_of_any_size(device):
    """Steps of less than a row, of several rows, and of several images."""
    for size in ((1, 1), (1, 50), (3, 2), (5, 7), (17, 3)):
        problem = conv(8, 8, size, n=9)._replace(device=device)
        operands = make(problem)
        agree_wgrad(problem, operands, run(kernel.with_tile(vars(Tile("wgrad", 64, 16, 16))), problem, operands))


def test_nan_reaches_the_filters_that_read_it(device):
    """Away from the border: NaN times padding is NaN here, where a library that skips padding does not see it."""
    problem = conv(16, 24, 6, prologue="relu")._replace(device=device)
    for name, at in (("x", (0, 3, 5, 5)), ("dy", (1, 7, 1, 3)), ("u", (1, 2, 4, 4))):
        operands = make(problem, through=True)
        getattr(operands, name)[at] = float("nan")
        dw = run(kernel.forward, problem, operands)
        assert torch.equal(dw.isnan(), conv_grad.wgrad(problem, operands).isnan()) and dw.isnan().any()
        agree_wgrad(problem, operands, dw)


def test_a_mean_far_beyond_the_deviation_costs_no_digits(device):
    problem = conv(16, 24, 6, prologue="relu")._replace(device=device)
    operands = make(problem, through=True, mean=1e3)
    agree_wgrad(problem, operands, run(kernel.forward, problem, operands))


@pytest.mark.parametrize("absent", [("gamma",), ("pre_gamma",), ("pre_beta",), ("gamma", "pre_gamma", "pre_beta")])
def test_norms_without_affine_vectors(absent, device):
    problem = conv(16, 16, 4, prologue="relu")._replace(device=device)
    operands = make(problem, through=True)._replace(**dict.fromkeys(absent))
    agree_wgrad(problem, operands, run(kernel.forward, problem, operands))


@pytest.mark.parametrize("problem", [conv(16, 32, 9, n=4, prologue="relu"), conv(6, 8, (9, 8), groups=2, stride=(3, 2)),
                                     conv(16, 32, 9, 1, n=4)], ids=lambda p: p.id)
def test_long_offsets_and_repeated_runs_give_the_same_bits(problem, device, monkeypatch):
    problem = problem._replace(device=device)
    operands = make(problem, through=True)
    first, second = (kernel.forward(problem, operands) for _ in range(2))
    kernel.constants.cache_clear()
    monkeypatch.setattr(grad, "LARGEST_INDEX", 0)
    assert kernel.constants(problem, kernel.pick(problem, 90))["WIDE"]
    third = kernel.forward(problem, operands)
    kernel.constants.cache_clear()
    assert torch.equal(first, second) and torch.equal(first, third)


@pytest.mark.parametrize("size", [{"N": 1 << 20}, {"K": 1 << 15, "N": 1 << 7}, {"H": 1 << 20}])
def test_offsets_are_long_when_a_tensor_is_too_large_for_32_bits(size):
    problem = conv(64, 64, (56, 56), stride=2)._replace(**size)
    assert kernel.constants(problem, kernel.pick(problem, 90))["WIDE"]
    small = problem._replace(N=1, K=64, H=56)
    assert not kernel.constants(small, kernel.pick(small, 90))["WIDE"]


def test_the_split_fills_the_chip_but_leaves_every_part_its_steps():
    for problem in (conv(64, 64, 56, n=64), conv(512, 512, 7, n=64), conv(256, 64, 56, 1, n=1), conv(16, 16, 4, n=1)):
        for arch in (80, 90):
            tile = kernel.pick(problem._replace(dtype="bf16", device="cuda"), arch)
            assert tile.SPLIT_K == 1 or kernel.steps(problem, tile) >= 8 * tile.SPLIT_K
            assert tile.SPLIT_K == 1 or kernel.tiles(problem, tile) * tile.SPLIT_K <= 2 * kernel.FILL[arch]
    wide = kernel.pick(conv(64, 64, 56, n=64)._replace(dtype="bf16", device="cuda"), 90)
    assert kernel.tiles(conv(64, 64, 56, n=64), wide) * wide.SPLIT_K > kernel.FILL[90]
