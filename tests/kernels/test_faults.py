"""Do the tests bite? Each deliberate bug below, put into a copy of the kernels, must fail the same small check."""

import functools
import importlib
import shutil
import sys
from pathlib import Path

import pytest
import torch

from fused_resnet.kernels.triton import conv_bn_act
from fused_resnet.kernels.triton.legal import Tile
from fused_resnet.ops.stem import StemProblem, reference_of
from fused_resnet.testing import inputs
from fused_resnet.testing.cases import conv
from tests.kernels.judge import agree, guarded_run

SOURCE = Path(conv_bn_act.__file__).parent
PACKAGE = "fused_resnet.kernels.triton"
CHECK = [
    conv(16, 24, (4, 5), residual=True, bias=True), conv(40, 8, 4, n=1, prologue="relu"),
    conv(24, 20, (6, 4), stride=(2, 1), n=1), conv(40, 16, 6, groups=2, dilation=2, n=1),
    conv(3, 8, 5, activation="silu"), conv(24, 16, 4, 1, activation="hardswish"),
    conv(4, 8, 5, groups=4, prologue="relu6"), conv(8, 8, 5, groups=8, residual=True, activation="relu6"),
]
GEMM, WINDOW, EPILOGUE, TMA = "conv_bn_act.py", "window.py", "epilogue.py", "conv_bn_act_tma.py"
# Tiles that the heuristic does not take for problems as small as these.
FORCED = [
    (conv(16, 24, (5, 6), n=3, residual=True, bias=True), Tile("box", 16, 16, 16)),
    (conv(32, 16, (8, 6), n=3, stride=2), Tile("box", 16, 16, 16)),
    (conv(32, 64, 4, groups=2, prologue="relu"), Tile("box", 16, 16, 16, SPLIT_K=3)),
    (conv(16, 24, (9, 7), 1, stride=(3, 2), padding=0), Tile("box", 16, 16, 16)),
    (conv(16, 24, (5, 6), n=3, residual=True, bias=True), Tile("box", 16, 16, 16, SWAP=True)),
    (conv(24, 40, 5, 1, n=1, residual=True), Tile("gemm1x1", 16, 16, 16)),
    (conv(40, 24, 5, 1, n=1, prologue="silu"), Tile("gemm1x1", 16, 16, 16, SPLIT_K=3)),
    (conv(24, 40, 5, 1, n=1, residual=True), Tile("gemm1x1", 16, 16, 16, SWAP=True, SPLIT_K=2)),
    (conv(24, 20, 4, residual=True), Tile("gemm", 16, 16, 16, SPLIT_K=4)),
    (conv(32, 32, 4, groups=8, residual=True), Tile("grouped", 16, 16, 16)),
]
# What is broken -> (file, what stands there, what is put there instead).
FAULTS = {
    "columns left of the image are read": (WINDOW, "(h < H) & (w >= 0) & (w < W)", "(h < H) & (w < W)"),
    "rows below the image are read": (WINDOW, "(h >= 0) & (h < H)", "(h >= 0)"),
    "depthwise reads padding": (WINDOW, "ok = inside & in_image(h0 + r * DIL_H, w0 + s * DIL_W, H, W)", "ok = inside"),
    "mean and var are swapped": (EPILOGUE, "tl.load(mean + channel", "tl.load(var + channel"),
    "the residual is skipped": (EPILOGUE, "acc += tl.load(residual", "tl.load(residual"),
    "ReLU comes before the add": (EPILOGUE,
        "acc = acc * scale + shift", "acc = activate(acc * scale + shift, ACTIVATION)"),
    "eps is dropped": (EPILOGUE, ".to(tl.float32) + eps", ".to(tl.float32)"),
    "gamma is dropped": (EPILOGUE, "scale *= ", ""),
    "beta is scaled": (EPILOGUE, "shift += tl.load(beta", "shift += scale * tl.load(beta"),
    "the bias is dropped": (EPILOGUE, "shift = tl.load(bias", "tl.load(bias"),
    "padding is normalised": (GEMM, "tl.where(ok, activate(xs.to(tl.float32) * scale + shift, PROLOGUE), 0.0).to",
                              "activate(xs.to(tl.float32) * scale + shift, PROLOGUE).to"),
    "depthwise normalises padding": (WINDOW, "tl.where(ok, activate(xs * scale + shift, PROLOGUE), 0.0)",
                                     "activate(xs * scale + shift, PROLOGUE)"),
    "the prologue takes another group's vectors": (GEMM,
        "pre_eps, group * CG + cx, cx < CG", "pre_eps, cx + 1, cx < CG"),
    "columns take the stride of rows": (WINDOW, "w = m % Q * STRIDE_W", "w = m % Q * STRIDE_H"),
    "rows are not dilated": (GEMM, "in_image(h0 + rx * DIL_H", "in_image(h0 + rx"),
    "taps are not dilated": (GEMM, "(rx * DIL_H * W + sx * DIL_W) * C + cx", "(rx * W + sx) * C + cx"),
    "every group reads the first": (GEMM, "x + corner + group * CG", "x + corner"),
    "every group has the filters of the first": (GEMM, "filters = (group * KG + k) * ", "filters = k * "),
    "channels of the next pixel count": (GEMM, "ok = ok & (ex < left)", "ok = ok & (ex < left + 1)"),
    "the tail of the channels counts": (GEMM, "% BLOCK_K != 0", "% BLOCK_K < 0"),
    "the last channels are forgotten": (GEMM, "((CG + BLOCK_K - 1) // BLOCK_K)", "max(1, CG // BLOCK_K)"),
    "the tap moves on before its channels are done": (WINDOW, "s += tl.where(c == 0, 1, 0)", "s += 1"),
    "rows beyond the output are written": (GEMM, "m * K + channel, (m < M) & (k < KG)",
        "m * K + channel, (m < M + 1) & (k < KG)"),
    "channels beyond the group are written": (GEMM, "m * K + channel, (m < M) & (k < KG)", "m * K + channel, m < M"),
    "depthwise writes beyond the output": (GEMM, "inside = (m < M) & (k < K)", "inside = k < K"),
    "the multiplier takes channels in turn": (WINDOW, "c = k // (K // GROUPS) * CG + i", "c = k % C"),
    "ReLU drops NaN": (EPILOGUE, 'KIND == "relu":\n        v = tl.where(v <= 0.0, 0.0, v)',
                       'KIND == "relu":\n        v = tl.where(v > 0.0, v, 0.0)'),
    "ReLU6 does not saturate": (EPILOGUE, "tl.where(v >= 6.0, 6.0, v)", "v"),
    "a box does not move with its tap's row": (WINDOW, "p + h // STRIDE_H - LEAD_H", "p - LEAD_H + PAD_H"),
    "a strided box takes the other rows": (WINDOW, "- LEAD_H, h % STRIDE_H", "- LEAD_H, (h + 1) % STRIDE_H"),
    "a strided box takes the other columns": (WINDOW, "w % STRIDE_W * C + c", "c"),
    "a view takes the stride of the other side": (TMA, "cdiv(p.H, sh), sh, cdiv(p.W, sw)",
                                                  "cdiv(p.H, sw), sh, cdiv(p.W, sh)"),
    "boxes overlap": (WINDOW, "row % TILES_P * TH", "row % TILES_P"),
    "the second image takes the place of the first": (WINDOW, "return row // TILES_P * NB", "return 0 * row"),
    "weights stay at the first tap": (TMA, "weight.load([k, step * BLOCK_K])", "weight.load([k, c])"),
    "the persistent loop ends after its first round": (TMA, "tl.cdiv(M, BLOCK_M) * TILES * SPLIT_K, tl", "1, tl"),
    "descriptors add no residual": (EPILOGUE, "acc += other.reshape(acc.shape).to", "other.reshape(acc.shape).to"),
    "the residual of a swapped block is not transposed": (EPILOGUE, "other.reshape(acc.shape[1], acc.shape[0]).T",
                                                          "other.reshape(acc.shape)"),
    "a swapped block is stored as it lies": (EPILOGUE, "block = block.T", "block = block + 0"),
    "the norm of a swapped block follows its pixels": (EPILOGUE, "channel[:, None] if SWAP",
                                                       "channel[None, :] if SWAP"),
    "a box normalises padding": (TMA, "tl.where(ok, activate(xs.to(tl.float32) * scale + shift, PROLOGUE), 0.0).to",
                                 "activate(xs.to(tl.float32) * scale + shift, PROLOGUE).to"),
    "a box's prologue takes another group's vectors": (TMA, "channel = group + c", "channel = c"),
    "a prologue keeps to the first channels": (TMA, "channel = c + tl.arange", "channel = tl.arange"),
    "every group of boxes reads the first": (TMA, "// (K // GROUPS) * CG  #", "* 0  #"),
    "each part of a box begins with the first tap": (TMA, "first // (BLOCKS * S), first // BLOCKS % S", "0, 0"),
    "the last part of a box sums up all steps": (TMA, "last = tl.minimum(first + SHARE, last)", "last = last + 0"),
    "each part of a 1x1 begins with the first channels": (TMA, "            first = split * SHARE",
                                                          "            first = 0"),
    "the parts of a 1x1 lie in one place": (TMA, "sums, [split, m, k]", "sums, [0 * split, m, k]"),
    "the last part of the sums is forgotten": (GEMM, "tl.static_range(SPLIT_K)", "tl.static_range(SPLIT_K - 1)"),
    "each part begins with the first tap": (GEMM, "first // (BLOCKS * S), first // BLOCKS % S", "0, 0"),
    "each part sums up all steps": (GEMM, "last = tl.minimum(first + SHARE, STEPS)", "last = STEPS"),
    "groups of one product mix": (GEMM, "w_ok & (k // (KG // PACK) == ew // (CG // PACK))", "w_ok"),
    "NaN reaches the other groups": (GEMM, "tl.where(tl.abs(acc) < float(\"inf\"), 0, 1)) > 0", "m) < 0"),
    "silu has the wrong sign": (EPILOGUE, "tl.exp(-v)", "tl.exp(v)"),
}
STEM = "stem.py"
STEM_FAULTS = {
    "a fourth channel is read": (STEM, "(c < C)", "(c <= C)"),
    "the eighth pixel counts": (STEM, "& (s < S)", "& (s <= S)"),
    "the eighth row counts": (STEM, "& (r < R)", "& (r <= R)"),
    "the pool reads beyond the first row": (STEM, "in_image(p, column, P, Q)", "in_image(p + 1, column, P + 1, Q)"),
    "the pool is padded with zeros": (STEM, "P, Q), v, float(\"-inf\"))", "P, Q), v, 0.0)"),
    "the shared row is forgotten": (STEM, "tl.where(ends, line,", "tl.where(ends, float(\"-inf\"),"),
    "the row of the next window begins with the last": (STEM, "tl.where(j == 0, float(\"-inf\"), line)", "line"),
    "a window ends a row early": (STEM, "(i % 2 == 0)\n", "(i % 2 == 1)\n"),
    "columns of the next image count": (STEM, "image = (m // QP)", "image = (m // (QP + 1))"),
    "rows beyond the pooled map are written": (STEM, "& (pooled < PP)", ""),
    "activation follows before the norm": (STEM, "activate(tl.dot(xs, ws, input_precision=PRECISION) * scale + shift, ",
                                           "scale * activate(tl.dot(xs, ws, input_precision=PRECISION) + shift, "),
    "the image's strides are mixed up": (STEM, "row % H * stride_h + pixel % W * stride_w",
                                         "row % H * stride_w + pixel % W * stride_h"),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def kernels(folder, file=None, old="", new="", family="conv_bn_act"):
    """A family's `forward` from a copy of its sources in which `old` reads `new`."""
    name = "broken_" + "".join(ch if ch.isalnum() else "_" for ch in folder.name)
    copy = Path(shutil.copytree(SOURCE, folder / name, ignore=shutil.ignore_patterns("__pycache__")))
    for path in copy.glob("*.py"):
        text = path.read_text()
        if path.name == file:
            assert old in text, f"{file} no longer reads {old!r}: bring this fault up to date"
            text = text.replace(old, new)
        path.write_text(text.replace(PACKAGE, name))
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(f"{name}.{family}").forward
    finally:
        sys.path.remove(str(folder))
        for module in [m for m in sys.modules if m.split(".")[0] == name]:
            del sys.modules[module]


def small_check(forward, device):
    for i, (problem, tile) in enumerate([(problem, None) for problem in CHECK] + FORCED):
        problem = problem._replace(device=device)
        operands = inputs.make(problem, seed=i)._replace(eps=0.25, pre_eps=0.5)
        if problem.residual:
            operands.residual[0, 1, 1, :2] = torch.tensor([float("nan"), 8.0])
        if problem.R == 1:  # beside the tail of another pixel's channels, which weights of zero do not hide then
            operands.x[0, 0, -1, -1] = float("nan")
        if problem.groups == 8:
            operands.x[0, 5, 1, 2] = float("inf")
        agree(problem, operands, guarded_run(functools.partial(forward, tile=tile), problem, operands))


def test_the_kernels_as_they_are_pass(tmp_path, device):
    small_check(kernels(tmp_path), device)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault, tmp_path, device):
    forward = kernels(tmp_path, *FAULTS[fault])
    with pytest.raises(AssertionError):
        small_check(forward, device)


