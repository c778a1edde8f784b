"""u = conv(pro(x), w) + bias with the mean and the biased variance of each of its channels, in training.

The implicit GEMM of `conv_bn_act`. While a tile of u is still in registers, as it was rounded to be stored, its mean
and its sum of squared differences from that mean are taken channel by channel: differences from a tile's own mean keep
digits that sums of squares lose where |mean| >> std. All of it counts from a pivot, a vector near the mean, where there
is one: the tiles' means then keep their digits too. Later launches join the tiles (Chan, Golub and LeVeque 1983) in an
order that the sizes fix: no atomics, the same bits every time. With SWAP the channels are the rows of the accumulator,
and sums over pixels are mostly sums within a thread. The norm in front is folded into one scale and one shift a
channel by a launch of its own, not in every step of every program. The tile "gemm1x1" is in `conv_bn_stats_tma`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from fused_resnet.kernels.triton import conv_bn_act, conv_bn_stats_tma, legal, tiles
from fused_resnet.kernels.triton import conv_bn_act_tma as tma
from fused_resnet.kernels.triton.conv_bn_act import SIZES, narrow_tile, packed_weight, sum_products
from fused_resnet.kernels.triton.epilogue import fold
from fused_resnet.kernels.triton.launch import arch_of, launch
from fused_resnet.kernels.triton.legal import Tile, cdiv, chosen
from fused_resnet.kernels.triton.norm import store_moments, vector
from fused_resnet.problem import ConvOperands, ConvProblem

FOLDED = False
Moments = tuple[torch.Tensor, torch.Tensor]
Statistics = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
SMALL_OPTIONS = {"num_warps": 4, "num_stages": 1}
JOIN = {"BLOCK_T": 128, "BLOCK_C": 16}
# Up to here one launch joins all tiles, beyond it a first one joins them BLOCK_T at a time.
ONE_LAUNCH = 2048


@triton.jit(do_not_specialize=SIZES)
def conv_moments(x, weight, y, means, squares, bias, pivot, pre_gamma, pre_beta, pre_mean, pre_var, pre_eps,
                 M, H, W, P, Q,
                 C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, GROUPS: tl.constexpr,
                 STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
                 DIL_H: tl.constexpr, DIL_W: tl.constexpr, PROLOGUE: tl.constexpr,
                 PRECISION: tl.constexpr, WIDE: tl.constexpr, FLAT: tl.constexpr, SWAP: tl.constexpr,
                 PACK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """y [N, P, Q, K] as in `conv_bn_act.conv_gemm`, and the moments of each tile: means - pivot, squares [tiles, K]."""
    KG: tl.constexpr = K // GROUPS
    TILES: tl.constexpr = (KG + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
        W = W.to(tl.int64)
    group = pid % (GROUPS * TILES) // TILES
    tile = pid // (GROUPS * TILES)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    k = pid % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    if SWAP:
        m, k = m[None, :], k[:, None]
    else:
        m, k = m[:, None], k[None, :]
    acc = sum_products(x, weight, m, k, group, 0, pre_gamma, pre_beta, pre_mean, pre_var, pre_eps, M, H, W, P, Q,
                       C, K, R, S, GROUPS, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W, PROLOGUE, PRECISION, FLAT,
                       SWAP, PACK, 1, BLOCK_M, BLOCK_N, BLOCK_K)

    channel = group * KG + k
    ok = (m < M) & (k < KG)
    # Also where there is no bias: ptxas serialised the wgmma pipeline of sums whose first use is a conversion to fp16.
    acc += vector(bias, channel, k < KG, 0.0)
    # The statistics are those of what is stored, because backward reads that.
    u = acc.to(y.dtype.element_ty)
    if PACK == 1:
        tl.store(y + m * K + channel, u, mask=ok)
    elif tl.max(tl.where(tl.abs(acc) < float("inf"), 0, 1)) > 0:
        # Zero weights do not stop NaN and Inf from reaching the other groups: this tile again, without them.
        narrow_tile(x, weight, y, None, bias, None, None, None, None, 0.0, pre_gamma, pre_beta, pre_mean, pre_var,
                    pre_eps, M, H, W, P, Q, tile * BLOCK_M, group * KG, C, K, R, S, GROUPS * PACK, STRIDE_H, STRIDE_W,
                    PAD_H, PAD_W, DIL_H, DIL_W, "identity", PROLOGUE, BLOCK_M, BLOCK_N)
        tl.debug_barrier()  # threads read what others of the program have stored
        u = tl.load(y + m * K + channel, mask=ok, other=0.0)
    else:
        tl.store(y + m * K + channel, u, mask=ok)
    store_moments(u, means, squares, pivot, tile, m, M, channel, k < KG, K, BLOCK_M, 1 if SWAP else 0)


@triton.jit(do_not_specialize=["M", "SPAN", "TILES", "STEPS"])
def join_moments(means, squares, mean, square, pivot, M, SPAN, TILES, STEPS, K: tl.constexpr, LAST: tl.constexpr,
                 BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Joins the moments of TILES tiles, STEPS * BLOCK_T a program: mean, square [programs, K].

    Each tile stands for SPAN elements of the M, the last one for what is left. LAST divides the squares by M and adds
    the pivot to the mean.
    """
    BLOCKS: tl.constexpr = (K + BLOCK_C - 1) // BLOCK_C
    strip = tl.program_id(0) // BLOCKS
    k = (tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    n = tl.zeros((1, BLOCK_C), tl.float32)
    average, spread = n, n
    for step in range(STEPS):
        t = ((strip * STEPS + step) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
        ok = (t < TILES) & (k < K)
        counts = tl.where(ok, tl.minimum(M - t.to(tl.int64) * SPAN, SPAN), 0).to(tl.float32)
        count = tl.sum(counts, 0, keep_dims=True)
        share = counts / tl.maximum(count, 1.0)
        values = tl.load(means + t * K + k, mask=ok, other=0.0)
        here = tl.sum(values * share, 0, keep_dims=True)
        away = tl.where(ok, values - here, 0.0)
        within = tl.load(squares + t * K + k, mask=ok, other=0.0) + away * away * counts
        # The tiles of this step join those of the steps before.
        apart = tl.where(count > 0.0, here - average, 0.0)
        part = count / tl.maximum(n + count, 1.0)
        spread += tl.sum(within, 0, keep_dims=True) + apart * apart * (n * part)
        average += apart * part
        n += count
    if LAST:
        average += vector(pivot, k, k < K, 0.0)
        spread = spread / M
    tl.store(mean + strip * K + k, average, mask=k < K)
    tl.store(square + strip * K + k, spread, mask=k < K)


@triton.jit(do_not_specialize=["eps"])
def fold_vectors(scale, shift, gamma, beta, mean, var, eps, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """scale and shift [C] in fp32 with x * scale + shift the norm of x."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    by, plus = fold(None, gamma, beta, mean, var, eps, c, c < C)
    tl.store(scale + c, by, mask=c < C)
    tl.store(shift + c, plus, mask=c < C)


def refuse(problem: ConvProblem) -> str | None:
    """Why these kernels cannot run `problem`, or None. Looks at sizes and flags only."""
    if problem.depthwise:
        return "the Triton kernels take no statistics of depthwise convolutions"
    return conv_bn_act.refuse(problem)


def needs_finite(problem: ConvProblem) -> bool:
    """Never: NaN and Inf go through these kernels as they go through stock's."""
    return False


def lawful(tile: Tile, problem: ConvProblem, arch: int) -> str | None:
    """Why `tile` cannot compute `problem` with statistics on `arch`, or None."""
    if tile.kernel not in ("gemm", "grouped", "gemm1x1") or tile.SPLIT_K != 1:
        return f"statistics need whole sums of the kernels gemm, grouped and gemm1x1, not {tile}"
    reason = legal.legal(tile, problem, arch)
    shared, limit = shared_memory(tile, problem), legal.SHARED_LIMIT[legal.arch_class(arch)]
    return reason or (f"{shared} bytes of shared memory; sm_{arch} has {limit}" if shared > limit else None)


def shared_memory(tile: Tile, problem: ConvProblem) -> int:
    """Bytes of shared memory: a persistent program loads the next tile while its warps join their sums."""
    return tile.shared(problem) + (4 * tile.num_warps * tile.BLOCK_N if tile.kernel == "gemm1x1" else 0)


def pick(problem: ConvProblem, arch: int) -> Tile:
    """The heuristic's tile: that of `conv_bn_act`, its reduction not split."""
    return replace(tiles.pick(problem, arch), SPLIT_K=1)


def candidates(problem: ConvProblem, arch: int | None = None) -> list[Tile]:
    """The tiles worth measuring for `problem`, the shipped one first; `arch` is this machine's by default."""
    arch = arch or arch_of(torch.device(problem.device))
    base = pick(problem, arch)
    rest = [tile for tile in tiles.candidates(problem, arch) if lawful(tile, problem, arch) is None]
    return [base, *(tile for tile in rest if tile != base)]


def with_tile(tile: dict[str, Any]) -> Callable[[ConvProblem, ConvOperands], Statistics]:
    """`forward` with the tile of a tuned row."""
    return functools.partial(forward, tile=Tile(**tile))


def bind(problem: ConvProblem, operands: ConvOperands, u: torch.Tensor, means: torch.Tensor, squares: torch.Tensor,
         tile: Tile) -> tuple[Any, int, dict[str, Any]]:
    """The kernel, the number of programs and the arguments of the launch that writes `u` and the tiles' moments."""
    operands = operands._replace(weight=packed_weight(operands))
    if tile.kernel == "gemm1x1":
        return conv_bn_stats_tma.bind(problem, operands, u, means, squares, tile)
    arguments = operands._asdict() | conv_bn_act.constants(problem, tile) | {
        "y": u, "means": means, "squares": squares, "pivot": operands.mean}
    groups = arguments["GROUPS"]
    programs = cdiv(arguments["M"], tile.BLOCK_M) * groups * cdiv(problem.K // groups, tile.BLOCK_N)
    return conv_moments, programs, {name: arguments[name] for name in conv_moments.arg_names}


def bind_fold(problem: ConvProblem, operands: ConvOperands, folded: torch.Tensor) -> tuple[Any, int, dict[str, Any]]:
    """The launch that folds the norm in front into `folded` [2, C]: scale and shift."""
    o = operands
    return fold_vectors, cdiv(problem.C, 128), {
        "scale": folded[0], "shift": folded[1], "gamma": o.pre_gamma, "beta": o.pre_beta, "mean": o.pre_mean,
        "var": o.pre_var, "eps": o.pre_eps, "C": problem.C, "BLOCK_C": 128}


def bind_join(problem: ConvProblem, operands: ConvOperands, parts: Moments, span: int, steps: int,
              joined: Moments) -> tuple[Any, int, dict[str, Any]]:
    """The launch that joins moments [tiles, K], each of `span` elements, to fewer."""
    programs = cdiv(parts[0].shape[0], JOIN["BLOCK_T"] * steps)
    return join_moments, programs * cdiv(problem.K, JOIN["BLOCK_C"]), {
        "means": parts[0], "squares": parts[1], "mean": joined[0], "square": joined[1],
        "pivot": operands.mean, "M": problem.N * problem.P * problem.Q, "SPAN": span, "TILES": parts[0].shape[0],
        "STEPS": steps, "K": problem.K, "LAST": programs == 1, **JOIN}


def pair(rows: int, problem: ConvProblem, device: torch.device) -> Moments:
    """Memory for the moments of so many tiles."""
    return (torch.empty((rows, problem.K), dtype=torch.float32, device=device),
            torch.empty((rows, problem.K), dtype=torch.float32, device=device))


def join(problem: ConvProblem, operands: ConvOperands, parts: Moments, span: int) -> Moments:
    """Mean and biased variance [1, K] from the moments [tiles, K] of tiles of `span` elements, the last one shorter."""
    while True:
        count = parts[0].shape[0]
        steps = 1 if count > ONE_LAUNCH else cdiv(count, JOIN["BLOCK_T"])
        joined = pair(cdiv(count, JOIN["BLOCK_T"] * steps), problem, parts[0].device)
        launch(*bind_join(problem, operands, parts, span, steps, joined), parts[0].device, SMALL_OPTIONS)
        if joined[0].shape[0] == 1:
            return joined
        parts, span = joined, span * JOIN["BLOCK_T"] * steps


def forward(problem: ConvProblem, operands: ConvOperands, tile: Tile | None = None) -> Statistics:
    """One launch for the convolution, one or two that join the statistics, and one ahead where there is a prologue.

    Args:
        problem: what is computed; `refuse(problem)` must be None.
        operands: tensors as `ops.conv_bn_stats` lays them down: x dense in channels_last memory, `mean` the pivot.
        tile: a tuned tile; by default the heuristic's.

    Returns:
        u [N, K, P, Q] in x's dtype, channels_last, with its mean and biased variance [K] in fp32.

    Raises:
        ValueError: the tile cannot run this problem on x's device.
    """
    p, x = problem, operands.x
    arch = arch_of(x.device)
    tile = chosen(tile, p, arch, pick, lawful)
    if tile.kernel == "gemm1x1" and not tma.aligned(operands):
        tile = pick(p, arch)
    if p.prologue:
        folded = torch.empty((2, p.C), dtype=torch.float32, device=x.device)
        launch(*bind_fold(p, operands, folded), x.device, SMALL_OPTIONS)
        operands = operands._replace(pre_gamma=folded[0], pre_beta=folded[1], pre_mean=None, pre_var=None)
    u = torch.empty(p.output_shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    parts = pair(cdiv(p.N * p.P * p.Q, tile.BLOCK_M), p, x.device)
    launch(*bind(p, operands, u, *parts, tile), x.device, tile.options)
    mean, var = join(p, operands, parts, tile.BLOCK_M)
    return u, mean[0], var[0]
