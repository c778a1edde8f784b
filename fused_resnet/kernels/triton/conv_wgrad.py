"""dw[k, r, s, c] = sum over n, p, q of du[n, p, q, k] * pro(x)[n, p * stride - pad + r * dil, ..., c].

A GEMM with output channels as rows, the columns (r, s, c) of a filter as columns and the output's pixels as the
reduction. A program owns BLOCK_M channels x BLOCK_N columns, of one tap or, where a tap has fewer channels than that,
of several. A filter is small and the reduction is long, so it is split over SPLIT_K programs, each of which writes its
sums, and a second launch adds them up in a fixed order: no atomics, the same bits every time.

du is loaded, or made from dz and u as they are loaded, and pro(x), the norm and activation in front, is recomputed
as x is loaded; what lies outside of the image is zero after it. The vectors of both norms belong to rows and columns,
which do not change on the way. Output pixels are walked with carries instead of divisions. A du of NaN meets padding,
too, and makes NaN of every tap, where a library that skips padding keeps some finite.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
import triton
import triton.language as tl

from fused_resnet.kernels.triton import grad
from fused_resnet.kernels.triton.epilogue import activate
from fused_resnet.kernels.triton.grad import du_vectors, load_du
from fused_resnet.kernels.triton.launch import arch_of, launch
from fused_resnet.kernels.triton.legal import Tile, arch_class, cdiv, chosen, dtype_class, power_of_two
from fused_resnet.kernels.triton.norm import affine, forward_vectors
from fused_resnet.kernels.triton.tiles import FILL
from fused_resnet.kernels.triton.window import in_image
from fused_resnet.problem import ConvProblem, GradOperands

FOLDED = False
SIZES = ["M", "SHARE", "H", "W", "P", "Q", "eps", "pre_eps"]
# (class of architectures, class of dtypes) -> BLOCK_K (pixels), num_stages, and the most of BLOCK_M x BLOCK_N and of
# num_warps. All heuristic: compiled, not measured.
SHAPES = {(90, "half"): (64, 3, 128, 8), (90, "tf32"): (32, 3, 64, 4), (80, "half"): (32, 3, 128, 8),
          (80, "tf32"): (32, 2, 64, 4), (80, "fp32"): (16, 2, 64, 4)}
MOST_PARTS = 64


@triton.jit
def step_pixels(n, p, q, P, Q, COUNT: tl.constexpr):
    """Image, row and column of the pixels COUNT further on: one carry each, because the steps are below P and Q."""
    q += COUNT % Q
    over = q >= Q
    q = tl.where(over, q - Q, q)
    p += COUNT // Q % P + over.to(tl.int32)
    over = p >= P
    p = tl.where(over, p - P, p)
    return n + COUNT // (P * Q) + over.to(tl.int32), p, q


@triton.jit(do_not_specialize=SIZES)
def wgrad_gemm(dy, u, gamma, mean, var, means, eps, x, pre_gamma, pre_beta, pre_mean, pre_var, pre_eps, dw,
               M, SHARE, H, W, P, Q,
               C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, GROUPS: tl.constexpr,
               STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
               DIL_H: tl.constexpr, DIL_W: tl.constexpr, PROLOGUE: tl.constexpr, PRECISION: tl.constexpr,
               WIDE: tl.constexpr, FLAT: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """dw [splits, K, R, S, C / GROUPS] from dy [N, P, Q, K] and x [N, H, W, C]; a split sums up SHARE steps of pixels.

    WIDE computes offsets in 64 bits. FLAT lets a block of columns reach over several taps.
    """
    CG: tl.constexpr = C // GROUPS
    KG: tl.constexpr = K // GROUPS
    DEPTH: tl.constexpr = R * S * CG
    TILES_M: tl.constexpr = (KG + BLOCK_M - 1) // BLOCK_M
    TILES_C: tl.constexpr = (CG + BLOCK_N - 1) // BLOCK_N
    TILES_N: tl.constexpr = (DEPTH + BLOCK_N - 1) // BLOCK_N if FLAT else R * S * TILES_C
    SINGLE: tl.constexpr = R == 1 and S == 1 and PAD_H == 0 and PAD_W == 0

    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
        W = W.to(tl.int64)
    block = pid % TILES_N
    group = pid // (TILES_N * TILES_M) % GROUPS
    split = pid // (TILES_N * TILES_M * GROUPS)
    k = pid // TILES_N % TILES_M * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    if FLAT:
        column = block * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        c, s, r = column % CG, column // CG % S, column // (CG * S)
        column_ok = column < DEPTH
    else:
        c = block % TILES_C * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        s, r = block // TILES_C % S, block // (TILES_C * S)
        column = (r * S + s) * CG + c
        column_ok = c < CG
    kernel_h = r * DIL_H - PAD_H
    kernel_w = s * DIL_W - PAD_W
    window = (kernel_h * W + kernel_w) * C + group * CG + c
    channel = group * KG + k
    vectors = du_vectors(u, gamma, mean, var, eps, means, channel, k < KG, K)
    if PROLOGUE != "":
        ahead, pre_scale, pre_shift = forward_vectors(pre_gamma, pre_beta, pre_mean, pre_var, pre_eps, group * CG + c,
                                                      column_ok)

    first = split * SHARE
    count = tl.minimum(SHARE, tl.cdiv(M, BLOCK_K) - first)
    # `parts` leaves no split without a step. Did the compiler not know, ptxas would serialise wgmma (C7515).
    tl.assume(count > 0)
    m = first * BLOCK_K + tl.arange(0, BLOCK_K)
    q = m % Q
    p = m // Q % P
    n = m // Q // P
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(count):
        ok = (m < M)[:, None] & column_ok
        if SINGLE and STRIDE_H == 1 and STRIDE_W == 1:
            pixel = m
        else:
            pixel = (n * H + p * STRIDE_H) * W + q * STRIDE_W
        if not SINGLE:
            ok = ok & in_image((p * STRIDE_H)[:, None] + kernel_h, (q * STRIDE_W)[:, None] + kernel_w, H, W)
        du = load_du(dy, u, (m * K)[None, :] + channel, (m < M)[None, :] & (k < KG), vectors)
        xs = tl.load(x + ((pixel * C)[:, None] + window), mask=ok, other=0.0)
        if PROLOGUE != "":
            # Padding is zero after the norm, not before it.
            xs = tl.where(ok, activate(affine(xs, ahead, pre_scale, pre_shift), PROLOGUE), 0.0).to(du.dtype)
        acc = tl.dot(du, xs, acc, input_precision=PRECISION)
        m += BLOCK_K
        if not (SINGLE and STRIDE_H == 1 and STRIDE_W == 1):
            n, p, q = step_pixels(n, p, q, P, Q, BLOCK_K)
    tl.store(dw + (split * K + channel) * DEPTH + column, acc, mask=(k < KG) & column_ok)


refuse = grad.refuse


def needs_finite(problem: ConvProblem) -> bool:
    """Never: NaN and Inf go through these kernels as they go through stock's."""
    return False


