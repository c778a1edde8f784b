"""Do the tests of the training kernels bite? Each deliberate bug, put into a copy of the kernels, must fail them."""

import pytest
import torch

from fused_resnet.kernels.triton import bn_act, bn_act_grad, bn_act_sums, conv_bn_stats
from fused_resnet.kernels.triton.legal import Tile
from fused_resnet.kernels.triton.strips import Strip
from fused_resnet.testing.cases import conv
from tests.kernels.test_faults import kernels
from tests.kernels.training import (
    agree_forward,
    agree_grad,
    agree_stats,
    agree_sums,
    norm,
    norm_operands,
    run,
    stats_operands,
    stats_problem,
)

FORWARD, SUMS, GRAD, STATS = "bn_act.py", "bn_act_sums.py", "bn_act_grad.py", "conv_bn_stats.py"
NORM, GEMM, EPILOGUE, TMA = "norm.py", "conv_bn_act.py", "epilogue.py", "conv_bn_stats_tma.py"
# What is broken -> (family, file, what stands there, what is put there instead).
FAULTS = {
    "the mask is inverted": ("bn_act", NORM, "return stops == 0", "return stops"),
    "the mask stops NaN": ("bn_act", NORM, "return stops == 0", "return (z > 0.0) & (stops == 0)"),
    "relu6 lets saturated gradients pass": ("bn_act", NORM, "stops |= z >= 6.0", "stops |= z >= 60.0"),
    "bits stand in reverse order": ("bn_act", NORM, "bits << tl.arange(0, 8)", "bits << 7 - tl.arange(0, 8)"),
    "bits behind the last element are set": ("bn_act", FORWARD, "flags &= ok", "flags |= ok == 0"),
    "bytes behind the mask are written": ("bn_act", FORWARD, "byte_ok = m * COLUMNS + byte * 8 < M * C",
                                          "byte_ok = m * COLUMNS + byte * 8 < M * C + 8"),
    "rows behind the last are written": ("bn_act", FORWARD, "ok = (m < M) & (c < C)", "ok = c < C"),
    "the residual is dropped": ("bn_act", FORWARD, "z += other.to(tl.float32)", "z += 0.0"),
    "the projection has no norm": ("bn_act", FORWARD, "affine(other, other_mean, other_scale, other_shift)",
                                   "other.to(tl.float32)"),
    "the projection has the block's eps": ("bn_act", FORWARD, "r_mean, r_var, r_eps, c", "r_mean, r_var, eps, c"),
    "odd channels take the vectors of the row": ("bn_act", FORWARD, "channel = offset % C", "channel = c % C"),
    "the norm is folded": ("bn_act", NORM, "return (u.to(tl.float32) - mean) * scale + shift",
                           "return u.to(tl.float32) * scale + (shift - mean * scale)"),
    "a strip ends before its last step": ("bn_act", FORWARD, "in range(STEPS)", "in range(STEPS - 1)"),
    "xhat without the mean": ("bn_act_sums", NORM, "return (u.to(tl.float32) - mean) * inverse",
                              "return u.to(tl.float32) * inverse"),
    "backward reads bits in reverse order": ("bn_act_sums", NORM, "[:, :, None] >> tl.arange(0, 8)",
                                             "[:, :, None] >> 7 - tl.arange(0, 8)"),
    "odd channels read the bit of the next element": ("bn_act_sums", NORM, "(offset % 8)", "((offset + 1) % 8)"),
    "the mask is not applied": ("bn_act_sums", SUMS, "dz = tl.where(flags, dz, 0.0)", "dz = dz"),
    "the last rows count without a mask": ("bn_act_sums", SUMS, "ok = (m < M) & (c < C)", "ok = c < C"),
    "the last part is forgotten": ("bn_act_sums", SUMS, "range(0, PARTS, BLOCK_P)", "range(0, PARTS - 1, 1)"),
    "parts of all strips lie over each other": ("bn_act_sums", SUMS, "parts + strip *", "parts + 0 *"),
    "the projection's sum has the block's mean": ("bn_act_sums", SUMS, "normalise(other, other_mean,",
                                                  "normalise(other, x_mean,"),
    "the gradient misses s0": ("bn_act_grad", NORM, "(dz.to(tl.float32) - s0)", "dz.to(tl.float32)"),
    "the gradient misses s1": ("bn_act_grad", NORM, " - (u.to(tl.float32) - mean) * slope", ""),
    "the gradient misses gamma": ("bn_act_grad", NORM, "scale = inverse * vector(gamma, channel, ok, 1.0)\n    slope",
                                  "scale = inverse\n    slope"),
    "xhat is not divided by the deviation": ("bn_act_grad", NORM, "slope = scale * inverse *", "slope = scale *"),
    "the shortcut gets dy": ("bn_act_grad", GRAD, "du = dz", "du = tl.load(dy + offset, mask=ok, other=0.0)"),
    "the projection gets dz": ("bn_act_grad", GRAD, "if r_var is not None:\n                other",
                               "if False:\n                other"),
    "padding goes through the norm": ("conv_bn_stats", GEMM,
        "tl.where(ok, activate(xs.to(tl.float32) * scale + shift, PROLOGUE), 0.0).to",
        "activate(xs.to(tl.float32) * scale + shift, PROLOGUE).to"),
    "the pivot is not taken back": ("conv_bn_stats", STATS, "average += vector(pivot, k, k < K, 0.0)", ""),
    "the pivot is not subtracted": ("conv_bn_stats", NORM, " - vector(pivot, channel, channel_ok, 0.0)", ""),
    "statistics are those before rounding": ("conv_bn_stats", STATS, "store_moments(u, ", "store_moments(acc, "),
    "pixels behind the last count": ("conv_bn_stats", NORM, "m < M, count, AXIS", "m < M + BLOCK_M, count, AXIS"),
    "the last tile counts as a whole one": ("conv_bn_stats", NORM, "tl.minimum(M - tile * BLOCK_M, BLOCK_M).to",
                                            "(M * 0 + BLOCK_M).to"),
    "the last tile weighs as a whole one": ("conv_bn_stats", STATS, "tl.minimum(M - t.to(tl.int64) * SPAN, SPAN)",
                                            "SPAN"),
    "means of tiles do not differ": ("conv_bn_stats", STATS, " + away * away * counts", ""),
    "means of steps do not differ": ("conv_bn_stats", STATS, " + apart * apart * (n * part)", ""),
    "sums of squares": ("conv_bn_stats", NORM,
        "tl.where(ok, values - mean, 0.0)\n    return mean, tl.sum(away * away, AXIS, keep_dims=True)",
        "tl.where(ok, values, 0.0)\n    return mean, tl.sum(away * away, AXIS, keep_dims=True) - count * mean * mean"),
    "the variance is unbiased": ("conv_bn_stats", STATS, "spread = spread / M", "spread = spread / (M - 1)"),
    "a program ends after its first tile": ("conv_bn_stats", TMA, "tl.cdiv(M, BLOCK_M) * TILES, tl", "1, tl"),
    "tiles of descriptors take the rows of the next": ("conv_bn_stats", TMA, "m, channel = row * BLOCK_M +",
                                                       "m, channel = (row + 1) * BLOCK_M +"),
    "the bias is dropped": ("conv_bn_stats", STATS, "acc += vector(bias, channel, k < KG, 0.0)", ""),
    "every group has the statistics of the first": ("conv_bn_stats", STATS, "pivot, tile, m, M, channel,",
                                                    "pivot, tile, m, M, k,"),
    "the folded norm has no beta": ("conv_bn_stats", EPILOGUE, "shift += tl.load(beta", "tl.load(beta"),
    "statistics of packed groups are those before NaN was kept out": ("conv_bn_stats", STATS,
        "u = tl.load(y + m * K + channel, mask=ok, other=0.0)", "u = u"),
}
NORMS = [(norm(24, 5, activation="relu6", shortcut="tensor"), Strip(16, 16, 2)), (norm(20, 3, shortcut="norm"), None),
         (norm(5, (3, 7), n=3, activation="relu6"), Strip(16, 8, 4)), (norm(16, 6, shortcut="norm"), Strip(32, 16, 1))]