def test_a_fault_that_is_not_in_the_source_is_an_error(tmp_path):
    with pytest.raises(AssertionError, match="no longer reads"):
        kernels(tmp_path, GEMM, "no such line", "")


def stem_check(forward, device):
    for size, n in (((18, 15), 2), ((5, 9), 1)):
        problem = StemProblem(*conv(3, 24, size, 7, n=n, stride=2, activation="silu"))._replace(device=device)
        operands = inputs.make(problem)
        # One behind the last row and column of a window whose neighbours in the pool do not reach it either.
        operands.x[:, 1, 2, 2], operands.x[:, 0, 6 % size[0], 6] = float("nan"), float("inf")
        operands.beta.sub_(3.0)
        agree(problem, operands, guarded_run(forward, problem, operands), stem_stock)


def stem_stock(problem, operands, dtype=torch.float32):
    wide = {name: value.to(dtype) for name, value in operands._asdict().items() if isinstance(value, torch.Tensor)}
    return reference_of(problem, operands._replace(**wide))


def test_the_stem_as_it_is_passes(tmp_path, device):
    stem_check(kernels(tmp_path, family="stem"), device)


@pytest.mark.parametrize("fault", STEM_FAULTS)
def test_a_fault_in_the_stem_is_noticed(fault, tmp_path, device):
    forward = kernels(tmp_path, *STEM_FAULTS[fault], family="stem")
    with pytest.raises(AssertionError):
        stem_check(forward, device)
