"""The Triton kernels against stock modules in fp64, on poisoned memory between guard bands."""

import dataclasses

import pytest
import torch

from fused_resnet.kernels.triton import conv_bn_act as family
from fused_resnet.kernels.triton import tiles
from fused_resnet.problem import ACTIVATIONS
from fused_resnet.testing import inputs
from fused_resnet.testing.cases import CATALOGUE, conv
from tests.kernels.judge import agree, guarded_run

# The interpreter multiplies bf16 wrongly and knows no TF32.
DTYPES = ("fp32", "tf32", "fp16", "bf16") if torch.cuda.is_available() else ("fp32", "fp16")
TILES = sorted({tile for tile in tiles.SHIPPED.values() if tile.kernel == "gemm"}, key=str)
# numpy, which the interpreter computes with, warns of what these tests put in on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
SPECIAL = [float("nan"), float("inf"), -float("inf"), -0.0, 8.0, -8.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", CATALOGUE, ids=lambda p: p.id)
def test_agrees_with_stock(problem, dtype, device):
    problem = problem._replace(dtype=dtype, device=device)
    assert family.refuse(problem) is None
    operands = inputs.make(problem)
    agree(problem, operands, guarded_run(family.forward, problem, operands))


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_shipped_tile_agrees(tile, device):
    for problem in (conv(24, 40, 5, n=1, residual=True), conv(6, 20, 5, n=1)):
        problem = problem._replace(device=device)
        if tiles.legal(tile, problem, 90) is None:
            agree(problem, operands := inputs.make(problem), family.forward(problem, operands, tile))


@pytest.mark.parametrize("problem", [conv(16, 32, 6, residual=True), conv(6, 8, 6, groups=2, dilation=2),
                                     conv(8, 16, 6, 5, groups=8), conv(16, 32, 6, 1), conv(40, 16, 5, prologue="relu"),
                                     conv(16, 16, 1, 3)], ids=lambda p: p.id)
def test_long_offsets_and_repeated_runs_give_the_same_bits(problem, device, monkeypatch):
    problem = problem._replace(device=device)
    operands = inputs.make(problem)
    first, second = (family.forward(problem, operands) for _ in range(2))
    assert torch.equal(first, second)
    family.constants.cache_clear()
    monkeypatch.setattr(family, "LARGEST_INDEX", 0)
    assert family.constants(problem, tiles.pick(problem, 90))["WIDE"]
    assert torch.equal(first, family.forward(problem, operands))
    family.constants.cache_clear()


@pytest.mark.parametrize("size", [{"N": 1 << 20}, {"K": 1 << 15, "N": 1 << 6}, {"H": 1 << 20}])
def test_offsets_are_long_when_a_tensor_is_too_large_for_32_bits(size):
    problem = conv(64, 64, (56, 56))._replace(**size)
    assert family.constants(problem, tiles.pick(problem, 90))["WIDE"]
    small = problem._replace(N=1, K=64, H=56)
    assert not family.constants(small, tiles.pick(small, 90))["WIDE"]


def test_offsets_are_long_when_the_parts_of_a_split_reduction_are_too_large_for_32_bits():
    problem = conv(64, 64, 56, n=1 << 10)
    tile = tiles.Tile("gemm", 64, 64, 16, SPLIT_K=16)
    assert family.constants(problem, tile)["WIDE"]
    assert not family.constants(problem, dataclasses.replace(tile, SPLIT_K=1))["WIDE"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_inf_come_out_as_from_stock(activation, groups, dtype, device):
    """Injected through the residual, where they reach the activation one by one."""
    problem = conv(16, 16, 4, groups=groups, residual=True, activation=activation)._replace(dtype=dtype, device=device)
    operands = inputs.make(problem)
    operands.residual[0, 3:9, 1, 2] = torch.tensor(SPECIAL, dtype=operands.x.dtype)
    result, stock = family.forward(problem, operands), inputs.stock(problem, operands)
    assert result.isnan().any()
    assert torch.equal(result.isnan(), stock.isnan())
    assert torch.equal(result[result.isinf()], stock[result.isinf()])
    assert torch.equal(result.isinf(), stock.isinf())
    agree(problem, operands, result)


@pytest.mark.parametrize("problem", [
    *[conv(8, 8, 5, groups=groups, prologue=activation) for groups in (1, 8) for activation in ACTIVATIONS],
    conv(24, 16, 5, 1), conv(24, 16, 5, prologue="relu"), conv(3, 8, 5)], ids=lambda p: p.id)
def test_nan_reaches_the_windows_that_hold_it_and_no_others(problem, device):
    problem = problem._replace(device=device)
    operands = inputs.make(problem)
    operands.x[0, 2, 4, 4] = float("nan")
    result, stock = family.forward(problem, operands), inputs.stock(problem, operands)
    assert torch.equal(result.isnan(), stock.isnan())
    agree(problem, operands, result)


@pytest.mark.parametrize("absent", [("gamma",), ("beta",), ("gamma", "beta"), ("pre_gamma", "pre_beta")])
def test_norms_without_affine_vectors(absent, device):
    problem = conv(16, 16, 4, prologue="relu", bias=True)._replace(device=device)
    operands = inputs.make(problem)._replace(**dict.fromkeys(absent))
    agree(problem, operands, family.forward(problem, operands))


@pytest.mark.parametrize("vector", [torch.float16, torch.float64])
def test_norm_vectors_of_another_type(vector, device):
    problem = conv(16, 16, 4)._replace(device=device)
    operands = inputs.make(problem)
    names = ("gamma", "beta", "mean", "var")
    odd = operands._replace(**{name: getattr(operands, name).to(vector) for name in names})
    rounded = odd._replace(**{name: getattr(odd, name).float() for name in names})
    assert torch.equal(family.forward(problem, odd), family.forward(problem, rounded))


@pytest.mark.parametrize("eps", [0.0, 1e-3, 2.0])
def test_eps_is_used_as_given(eps, device):
    problem = conv(16, 16, 4, prologue="relu")._replace(device=device)
    operands = inputs.make(problem)._replace(eps=eps, pre_eps=eps / 2)
    agree(problem, operands, family.forward(problem, operands))


@pytest.mark.parametrize("lay", [
    lambda w: w.contiguous(), lambda w: w.contiguous(memory_format=torch.channels_last),
    lambda w: w.repeat(1, 2, 1, 1)[:, ::2], lambda w: w.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)])
def test_weights_in_any_strides_and_after_an_update(lay, device):
    problem = conv(16, 24, 4)._replace(device=device)
    operands = inputs.make(problem)
    operands = operands._replace(weight=lay(operands.weight))
    agree(problem, operands, family.forward(problem, operands))
    operands.weight.mul_(-1)
    agree(problem, operands, family.forward(problem, operands))


def test_part_of_a_batch(device):
    problem = conv(16, 16, 4, n=3, residual=True)._replace(device=device)
    operands = inputs.make(problem)
    part = operands._replace(x=operands.x[1:], residual=operands.residual[1:])
    agree(problem._replace(N=2), part, family.forward(problem._replace(N=2), part))


@pytest.mark.parametrize("problem", [conv(16, 32, 4, n=0), conv(16, 32, (0, 4), n=1)], ids=lambda p: p.id)
def test_nothing_to_compute_launches_nothing(problem, device, monkeypatch):
    monkeypatch.setattr(family, "launch", None)
    problem = problem._replace(device=device)
    assert family.forward(problem, inputs.make(problem)).shape == problem.output_shape


def test_a_tile_that_cannot_run_is_refused_with_its_reason(device):
    problem = conv(16, 16, 4)._replace(device=device)
    with pytest.raises(ValueError, match="BLOCK_M=24 is no power of two"):
        family.forward(problem, inputs.make(problem), tiles.Tile("gemm", 24, 16))


@pytest.mark.parametrize(("change", "reason"), [
    ({"dtype": "fp64"}, "not fp64"), ({"dtype": "bf16"}, "interpreter"), ({"activation": "mish"}, "'mish'"),
    ({"prologue": "mish"}, "'mish'"), ({}, None), ({"dtype": "bf16", "device": "cuda"}, None)])
def test_refusals(change, reason):
    found = family.refuse(conv(16, 16, 4)._replace(**change))
    assert found is None if reason is None else reason in found
