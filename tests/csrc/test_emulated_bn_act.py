"""The CUDA kernels of bn_act*, source unchanged, on the CPU's emulation of a GPU, beside the references."""

import itertools

import pytest
import torch

from fused_resnet import numerics
from tests.kernels import training

ACTIVATIONS = ("identity", "relu", "relu6")
VECTORS = ("gamma", "beta", "mean", "var", "means")


def emulate(emulation, kernel, problem, operands, limit=2, seed=0, aligned=True):
    """Runs one family's kernels as `ops.bn_act` defines it."""
    out = {}
    if kernel == "forward":
        out["y"] = torch.empty_like(operands.x)
        if problem.activation != "identity":
            out["mask"] = torch.empty((operands.x.numel() + 7) // 8, dtype=torch.uint8)
    elif kernel == "sums":
        out["sums"] = torch.empty((3 if problem.shortcut == "norm" else 2, problem.C), dtype=torch.float32)
    else:
        out["dx"] = torch.empty_like(operands.x)
        if problem.shortcut:
            out["dr"] = torch.empty_like(operands.x)
    given = {"x": operands.x, "dy": operands.dy, "given_mask": operands.mask}
    given |= {v: getattr(operands, v) for v in VECTORS}
    if problem.shortcut and (kernel == "forward" or problem.shortcut == "norm"):
        given["residual"] = operands.residual
    if problem.shortcut == "norm":
        given |= {f"r_{v}": getattr(operands, f"r_{v}") for v in VECTORS}
    addresses = {name: t.data_ptr() for name, t in (given | out).items() if t is not None}
    emulation.bn_act(kernel, problem.dtype, addresses, problem.depth, problem.C, ACTIVATIONS.index(problem.activation),
                     operands.eps, operands.r_eps, aligned, limit, seed)
    if kernel == "forward":
        return out["y"], out.get("mask")
    return out["sums"] if kernel == "sums" else (out["dx"], out.get("dr"))


KERNELS = {"forward": training.agree_forward, "sums": training.agree_sums, "gradient": training.agree_grad}
# Channels that are whole octets or not, more and fewer than the threads of a block take, ragged rows.
SIZES = [(8, 5), (24, (3, 7)), (64, 6), (264, 3), (5, (3, 5)), (1, 1), (3, 9), (20, 4), (33, 2)]
PROBLEMS = [training.norm(*size, activation=activation, shortcut=shortcut)
            for size, (activation, shortcut) in zip(SIZES, itertools.product(ACTIVATIONS, ("", "tensor", "norm")))]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)
def test_kernels_agree_with_the_references(emulation, kernel, problem, dtype):
    problem = problem._replace(dtype=dtype)
    operands = training.norm_operands(problem)
    KERNELS[kernel](problem, operands, training.run(
        lambda p, o: emulate(emulation, kernel, p, o, aligned=False), problem, operands))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("c", "size"), [(8, 5), (24, 9), (5, 7)])
def test_vectors_of_sixteen_bytes_give_the_same_bits(emulation, kernel, dtype, c, size):
    """Fresh tensors of torch start at a multiple of 64 bytes."""
    problem = training.norm(c, size, shortcut="norm", activation="relu6", dtype=dtype)
    operands = training.norm_operands(problem)
    found = [emulate(emulation, kernel, problem, operands, seed=seed, aligned=seed > 0) for seed in range(3)]
    for other in found[1:]:
        for mine, theirs in zip(found[0], other, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("kernel", KERNELS)
def test_nan_and_inf_go_where_stock_sends_them(emulation, kernel):
    problem = training.norm(16, 4, activation="relu6", shortcut="norm")
    operands = training.norm_operands(problem)
    operands.x[0, 1, 2, 3], operands.x[1, 2, 0, 0] = float("nan"), float("inf")
    operands.residual[1, 3, 1, 1], operands.dy[0, 4, 1, 2] = float("nan"), float("nan")
    KERNELS[kernel](problem, operands, emulate(emulation, kernel, problem, operands))


def test_many_strips_and_blocks_meet_in_one_sum(emulation):
    problem = training.norm(40, (41, 53), n=3, shortcut="norm")
    operands = training.norm_operands(problem)
    assert emulation.sum_plan(problem.depth, 40)[3] > 1
    training.agree_sums(problem, operands, emulate(emulation, "sums", problem, operands))


@pytest.mark.parametrize("dtype", ["fp64"])
def test_double_precision(emulation, dtype):
    from fused_resnet.ops import bn_act

    problem = training.norm(8, 3, shortcut="tensor", dtype=dtype)
    operands = training.norm_operands(problem)
    operands = operands._replace(**{v: getattr(operands, v).double() for v in VECTORS})
    y, _ = emulate(emulation, "forward", problem, operands)
    exact = bn_act.forward(problem, operands)[0]
    assert numerics.measure(y, exact).max <= 8 * numerics.EPS["fp64"] * exact.abs().max()
