"""Triton's conv_dgrad against ATen in fp64, on poisoned memory between guard bands."""

import pytest
import torch

from fused_resnet.kernels.triton import conv_dgrad as kernel
from fused_resnet.kernels.triton import grad
from fused_resnet.kernels.triton.legal import Tile
from fused_resnet.ops import bits, conv_grad
from fused_resnet.testing.cases import conv
from tests.kernels.grads import PROBLEMS, agree_dgrad, forms, make
from tests.kernels.training import run

DTYPES = ("fp32", "tf32", "fp16", "bf16") if torch.cuda.is_available() else ("fp32", "fp16")
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)
def test_agrees_with_the_reference(problem, dtype, device):
    problem = problem._replace(dtype=dtype, device=device)
    assert kernel.refuse(problem) is None
    for form, operands in forms(problem, PROBLEMS.index(problem._replace(dtype="fp32", device="cpu"))):
        agree_dgrad(form, operands, run(kernel.forward, form, operands))


@pytest.mark.parametrize("tile", [Tile("dgrad", 16, 64, 16, SWAP=True), Tile("dgrad", 64, 16, 32),
                                  Tile("dgrad", 32, 128, 16, SWAP=True)], ids=str)
@pytest.mark.parametrize("problem", [conv(72, 40, (7, 5), stride=2), conv(48, 24, 5, groups=2, prologue="relu6"),
                                     conv(72, 24, 4, 1, prologue="relu")], ids=lambda p: p.id)
def test_other_tiles_agree(problem, tile, device):
    problem = problem._replace(device=device)
    for through in (False, True):
        operands = make(problem, through=through, residual=not problem.prologue, mask=not problem.prologue)
        agree_dgrad(problem, operands, run(kernel.with_tile(vars(tile)), problem, operands))


def test_rows_and_columns_that_no_window_reads_are_zero_or_the_residual(device):
    """A 1x1 convolution with stride 2 reads a quarter of the pixels."""
    problem = conv(16, 32, 7, 1, stride=2)._replace(device=device)
    operands = make(problem, residual=True)
    dx, _ = run(kernel.forward, problem, operands)
    assert torch.equal(dx[:, :, 1::2], operands.residual[:, :, 1::2])
    dx, _ = run(kernel.forward, problem, operands._replace(residual=None))
    assert (dx[:, :, :, 1::2] == 0).all() and (dx[:, :, ::2, ::2] != 0).any()


def test_a_residual_that_is_masked_does_not_count_even_if_it_is_nan(device):
    problem = conv(12, 16, 5)._replace(device=device)
    operands = make(problem, residual=True, mask=True)
    operands.residual[:] = torch.where(bits.unpack(operands.mask, operands.residual), 1.0, float("nan"))
    dx, _ = run(kernel.forward, problem, operands)
    assert dx.isfinite().all()
    agree_dgrad(problem, operands, (dx, None))


@pytest.mark.parametrize("activation", ["relu", "relu6", "identity"])
def test_nan_goes_where_stock_sends_it(activation, device):
    """NaN of z lets da pass; NaN of da does not come out where z stops it, but for the sums of its channel."""
    problem = conv(16, 24, 5, prologue=activation)._replace(device=device)
    operands = make(problem, through=True)
    operands.x[0, 3, 2, 2], operands.x[1, 4, 0, 0] = float("nan"), float("inf")
    operands.dy[1, 5, 4, 4] = float("nan")
    dx, sums = run(kernel.forward, problem, operands)
    stock = conv_grad.dgrad(problem, operands)
    assert torch.equal(dx.isnan(), stock[0].isnan()) and dx.isnan().any()
    assert torch.equal(sums.isfinite(), stock[1].isfinite())
    assert dx[0, 3, 2, 2].isfinite() and dx[0, 3, 2, 2] != 0


def test_a_mean_far_beyond_the_deviation_costs_no_digits(device):
    problem = conv(16, 24, 6, prologue="relu")._replace(device=device)
    operands = make(problem, through=True, mean=1e3)
    agree_dgrad(problem, operands, run(kernel.forward, problem, operands))


@pytest.mark.parametrize("absent", [("gamma",), ("pre_gamma",), ("pre_beta",), ("gamma", "pre_gamma", "pre_beta")])
def test_norms_without_affine_vectors(absent, device):
    problem = conv(16, 16, 4, prologue="relu")._replace(device=device)
    operands = make(problem, through=True)._replace(**dict.fromkeys(absent))
    agree_dgrad(problem, operands, run(kernel.forward, problem, operands))


@pytest.mark.parametrize("problem", [conv(16, 32, 6, prologue="relu"), conv(6, 8, (7, 6), groups=2, stride=(3, 2)),
                                     conv(16, 32, 6, 1)], ids=lambda p: p.id)
def test_long_offsets_and_repeated_runs_give_the_same_bits(problem, device, monkeypatch):
    problem = problem._replace(device=device)
    operands = make(problem, through=True, residual=not problem.prologue, mask=not problem.prologue)
    first, second = (kernel.forward(problem, operands) for _ in range(2))
    kernel.constants.cache_clear()
    monkeypatch.setattr(grad, "LARGEST_INDEX", 0)
    assert kernel.constants(problem, kernel.pick(problem, 90))["WIDE"]
    third = kernel.forward(problem, operands)
    kernel.constants.cache_clear()
    for a, b, c in zip(first, second, third, strict=True):
        assert a is b is c is None or torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("size", [{"N": 1 << 20}, {"C": 1 << 15, "N": 1 << 6}, {"H": 1 << 20}])
def test_offsets_are_long_when_a_tensor_is_too_large_for_32_bits(size):
    problem = conv(64, 64, (56, 56), stride=2)._replace(**size)
    assert kernel.constants(problem, kernel.pick(problem, 90))["WIDE"]
    small = problem._replace(N=1, C=64, H=56)
    assert not kernel.constants(small, kernel.pick(small, 90))["WIDE"]


@pytest.mark.parametrize("lay", [lambda w: w.contiguous(), lambda w: w.permute(3, 2, 1, 0).contiguous().permute(
    3, 2, 1, 0), lambda w: w.double()])
def test_weights_in_any_strides_and_after_an_update(lay, device):
    problem = conv(16, 24, 4)._replace(device=device)
    given = make(problem)
    operands = given._replace(weight=lay(given.weight))
    for _ in range(2):
        agree_dgrad(problem, operands._replace(weight=operands.weight.float()), kernel.forward(problem, operands))
        operands.weight.mul_(-2)
