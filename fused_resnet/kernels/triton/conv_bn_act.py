"""y = act((conv(pro(x), w) + bias - mean) * gamma / sqrt(var + eps) + beta + residual), one launch, inference.

Implicit GEMM over NHWC: a program owns BLOCK_M output pixels x BLOCK_N output channels of one group
and gathers the pixels of one tap, or of BLOCK_K elements of the window, at a time; nothing is unfolded
in memory. The programs of one pixel tile are neighbours in the grid, so that x is read from L2 after
the first. With one input channel a group there is nothing to multiply in tensor cores, and a second
kernel accumulates elementwise. Several narrow groups share a product, whose weights are zero where input
and output belong to different groups. Where there are fewer tiles than multiprocessors, the reduction
of a tile is split over SPLIT_K programs, which costs a second launch: see `finish_split`. The tiles
"gemm1x1" and "box" are in `conv_bn_act_tma`. The norm's vectors are read live, so nothing goes stale.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from fused_resnet.kernels.packing import packed
from fused_resnet.kernels.triton import conv_bn_act_tma as tma
from fused_resnet.kernels.triton import tiles
from fused_resnet.kernels.triton.epilogue import activate, finish, fold
from fused_resnet.kernels.triton.launch import arch_of, launch
from fused_resnet.kernels.triton.legal import TMA, WS, Tile, cdiv, chosen, flat, legal
from fused_resnet.kernels.triton.tiles import pick
from fused_resnet.kernels.triton.window import advance, elementwise, in_image, locate
from fused_resnet.problem import ACTIVATIONS, ConvOperands, ConvProblem

FOLDED = False
DTYPES = ("fp32", "tf32", "fp16", "bf16")
LARGEST_INDEX = 2**31 - 1
# Sizes of the batch and of the image are plain numbers: one binary serves every image size of a layer.
FINISH_OPTIONS = {"num_warps": 4, "num_stages": 1}
SIZES = ["M", "H", "W", "P", "Q", "eps", "pre_eps"]


@triton.jit
def narrow_tile(x, weight, y, residual, bias, gamma, beta, mean, var, eps, pre_gamma, pre_beta, pre_mean, pre_var,
                pre_eps, M, H, W, P, Q, pixel, channel, C: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
                S: tl.constexpr, GROUPS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
                PAD_H: tl.constexpr, PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr,
                ACTIVATION: tl.constexpr, PROLOGUE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """BLOCK_M pixels from `pixel` on x BLOCK_N channels, elementwise and few at a time to spare registers."""
    k = (channel + tl.arange(0, BLOCK_N))[None, :]
    for start in range(0, BLOCK_M, 16):
        m = (pixel + start + tl.arange(0, 16))[:, None]
        inside = (m < M) & (k < K)
        acc = elementwise(x, weight, m, k, inside, pre_gamma, pre_beta, pre_mean, pre_var, pre_eps, H, W, P, Q,
                          C, K, R, S, GROUPS, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W, PROLOGUE)
        finish(acc, y, residual, m * K + k, inside, bias, gamma, beta, mean, var, eps, k, k < K, ACTIVATION)


@triton.jit
def sum_products(x, weight, m, k, group, split, pre_gamma, pre_beta, pre_mean, pre_var, pre_eps, M, H, W, P, Q,
                 C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, GROUPS: tl.constexpr,
                 STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
                 DIL_H: tl.constexpr, DIL_W: tl.constexpr, PROLOGUE: tl.constexpr, PRECISION: tl.constexpr,
                 FLAT: tl.constexpr, SWAP: tl.constexpr, PACK: tl.constexpr, SPLIT_K: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Sums of output pixels `m` and channels `k` of one group, in the shape of m + k; see `conv_gemm`."""
    CG: tl.constexpr = C // GROUPS
    KG: tl.constexpr = K // GROUPS
    DEPTH: tl.constexpr = R * S * CG
    STEPS: tl.constexpr = (DEPTH + BLOCK_K - 1) // BLOCK_K if FLAT else R * S * ((CG + BLOCK_K - 1) // BLOCK_K)
    SINGLE: tl.constexpr = R == 1 and S == 1 and PAD_H == 0 and PAD_W == 0
    RAGGED: tl.constexpr = (DEPTH if FLAT else CG) % BLOCK_K != 0
    SHARE: tl.constexpr = (STEPS + SPLIT_K - 1) // SPLIT_K

    e = tl.arange(0, BLOCK_K)
    if SWAP:  # x is [BLOCK_K, BLOCK_M], weight [BLOCK_N, BLOCK_K]
        ex, ew = e[:, None], e[None, :]
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:  # x is [BLOCK_M, BLOCK_K], weight [BLOCK_K, BLOCK_N]
        ex, ew = e[None, :], e[:, None]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    h0, w0, corner = locate(m, H, W, P, Q, C, STRIDE_H, STRIDE_W, PAD_H, PAD_W)
    if SINGLE and STRIDE_H == 1 and STRIDE_W == 1:
        corner = m * C  # the same without a division
    filters = (group * KG + k) * (DEPTH // PACK)

    r, s, c = 0, 0, 0
    first, last = 0, STEPS
    if SPLIT_K > 1:
        first = split * SHARE
        last = tl.minimum(first + SHARE, STEPS)
        if not FLAT:
            BLOCKS: tl.constexpr = (CG + BLOCK_K - 1) // BLOCK_K
            r, s, c = first // (BLOCKS * S), first // BLOCKS % S, first % BLOCKS * BLOCK_K
    for step in range(first, last):
        if FLAT:
            start = step * BLOCK_K
            element = start + ex
            cx, sx, rx = element % CG, element // CG % S, element // (CG * S)
            left = DEPTH - start
        else:
            start = (r * S + s) * CG + c
            cx, sx, rx = c + ex, s, r
            left = CG - c
        ok = m < M
        if not SINGLE:
            ok = ok & in_image(h0 + rx * DIL_H, w0 + sx * DIL_W, H, W)
        w_ok = k < KG
        if RAGGED:
            ok = ok & (ex < left)
            w_ok = w_ok & (ew < left)
        xs = tl.load(x + corner + group * CG + (rx * DIL_H * W + sx * DIL_W) * C + cx, mask=ok, other=0.0)
        if PACK > 1:  # one block of channels: input e meets output k where both are of one group
            w_ok = w_ok & (k // (KG // PACK) == ew // (CG // PACK))
            at = start // PACK + ew % (CG // PACK)
        else:
            at = start + ew
        ws = tl.load(weight + filters + at, mask=w_ok, other=0.0)
        if PROLOGUE != "":
            scale, shift = fold(None, pre_gamma, pre_beta, pre_mean, pre_var, pre_eps, group * CG + cx, cx < CG)
            # Padding is zero after the norm, not before it.
            xs = tl.where(ok, activate(xs.to(tl.float32) * scale + shift, PROLOGUE), 0.0).to(ws.dtype)
        if SWAP:
            acc = tl.dot(ws, xs, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(xs, ws, acc, input_precision=PRECISION)
        if not FLAT:
            r, s, c = advance(r, s, c, CG, R, S, BLOCK_K)
    return acc


@triton.jit(do_not_specialize=SIZES)
def conv_gemm(x, weight, y, residual, sums, bias, gamma, beta, mean, var, eps,
              pre_gamma, pre_beta, pre_mean, pre_var, pre_eps, M, H, W, P, Q,
              C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, GROUPS: tl.constexpr,
              STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
              DIL_H: tl.constexpr, DIL_W: tl.constexpr, ACTIVATION: tl.constexpr, PROLOGUE: tl.constexpr,
              PRECISION: tl.constexpr, WIDE: tl.constexpr, FLAT: tl.constexpr, SWAP: tl.constexpr,
              PACK: tl.constexpr, SPLIT_K: tl.constexpr,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Tensor-core convolution of x [N, H, W, C] with weight [K, R, S, C / GROUPS] into y [N, P, Q, K].

    WIDE computes offsets in 64 bits. FLAT lets the reduction run over the elements of the window instead
    of tap by tap: with few channels a tap fills a small part of BLOCK_K. SWAP makes the channels the rows
    of the accumulator, so that a narrow layer still issues the widest wgmma. PACK groups of the convolution
    form one group here. With SPLIT_K > 1 a program reduces its part of the steps into `sums` [SPLIT_K, M, K].
    """
    KG: tl.constexpr = K // GROUPS
    TILES: tl.constexpr = (KG + BLOCK_N - 1) // BLOCK_N

    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
        W = W.to(tl.int64)
    group = pid % (GROUPS * TILES) // TILES
    split = pid // (GROUPS * TILES) % SPLIT_K
    m = pid // (GROUPS * TILES * SPLIT_K) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = pid % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    if SWAP:
        m, k = m[None, :], k[:, None]
    else:
        m, k = m[:, None], k[None, :]
    acc = sum_products(x, weight, m, k, group, split, pre_gamma, pre_beta, pre_mean, pre_var, pre_eps, M, H, W, P, Q,
                       C, K, R, S, GROUPS, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W, PROLOGUE, PRECISION, FLAT,
                       SWAP, PACK, SPLIT_K, BLOCK_M, BLOCK_N, BLOCK_K)
    channel = group * KG + k
    if SPLIT_K > 1:
        tl.store(sums + (split * M + m) * K + channel, acc, mask=(m < M) & (k < KG))
    elif PACK == 1:
        finish(acc, y, residual, m * K + channel, (m < M) & (k < KG), bias, gamma, beta, mean, var, eps,
               channel, k < KG, ACTIVATION)
    elif tl.max(tl.where(tl.abs(acc) < float("inf"), 0, 1)) > 0:
        # Zero weights do not stop NaN and Inf from reaching the other groups: this tile again, without them.
        narrow_tile(x, weight, y, residual, bias, gamma, beta, mean, var, eps, pre_gamma, pre_beta, pre_mean, pre_var,
                    pre_eps, M, H, W, P, Q, pid // (GROUPS * TILES) * BLOCK_M, group * KG, C, K, R, S, GROUPS * PACK,
                    STRIDE_H, STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W, ACTIVATION, PROLOGUE, BLOCK_M, BLOCK_N)
    else:
        finish(acc, y, residual, m * K + channel, (m < M) & (k < KG), bias, gamma, beta, mean, var, eps,
               channel, k < KG, ACTIVATION)


@triton.jit(do_not_specialize=["M", "eps"])
def finish_split(sums, y, residual, bias, gamma, beta, mean, var, eps, M, K: tl.constexpr, ACTIVATION: tl.constexpr,
                 WIDE: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Adds up the parts of a split reduction, always in the same order, and does what follows the convolution.

    A launch of its own: counters by which the last program of a tile would know itself need to be zeroed, which is
    a launch as well, or to outlive the launch, and then two CUDA graphs that share them must not run at once.
    """
    TILES: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
        M = M.to(tl.int64)
    m = (pid // TILES * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    k = (pid % TILES * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    ok = (m < M) & (k < K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for split in tl.static_range(SPLIT_K):
        acc += tl.load(sums + (split * M + m) * K + k, mask=ok, other=0.0)
    finish(acc, y, residual, m * K + k, ok, bias, gamma, beta, mean, var, eps, k, k < K, ACTIVATION)


@triton.jit(do_not_specialize=SIZES)
def conv_depthwise(x, weight, y, residual, bias, gamma, beta, mean, var, eps,
                   pre_gamma, pre_beta, pre_mean, pre_var, pre_eps, M, H, W, P, Q,
                   C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
                   STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
                   DIL_H: tl.constexpr, DIL_W: tl.constexpr, ACTIVATION: tl.constexpr, PROLOGUE: tl.constexpr,
                   WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Depthwise convolution: each of the K / C filters of a channel reads that channel only."""
    TILES: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
        W = W.to(tl.int64)
    m = (pid // TILES * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    k = (pid % TILES * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside = (m < M) & (k < K)
    acc = elementwise(x, weight, m, k, inside, pre_gamma, pre_beta, pre_mean, pre_var, pre_eps, H, W, P, Q,
                      C, K, R, S, C, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W, PROLOGUE)
    finish(acc, y, residual, m * K + k, inside, bias, gamma, beta, mean, var, eps, k, k < K, ACTIVATION)


def refuse(problem: ConvProblem) -> str | None:
    """Why these kernels cannot run `problem`, or None. Looks at sizes and flags only."""
    if problem.dtype not in DTYPES:
        return f"the Triton kernels compute {', '.join(DTYPES)}, not {problem.dtype}"
    if problem.device == "cpu" and problem.dtype not in ("fp32", "fp16"):
        return f"the Triton interpreter computes fp32 and fp16 only, not {problem.dtype}"
    for activation in (problem.activation, problem.prologue or "identity"):
        if activation not in ACTIVATIONS:
            return f"the Triton kernels have no activation {activation!r}"
    return None


def needs_finite(problem: ConvProblem) -> bool:
    """Never: NaN and Inf go through these kernels as they go through stock's."""
    return False


@functools.lru_cache(maxsize=4096)
def constants(problem: ConvProblem, tile: Tile) -> dict[str, Any]:
    """What a launch is compiled for and the sizes that it is given: all of its arguments but the tensors and eps."""
    p = problem
    values = {
        "M": p.N * p.P * p.Q, "H": p.H, "W": p.W, "P": p.P, "Q": p.Q, "C": p.C, "K": p.K, "R": p.R, "S": p.S,
        "STRIDE_H": p.stride[0], "STRIDE_W": p.stride[1], "PAD_H": p.padding[0], "PAD_W": p.padding[1],
        "DIL_H": p.dilation[0], "DIL_W": p.dilation[1], "ACTIVATION": p.activation, "PROLOGUE": p.prologue,
        "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N,
    }
    # The last tile computes offsets beyond the output before it masks them.
    reach = max(p.N * p.H * p.W * p.C, (values["M"] * tile.SPLIT_K + tile.BLOCK_M) * p.K, p.K * p.depth)
    values["WIDE"] = reach > LARGEST_INDEX
    if tile.kernel != "depthwise":
        pack = tile.BLOCK_K // (p.C // p.groups) if tile.kernel == "grouped" else 1
        values |= {"GROUPS": p.groups // pack, "PRECISION": "ieee" if p.dtype == "fp32" else "tf32",
                   "SWAP": tile.SWAP, "FLAT": pack == 1 and flat(p), "PACK": pack, "SPLIT_K": tile.SPLIT_K,
                   "BLOCK_K": tile.BLOCK_K}
    return values


def packed_weight(operands: ConvOperands) -> torch.Tensor:
    """The weight in x's dtype and dense in channels_last; a copy is kept while the live weight is the same."""
    weight, dtype = operands.weight, operands.x.dtype
    if weight.dtype == dtype and weight.is_contiguous(memory_format=torch.channels_last):
        return weight
    return packed(("krsc", dtype), (weight,), lambda: weight.detach().to(dtype, memory_format=torch.channels_last))


def bind(problem: ConvProblem, operands: ConvOperands, y: torch.Tensor, sums: torch.Tensor | None,
         tile: Tile) -> tuple[Any, int, dict[str, Any]]:
    """The kernel, the number of programs and the arguments of the launch that writes `y`, or the parts of its sums."""
    operands = operands._replace(weight=packed_weight(operands))
    if tile.kernel == WS:
        # Gluon is experimental: what else there is does not depend on its being there.
        from fused_resnet.kernels.triton import conv_bn_act_ws as ws
        return ws.bind(problem, operands, y, tile)
    if tile.kernel in TMA:
        return tma.bind(problem, operands, y, sums, tile)
    arguments = operands._asdict() | {"y": y} | constants(problem, tile)
    del arguments["reuse"]
    pixels = arguments["M"]
    if tile.kernel == "depthwise":
        return conv_depthwise, cdiv(pixels, tile.BLOCK_M) * cdiv(problem.K, tile.BLOCK_N), arguments
    groups = arguments["GROUPS"]
    programs = cdiv(pixels, tile.BLOCK_M) * groups * cdiv(problem.K // groups, tile.BLOCK_N) * tile.SPLIT_K
    return conv_gemm, programs, arguments | {"sums": sums}


def partial_sums(problem: ConvProblem, y: torch.Tensor, tile: Tile) -> torch.Tensor | None:
    """[SPLIT_K, M, K] in fp32 for the parts of a split reduction; None of one that is not split."""
    if tile.SPLIT_K == 1:
        return None
    return torch.empty((tile.SPLIT_K, problem.N * problem.P * problem.Q, problem.K), dtype=torch.float32,
                       device=y.device)


def bind_finish(problem: ConvProblem, operands: ConvOperands, y: torch.Tensor, sums: torch.Tensor,
                tile: Tile) -> tuple[Any, int, dict[str, Any]]:
    """The launch that follows a split reduction."""
    arguments = operands._asdict() | constants(problem, tile) | {"y": y, "sums": sums, "BLOCK_M": 16, "BLOCK_N": 64}
    programs = cdiv(arguments["M"], arguments["BLOCK_M"]) * cdiv(problem.K, arguments["BLOCK_N"])
    return finish_split, programs, {name: arguments[name] for name in finish_split.arg_names}


def candidates(problem: ConvProblem, arch: int | None = None) -> list[Tile]:
    """The tiles worth measuring for `problem`, the shipped one first; `arch` is this machine's by default.

    Raises:
        ValueError: no tile can run there.
    """
    return tiles.candidates(problem, arch or arch_of(torch.device(problem.device)))


def with_tile(tile: dict[str, Any]) -> Callable[[ConvProblem, ConvOperands], torch.Tensor]:
    """`forward` with the tile of a tuned row."""
    return functools.partial(forward, tile=Tile(**tile))


def forward(problem: ConvProblem, operands: ConvOperands, tile: Tile | None = None) -> torch.Tensor:
    """Runs one launch and returns its output.

    Args:
        problem: what is computed; `refuse(problem)` must be None.
        operands: tensors as `ConvOperands` lays them down: x and residual dense in channels_last.
        tile: a tuned tile; by default the shipped heuristic's.

    Returns:
        [N, K, P, Q] in x's dtype, channels_last, newly allocated.

    Raises:
        ValueError: the tile cannot run this problem on x's device.
    """
    x = operands.x
    arch = arch_of(x.device)
    tile = chosen(tile, problem, arch, pick, legal)
    if tile.kernel in (*TMA, WS) and not tma.aligned(operands):
        tile = pick(problem, arch)
    y = torch.empty(problem.output_shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if y.numel():
        sums = partial_sums(problem, y, tile)
        launch(*bind(problem, operands, y, sums, tile), x.device, tile.options)
        if sums is not None:
            launch(*bind_finish(problem, operands, y, sums, tile), x.device, FINISH_OPTIONS)
    return y
