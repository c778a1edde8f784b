"""The Triton stem against stock modules in fp64, on poisoned memory between guard bands."""

import dataclasses

import pytest
import torch

from fused_resnet.kernels.triton import stem as kernel
from fused_resnet.kernels.triton.legal import Tile
from fused_resnet.ops import stem as family
from fused_resnet.ops.stem import StemProblem
from fused_resnet.testing import inputs
from fused_resnet.testing.cases import STEMS, conv
from tests.kernels import judge

DTYPES = ("fp32", "tf32", "fp16", "bf16") if torch.cuda.is_available() else ("fp32", "fp16")
RESNET = StemProblem(*conv(3, 64, 20, 7, stride=2))
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def stock(problem, operands, dtype=None):
    if dtype is not None:
        operands = operands._replace(**{name: value.to(dtype) for name, value in operands._asdict().items()
                                        if isinstance(value, torch.Tensor)})
    return family.reference_of(problem, operands)


def agree(problem, operands, result):
    judge.agree(problem, operands, result, stock)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", STEMS, ids=lambda p: p.id)
def test_agrees_with_stock(problem, dtype, device):
    problem = problem._replace(dtype=dtype, device=device)
    assert kernel.refuse(problem) is None
    operands = inputs.make(problem)
    if problem.N == 0:
        assert kernel.forward(problem, operands).shape == problem.output_shape
    else:
        agree(problem, operands, judge.guarded_run(kernel.forward, problem, operands))


@pytest.mark.parametrize("lay", [
    lambda x: x.contiguous(), lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    lambda x: x.repeat(1, 2, 2, 1)[:, ::2, ::2], lambda x: x[:1].expand(x.shape)],
    ids=["nchw", "whcn", "step", "expand"])
def test_the_image_may_have_any_strides(lay, device):
    problem = RESNET._replace(device=device)
    operands = inputs.make(problem)
    operands = operands._replace(x=lay(operands.x))
    agree(problem, operands, kernel.forward(problem, operands))


def test_weights_are_packed_again_after_an_update(device):
    problem = RESNET._replace(device=device)
    operands = inputs.make(problem)
    for _ in range(2):
        agree(problem, operands, kernel.forward(problem, operands))
        operands.weight.mul_(-0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_stay_in_their_windows(dtype, device):
    problem = RESNET._replace(dtype=dtype, device=device, H=40, W=40)
    operands = inputs.make(problem)
    operands.x[0, 1, 4, 5], operands.x[1, 2, 30, 21] = float("nan"), float("inf")
    result = kernel.forward(problem, operands)
    assert torch.equal(result.isnan(), stock(problem, operands).isnan())
    assert result.isnan().any() and result[0, :, 5:].isfinite().all()
    agree(problem, operands, result)


@pytest.mark.parametrize(("multiprocessors", "strips"), [(1, 4), (1000, 14)])
def test_strips_share_rows_without_losing_any(multiprocessors, strips, device, monkeypatch):
    problem = RESNET._replace(device=device, H=222, W=16, N=1, K=8)
    monkeypatch.setattr(kernel, "multiprocessors", lambda device: multiprocessors)
    assert kernel.constants(problem, kernel.pick(problem, 90), multiprocessors)[0] == strips
    operands = inputs.make(problem)
    agree(problem, operands, kernel.forward(problem, operands))


def test_repeated_runs_give_the_same_bits(device):
    problem = RESNET._replace(device=device, dtype=DTYPES[-1])
    operands = inputs.make(problem)
    assert torch.equal(*(kernel.forward(problem, operands) for _ in range(2)))


@pytest.mark.parametrize("tile", kernel.candidates(RESNET._replace(dtype="tf32"), 80), ids=str)
def test_every_candidate_agrees(tile, device):
    problem = RESNET._replace(device=device, K=40, N=1)
    operands = inputs.make(problem)
    agree(problem, operands, kernel.with_tile(dataclasses.asdict(tile))(problem, operands))


@pytest.mark.parametrize("arch", [80, 86, 90])
@pytest.mark.parametrize("dtype", ["fp32", "tf32", "fp16", "bf16"])
def test_candidates_are_legal_distinct_and_begin_with_the_shipped_tile(dtype, arch):
    problem = RESNET._replace(device="cuda", dtype=dtype)
    found = kernel.candidates(problem, arch)
    assert found[0] == kernel.pick(problem, arch) and len(set(found)) == len(found)
    assert not any(kernel.legal(tile, problem, arch) for tile in found)


@pytest.mark.parametrize(("tile", "arch", "reason"), [
    (Tile("gemm", 64, 64), 80, "no tile of the stem"), (Tile("stem", 24, 64), 80, "powers of two"),
    (Tile("stem", 32, 64, 0, 8), 90, "64 rows"), (Tile("stem", 64, 64, 0, 4), 90, "registers"),
    (Tile("stem", 16, 64, 0, 4), 80, None), (Tile("stem", 64, 64, 0, 8, 3), 86, "bytes of shared memory"),
    (Tile("stem", 64, 64, 0, 8, 3), 90, None)])
def test_reasons(tile, arch, reason, device):
    problem = RESNET._replace(dtype="fp16", device=device)
    found = kernel.legal(tile, problem, arch)
    assert found is None if reason is None else reason in found
    if reason and arch == 90:
        with pytest.raises(ValueError, match=reason):
            kernel.forward(problem, inputs.make(problem), tile)


@pytest.mark.parametrize(("change", "reason"), [
    ({}, None), ({"dtype": "fp64"}, "not fp64"), ({"dtype": "bf16"}, "interpreter"), ({"activation": "mish"}, "'mish'"),
    ({"C": 5}, "5 channels"), ({"R": 9}, "9x7"), ({"groups": 3}, "groups"), ({"dilation": (2, 2)}, "dilation"),
    ({"H": 1 << 15, "W": 1 << 15}, "too large"), ({"dtype": "bf16", "device": "cuda"}, None)])
def test_refusals(change, reason):
    found = kernel.refuse(RESNET._replace(**change))
    assert found is None if reason is None else reason in found