CONVS = [(conv(24, 20, (7, 5), prologue="relu", bias=True), Tile("gemm", 16, 16, 16)),
         (conv(16, 24, (5, 3), groups=2, bias=True), Tile("gemm", 32, 16, 16, SWAP=True)),
         (conv(32, 32, (5, 3), groups=8), Tile("grouped", 16, 16, 16)),
         (conv(24, 40, (5, 7), 1, prologue="relu", bias=True), Tile("gemm1x1", 16, 16, 16))]
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def norm_check(agree, forward, device):
    for i, (problem, tile) in enumerate(NORMS):
        problem = problem._replace(device=device)
        operands = norm_operands(problem, seed=i, mean=0.0 if problem.shortcut else 3000.0)
        operands.x[0, 1, 0, 2] = float("nan")
        agree(problem, operands, run(lambda p, o, tile=tile: forward(p, o, tile=tile), problem, operands))


def stats_check(forward, device):
    forward.__globals__["JOIN"]["BLOCK_T"] = 2  # of the copy: several steps join a handful of tiles
    for i, (problem, tile) in enumerate(CONVS + [(problem._replace(dtype="fp16"), None) for problem, _ in CONVS]):
        problem = stats_problem(problem)._replace(device=device)
        operands = stats_operands(problem, seed=i)
        if problem.bias:
            operands.bias.add_(1000.0)
        if problem.groups == 2:
            operands = operands._replace(mean=torch.full((problem.K,), 1000.5, device=device))
        if problem.groups == 8:
            operands.x[0, 5, 1, 2] = float("inf")
        agree_stats(problem, operands, run(lambda p, o, tile=tile: forward(p, o, tile=tile), problem, operands))


def check(family, forward, device):
    if family == "conv_bn_stats":
        stats_check(forward, device)
    else:
        norm_check({"bn_act": agree_forward, "bn_act_sums": agree_sums, "bn_act_grad": agree_grad}[family], forward,
                   device)


@pytest.mark.parametrize("family", [k.__name__.rpartition(".")[2] for k in (bn_act, bn_act_sums, bn_act_grad,
                                                                            conv_bn_stats)])
def test_the_kernels_as_they_are_pass(family, tmp_path, device):
    check(family, kernels(tmp_path, family=family), device)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault, tmp_path, device):
    family, *change = FAULTS[fault]
    forward = kernels(tmp_path, *change, family=family)
    with pytest.raises(AssertionError):
        check(family, forward, device)
