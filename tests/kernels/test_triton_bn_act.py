"""Triton's bn_act, bn_act_sums and bn_act_grad against the references in fp64, on poisoned memory between guards."""

import itertools

import pytest
import torch

from fused_resnet import backends
from fused_resnet.kernels.triton import bn_act, bn_act_grad, bn_act_sums, strips
from fused_resnet.kernels.triton.strips import Strip
from fused_resnet.ops import bn_act as family
from tests.kernels.training import agree_forward, agree_grad, agree_sums, norm, norm_operands, run

DTYPES = ("fp32", "fp16", "bf16") if torch.cuda.is_available() else ("fp32", "fp16")
KERNELS = {bn_act: agree_forward, bn_act_sums: agree_sums, bn_act_grad: agree_grad}
PROBLEMS = [norm(c, size, n=n, activation=activation, shortcut=shortcut)
            for (c, size, n), (activation, shortcut) in zip(
                itertools.cycle([(16, 5, 2), (3, (7, 5), 3), (24, (3, 9), 2), (48, 4, 1), (136, 3, 2), (1, 1, 1),
                                 (9, 3, 1), (8, (1, 7), 2), (257, 2, 1)]),
                [*itertools.product(("relu", "identity", "relu6"), ("", "tensor", "norm"))] * 2)]
# Several steps a strip, several strips, blocks of channels that end inside of a tile, more rows than there are.
TILES = [Strip(32, 8, 1), Strip(16, 16, 4), Strip(128, 64, 2), Strip(16, 32, 2, 1)]
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture(params=KERNELS, ids=lambda kernel: kernel.__name__.rpartition(".")[2])
def kernel(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)
def test_agrees_with_the_reference(kernel, problem, dtype, device):
    problem = problem._replace(dtype=dtype, device=device)
    assert kernel.refuse(problem) is None
    operands = norm_operands(problem)
    KERNELS[kernel](problem, operands, run(kernel.forward, problem, operands))


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("c", [24, 20])
def test_every_tile_agrees(kernel, tile, c, device):
    problem = norm(c, (9, 11), n=3, activation="relu6", shortcut="norm", device=device)
    operands = norm_operands(problem)
    if reason := strips.legal(tile, problem):
        with pytest.raises(ValueError, match="cannot run"):
            kernel.with_tile(vars(tile))(problem, operands)
        assert "twice" in reason
    else:
        KERNELS[kernel](problem, operands, run(kernel.with_tile(vars(tile)), problem, operands))


@pytest.mark.parametrize("c", [16, 5])
def test_nan_and_inf_go_where_stock_sends_them(kernel, c, device):
    problem = norm(c, 4, activation="relu6", shortcut="norm", device=device)
    operands = norm_operands(problem)
    operands.x[0, 1, 2, 3], operands.x[1, 2, 0, 0] = float("nan"), float("inf")
    operands.residual[1, 3, 1, 1], operands.dy[0, 4, 1, 2] = float("nan"), float("nan")
    KERNELS[kernel](problem, operands, run(kernel.forward, problem, operands))


def test_nan_passes_the_activation(device):
    problem = norm(8, 1, n=1, device=device)
    operands = norm_operands(problem)
    operands.x.fill_(float("nan"))
    y, mask = bn_act.forward(problem, operands)
    assert y.isnan().all() and int(mask[0]) == 255


def test_vectors_may_be_absent(kernel, device):
    problem = norm(16, 4, shortcut="norm", device=device)
    operands = norm_operands(problem)._replace(gamma=None, beta=None, r_gamma=None, r_beta=None)
    KERNELS[kernel](problem, operands, run(kernel.forward, problem, operands))


def test_a_mean_far_beyond_the_deviation_costs_no_digits(kernel, device):
    problem = norm(16, 6, shortcut="norm", device=device)
    operands = norm_operands(problem, mean=3000.0)
    KERNELS[kernel](problem, operands, run(kernel.forward, problem, operands))


def test_long_sums_keep_their_digits(device):
    """One program adds up 3.2 million rows in 392 steps; the terms of the first sum have one sign."""
    problem = norm(1, 112, n=256, activation="identity", device=device)
    operands = norm_operands(problem)
    operands = operands._replace(dy=operands.dy.abs_().add_(1.0))
    agree_sums(problem, operands, bn_act_sums.with_tile(vars(Strip(8192, 8, 1, 32)))(problem, operands))


def test_sixty_four_bit_offsets_give_the_same(kernel, device, monkeypatch):
    problem = norm(20, 5, shortcut="norm", device=device)
    operands = norm_operands(problem)
    monkeypatch.setattr(strips, "LARGEST_INDEX", 100)
    strips.constants.cache_clear()
    try:
        assert strips.constants(problem, strips.pick(problem))[1]["WIDE"]
        KERNELS[kernel](problem, operands, run(kernel.forward, problem, operands))
    finally:
        strips.constants.cache_clear()


@pytest.mark.parametrize(("n", "size", "c", "wide"), [
    (256, 112, 64, False), (1024, 56, 256, False), (4096, 112, 64, True), (2, 32767, 1, True), (1, 32000, 2, False)])
def test_offsets_are_wide_where_they_have_to_be(n, size, c, wide):
    problem = norm(c, size, n=n, dtype="bf16", device="cuda")
    programs, values = strips.constants(problem, strips.pick(problem))
    rows = programs * values["STEPS"] * values["BLOCK_M"]  # of one block of channels each
    assert rows >= n * size * size
    assert values["WIDE"] == wide and (wide or rows * c < 2**31)


def test_repeated_runs_give_the_same_bits(kernel, device):
    problem = norm(24, 9, n=3, shortcut="norm", dtype="fp16", device=device)
    operands = norm_operands(problem)
    first, second = (kernel.with_tile(vars(Strip(32, 16, 4)))(problem, operands) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_candidates_are_legal_and_the_heuristic_is_first(kernel):
    for c in (3, 24, 64, 2048):
        problem = norm(c, 56, n=32, dtype="bf16", device="cuda")
        found = kernel.candidates(problem)
        assert found[0] == strips.pick(problem) and len(set(found)) == len(found)
        assert all(strips.legal(tile, problem) is None for tile in found)


@pytest.mark.parametrize(("change", "reason"), [
    ({}, None), ({"dtype": "fp64"}, "not fp64"), ({"dtype": "bf16"}, "interpreter"),
    ({"dtype": "bf16", "device": "cuda"}, None), ({"activation": "silu"}, "silu"), ({"shortcut": "conv"}, "conv")])
def test_refusals(kernel, change, reason):
    found = kernel.refuse(norm(8, 2)._replace(**change))
    assert found is None if reason is None else reason in found


def test_the_chooser_finds_the_kernels():
    for name in ("bn_act", "bn_act_sums", "bn_act_grad"):
        assert backends.kernels(name, norm(8, 2))["triton"].FOLDED is False
    assert family.forward is backends.reference("bn_act")