def steps(problem: ConvProblem, tile: Tile) -> int:
    """Products of BLOCK_K pixels that one element of dw sums up."""
    return cdiv(problem.N * problem.P * problem.Q, tile.BLOCK_K)


def parts(problem: ConvProblem, tile: Tile) -> int:
    """How many of SPLIT_K programs have a step to do: 5 steps in shares of 2 are 3 parts, not 4."""
    count = steps(problem, tile)
    return cdiv(count, cdiv(count, tile.SPLIT_K))


def flat(problem: ConvProblem, tile: Tile) -> bool:
    """Whether a block of columns reaches over several taps: one tap would not fill it."""
    return problem.R * problem.S > 1 and problem.C // problem.groups < tile.BLOCK_N


def tiles(problem: ConvProblem, tile: Tile) -> int:
    """Blocks of dw, of all groups."""
    cg, kg = problem.C // problem.groups, problem.K // problem.groups
    columns = cdiv(problem.depth, tile.BLOCK_N) if flat(problem, tile) else problem.R * problem.S * cdiv(
        cg, tile.BLOCK_N)
    return cdiv(kg, tile.BLOCK_M) * columns * problem.groups


def split(problem: ConvProblem, tile: Tile, arch: int) -> int:
    """Over how many programs the reduction is split: two on every multiprocessor, at least 8 steps for each."""
    return max(1, min(2 * FILL[arch_class(arch)] // tiles(problem, tile), steps(problem, tile) // 8, MOST_PARTS))


@functools.lru_cache(maxsize=4096)
def pick(problem: ConvProblem, arch: int) -> Tile:
    """The shipped tile for `problem`: as many rows and columns as there are, and splits that fill the chip."""
    key = arch_class(arch), dtype_class(problem.dtype)
    pixels, stages, most, warps = SHAPES.get(key) or SHAPES[80, key[1]]
    cg, kg = problem.C // problem.groups, problem.K // problem.groups
    rows = max(64 if key[0] == 90 and key[1] != "fp32" else 16, min(most, power_of_two(kg)))
    # Where every column has a tap of its own the addresses take the registers: 128 columns spilled.
    columns = max(16, min(most, power_of_two(cg)) if cg > 16 else min(64, power_of_two(problem.depth)))
    tile = Tile("wgrad", rows, columns, pixels, warps if rows * columns > 128 * 64 else 4, stages)
    return replace(tile, SPLIT_K=split(problem, tile, arch))


def legal(tile: Tile, problem: ConvProblem, arch: int) -> str | None:
    """Why `tile` cannot compute `problem` on `arch`, or None."""
    return grad.legal("wgrad", tile, problem, arch, steps(problem, tile))


def candidates(problem: ConvProblem, arch: int | None = None) -> list[Tile]:
    """The tiles worth measuring for `problem`, the shipped one first; `arch` is this machine's by default."""
    arch = arch or arch_of(torch.device(problem.device))
    base, kg = pick(problem, arch), problem.K // problem.groups
    shapes = [replace(base, BLOCK_M=m, BLOCK_N=n, num_warps=8 if m * n > 128 * 64 else 4, num_stages=stages)
              for m in (64, 128, 256) if m < 2 * max(kg, 64) for n in (64, 128, 256) if n < 2 * max(problem.depth, 64)
              for stages in (2, 3, 4)]
    shapes = [replace(tile, SPLIT_K=split(problem, tile, arch)) for tile in shapes]
    grid = shapes + [replace(base, SPLIT_K=parts) for parts in {1, max(1, base.SPLIT_K // 2), 2 * base.SPLIT_K}]
    same = {tuple(asdict(tile).values()): tile for tile in grid if legal(tile, problem, arch) is None}
    return [base, *(tile for tile in same.values() if tile != base)]


def with_tile(tile: dict[str, Any]) -> Callable[[ConvProblem, GradOperands], torch.Tensor]:
    """`forward` with the tile of a tuned row."""
    return functools.partial(forward, tile=Tile(**tile))


@functools.lru_cache(maxsize=4096)
def constants(problem: ConvProblem, tile: Tile) -> dict[str, Any]:
    """All arguments but the tensors and eps."""
    p, pixels = problem, problem.N * problem.P * problem.Q
    values = grad.geometry(p) | {
        "M": pixels, "SHARE": cdiv(steps(p, tile), tile.SPLIT_K), "FLAT": flat(p, tile), "BLOCK_M": tile.BLOCK_M,
        "BLOCK_N": tile.BLOCK_N, "BLOCK_K": tile.BLOCK_K}
    # The last steps compute offsets beyond both tensors before they mask them.
    images = cdiv(pixels + tile.BLOCK_K, p.P * p.Q) + 1
    window = (p.R * p.dilation[0] + p.padding[0]) * p.W
    reach = max((pixels + tile.BLOCK_K) * p.K, (images * max(p.H, p.P * p.stride[0]) * p.W + window) * p.C,
                tile.SPLIT_K * (p.K + tile.BLOCK_M) * p.depth)
    values["WIDE"] = reach > grad.LARGEST_INDEX
    return values


def bind(problem: ConvProblem, o: GradOperands, dw: torch.Tensor, tile: Tile) -> tuple[Any, int, dict[str, Any]]:
    """The kernel, the number of programs and the arguments of the launch that writes `dw`, or its parts."""
    arguments = grad.operands(problem, o) | constants(problem, tile) | {"dw": dw}
    for name in ("weight", "residual", "mask"):
        del arguments[name]
    return wgrad_gemm, tiles(problem, tile) * parts(problem, tile), arguments


def forward(problem: ConvProblem, operands: GradOperands, tile: Tile | None = None) -> torch.Tensor:
    """Runs one launch, and a second one where the reduction is split.

    Args:
        problem: the forward convolution; `refuse(problem)` must be None.
        operands: dy, u and x dense in channels_last memory.
        tile: a tuned tile; by default the shipped heuristic's.

    Returns:
        [K, C / groups, R, S] in fp32, channels_last, newly allocated.

    Raises:
        ValueError: the tile cannot run this problem on dy's device.
    """
    p, dy = problem, operands.dy
    arch = arch_of(dy.device)
    tile = chosen(tile, p, arch, pick, legal)
    shape = (p.K, p.R, p.S, p.C // p.groups)
    sums = torch.empty((parts(p, tile), *shape), dtype=torch.float32, device=dy.device)
    launch(*bind(p, operands, sums, tile), dy.device, tile.options)
    if len(sums) > 1:
        sums = grad.sum_parts(sums, torch.empty(shape, dtype=torch.float32, device=dy.device))
    return sums.view(shape).permute(0, 3, 1, 2)
