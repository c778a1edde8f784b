"""dx = conv_transpose(du, w) [+ residual where its mask is set], or through the activation and norm in front.

Implicit GEMM over NHWC with the pixels of x as rows, its channels as columns and taps x output channels as the
reduction. Nothing is multiplied in vain at stride > 1: output row p reads row h through tap r where
p * stride = h + pad - r * dil, so only taps of the parity (h + pad) % stride count. Programs are laid out over the
stride_h * stride_w parity classes of pixels, each of which loops over its own taps (3x3 with stride 2: 4, 2, 2
and 1 of the 9), and a class without taps still writes its zeros.

du is loaded, or made from dz and u as they are loaded: `ops.conv_grad`. Behind a prologue the epilogue recomputes
z' = norm_p(x) in fp32, stores dz' = da where the activation let z' pass, and sums dz' as stored and dz' * xhat'
over the tile; a small second launch adds the tiles up in a fixed order, so that the same bits come out every time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
import triton
import triton.language as tl

from fused_resnet.kernels.packing import packed
from fused_resnet.kernels.triton import grad
from fused_resnet.kernels.triton.grad import du_vectors, load_du
from fused_resnet.kernels.triton.launch import arch_of, launch
from fused_resnet.kernels.triton.legal import Tile, arch_class, cdiv, chosen, dtype_class, power_of_two
from fused_resnet.kernels.triton.norm import bit_of, inverse_std, normalise, passes, vector
from fused_resnet.kernels.triton.window import in_image
from fused_resnet.problem import ConvProblem, GradOperands

FOLDED = False
SIZES = ["ROWS", "HEIGHT", "WIDTH", "H", "W", "P", "Q", "eps", "pre_eps"]


def _dgrad(*sizes: int) -> Tile:
    return Tile("dgrad", *sizes)


# (class of architectures, class of dtypes) -> tiles by channels of x a group: up to 16, 32, 64, more. All heuristic:
# compiled, not measured. With 4 warps, 128 x 64 sums beside dz, u and the indices of a stride of 2 spilled; windows
# with 8 warps keep clear of the form that Hopper's compiler broke, see `window.advance`.
TILES = {
    (90, "half"): (_dgrad(128, 16, 32, 4, 3), _dgrad(128, 32, 32, 4, 3), _dgrad(128, 64, 64, 8, 3),
                   _dgrad(128, 128, 64, 8, 3)),
    (90, "tf32"): (_dgrad(128, 16, 32, 4, 3), _dgrad(128, 32, 32, 4, 3), _dgrad(128, 64, 32, 8, 3),
                   _dgrad(128, 64, 32, 8, 3)),
    (80, "half"): (_dgrad(128, 16, 32, 4, 3), _dgrad(128, 32, 32, 4, 3), _dgrad(128, 64, 32, 8, 3),
                   _dgrad(128, 128, 32, 8, 3)),
    (80, "tf32"): (_dgrad(128, 16, 32, 4, 2), _dgrad(128, 32, 32, 4, 2), _dgrad(128, 64, 32, 8, 2),
                   _dgrad(128, 64, 32, 8, 2)),
    (80, "fp32"): (_dgrad(64, 16, 16, 4, 2), _dgrad(64, 32, 16, 4, 2), _dgrad(64, 64, 16, 8, 2),
                   _dgrad(64, 64, 16, 8, 2)),
}


@triton.jit
def first_tap(parity, TAPS: tl.constexpr, STRIDE: tl.constexpr, DIL: tl.constexpr, PERIOD: tl.constexpr):
    """The first tap whose distance from the window's corner is `parity` modulo the stride; TAPS where there is none."""
    tap = 0
    if STRIDE > 1:
        tap = TAPS
        for r in tl.static_range(min(TAPS, PERIOD)):
            tap = tl.where(parity == r * DIL % STRIDE, r, tap)
    return tap


@triton.jit
def lines(i, parity, tap, STRIDE: tl.constexpr, PAD: tl.constexpr, DIL: tl.constexpr):
    """Of the i-th row (or column) of a parity class: where it lies in x, and in du behind the first tap."""
    first = (parity + (PAD + STRIDE - 1) // STRIDE * STRIDE - PAD) % STRIDE
    return first + i * STRIDE, (first + PAD - parity) // STRIDE + i - (tap * DIL - parity) // STRIDE


@triton.jit
def store_dx(acc, dx, residual, mask, at, ok):
    """dx = acc [+ residual where its bit is set]; bits lie in the order of the elements in memory."""
    if residual is not None:
        other = tl.load(residual + at, mask=ok, other=0.0).to(tl.float32)
        if mask is not None:
            other = tl.where(bit_of(mask, at, ok), other, 0.0)
        acc += other
    tl.store(dx + at, acc.to(dx.dtype.element_ty), mask=ok)


@triton.jit
def store_dz(acc, dz, sums, x, pre_gamma, pre_beta, pre_mean, pre_var, pre_eps, at, ok, channel, channel_ok, part,
             C: tl.constexpr, PROLOGUE: tl.constexpr, PIXELS: tl.constexpr):
    """dz' = acc where the activation let z' pass, and its sums over the axis PIXELS of the tile."""
    xhat = normalise(tl.load(x + at, mask=ok, other=0.0), vector(pre_mean, channel, channel_ok, 0.0),
                     inverse_std(pre_var, pre_eps, channel, channel_ok))
    if PROLOGUE != "identity":
        z = xhat * vector(pre_gamma, channel, channel_ok, 1.0) + vector(pre_beta, channel, channel_ok, 0.0)
        acc = tl.where(passes(z, PROLOGUE), acc, 0.0)
    stored = acc.to(dz.dtype.element_ty)
    tl.store(dz + at, stored, mask=ok)
    stored = tl.where(ok, stored.to(tl.float32), 0.0)
    weighted = tl.where(ok, stored * xhat, 0.0)
    row = sums + part * 2 * C + channel
    tl.store(row, tl.sum(stored, axis=PIXELS, keep_dims=True), mask=channel_ok)
    tl.store(row + C, tl.sum(weighted, axis=PIXELS, keep_dims=True), mask=channel_ok)


@triton.jit(do_not_specialize=SIZES)
def dgrad_gemm(dy, weight, u, gamma, mean, var, means, eps, x, pre_gamma, pre_beta, pre_mean, pre_var, pre_eps,
               residual, mask, dx, sums, ROWS, HEIGHT, WIDTH, H, W, P, Q,
               C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, GROUPS: tl.constexpr,
               STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
               DIL_H: tl.constexpr, DIL_W: tl.constexpr, PERIOD_H: tl.constexpr, PERIOD_W: tl.constexpr,
               PROLOGUE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, SWAP: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """dx [N, H, W, C] from dy [N, P, Q, K] and weight [K, R, S, C / GROUPS].

    A parity class has ROWS = N * HEIGHT * WIDTH pixels, some of which lie outside of x where the stride does not
    divide its size. WIDE computes offsets in 64 bits. SWAP makes the channels the rows of the accumulator.
    """
    CG: tl.constexpr = C // GROUPS
    KG: tl.constexpr = K // GROUPS
    TILES: tl.constexpr = (CG + BLOCK_N - 1) // BLOCK_N
    BLOCKS: tl.constexpr = (KG + BLOCK_K - 1) // BLOCK_K
    CLASSES: tl.constexpr = STRIDE_H * STRIDE_W
    SINGLE: tl.constexpr = R == 1 and S == 1 and PAD_H == 0 and PAD_W == 0 and CLASSES == 1
    # From one tap of a class to its next, du moves by so many rows and columns.
    BACK_H: tl.constexpr = DIL_H * PERIOD_H // STRIDE_H
    BACK_W: tl.constexpr = DIL_W * PERIOD_W // STRIDE_W

    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
        W = W.to(tl.int64)
        Q = Q.to(tl.int64)
    group = pid % (GROUPS * TILES) // TILES
    part = pid // (GROUPS * TILES)
    m = part // CLASSES * BLOCK_M + tl.arange(0, BLOCK_M)
    c = pid % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    e = tl.arange(0, BLOCK_K)
    if SWAP:  # du is [BLOCK_K, BLOCK_M], weight [BLOCK_N, BLOCK_K]
        m, c, eu, ew = m[None, :], c[:, None], e[:, None], e[None, :]
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:  # du is [BLOCK_M, BLOCK_K], weight [BLOCK_K, BLOCK_N]
        m, c, eu, ew = m[:, None], c[None, :], e[None, :], e[:, None]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    parity_h = part % CLASSES // STRIDE_W
    parity_w = part % STRIDE_W
    r0 = first_tap(parity_h, R, STRIDE_H, DIL_H, PERIOD_H)
    s0 = first_tap(parity_w, S, STRIDE_W, DIL_W, PERIOD_W)
    taps_w = (S - s0 + PERIOD_W - 1) // PERIOD_W
    steps = (R - r0 + PERIOD_H - 1) // PERIOD_H * taps_w * BLOCKS
    row = m // WIDTH
    n = row // HEIGHT
    h, p = lines(row % HEIGHT, parity_h, r0, STRIDE_H, PAD_H, DIL_H)
    w, q = lines(m % WIDTH, parity_w, s0, STRIDE_W, PAD_W, DIL_W)
    inside = m < ROWS
    if CLASSES > 1:
        inside = inside & (h < H) & (w < W)
    if SINGLE:
        corner = m * K
        at = m * C + group * CG + c
    else:
        corner = ((n * P + p) * Q + q) * K
        at = ((n * H + h) * W + w) * C + group * CG + c

    i, j, k = 0, 0, 0
    for _ in range(steps):
        ok = inside
        if not SINGLE:
            ok = ok & in_image(p - i * BACK_H, q - j * BACK_W, P, Q)
        w_ok = c < CG
        if KG % BLOCK_K != 0:
            ok = ok & (k + eu < KG)
            w_ok = w_ok & (k + ew < KG)
        channel = group * KG + k + eu
        vectors = du_vectors(u, gamma, mean, var, eps, means, channel, k + eu < KG, K)
        du = load_du(dy, u, corner - (i * BACK_H * Q + j * BACK_W) * K + channel, ok, vectors)
        tap = (r0 + i * PERIOD_H) * S + s0 + j * PERIOD_W
        ws = tl.load(weight + ((group * KG + k + ew) * (R * S) + tap) * CG + c, mask=w_ok, other=0.0)
        if SWAP:
            acc = tl.dot(ws, du, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(du, ws, acc, input_precision=PRECISION)
        # Counters, as in `window.advance`, which knows how many taps there are when it is compiled.
        if BLOCKS > 1:
            k = tl.multiple_of(tl.where(k + BLOCK_K >= KG, 0, k + BLOCK_K), BLOCK_K)
        if R * S > 1:
            j += tl.where(k == 0, 1, 0)
            i += tl.where(j == taps_w, 1, 0)
            j = tl.where(j == taps_w, 0, j)

    ok = inside & (c < CG)
    if PROLOGUE == "":
        store_dx(acc, dx, residual, mask, at, ok)
    else:
        store_dz(acc, dx, sums, x, pre_gamma, pre_beta, pre_mean, pre_var, pre_eps, at, ok, group * CG + c, c < CG,
                 part, C, PROLOGUE, 1 if SWAP else 0)


refuse = grad.refuse


def needs_finite(problem: ConvProblem) -> bool:
    """Never: NaN and Inf go through these kernels as they go through stock's."""
    return False


@functools.lru_cache(maxsize=4096)
def pick(problem: ConvProblem, arch: int) -> Tile:
    """The shipped tile for `problem`, its reduction trimmed to the channels that there are."""
    cg, kg = problem.C // problem.groups, problem.K // problem.groups
    key = arch_class(arch), dtype_class(problem.dtype)
    row = TILES.get(key) or TILES[80, key[1]]
    # What the epilogue of a prologue keeps beside the sums leaves room for half of them.
    tile = row[min(max(0, (cg - 1).bit_length() - 4), 2 if problem.prologue else 3)]
    return replace(tile, BLOCK_K=max(16, min(tile.BLOCK_K, power_of_two(kg))))


def legal(tile: Tile, problem: ConvProblem, arch: int) -> str | None:
    """Why `tile` cannot compute `problem` on `arch`, or None."""
    return grad.legal("dgrad", tile, problem, arch)


def candidates(problem: ConvProblem, arch: int | None = None) -> list[Tile]:
    """The tiles worth measuring for `problem`, the shipped one first; `arch` is this machine's by default."""
    arch = arch or arch_of(torch.device(problem.device))
    base, cg = pick(problem, arch), problem.C // problem.groups
    wgmma = base.instruction(problem.dtype, arch) == "HGMMA"  # without it swapping gains nothing, and spilled
    grid = [replace(base, BLOCK_M=m, BLOCK_N=n, num_warps=8 if m * n > 128 * 64 else 4, num_stages=stages, SWAP=swap)
            for m in (64, 128, 256) for n in (16, 32, 64, 128, 256) if n < 2 * cg and 4096 <= m * n <= 128 * 256
            for stages in (2, 3, 4) for swap in ((False, True) if n == 64 and wgmma else (False,))]
    grid += [replace(base, num_warps=12 - base.num_warps), *(replace(base, num_stages=stages) for stages in (2, 3, 4))]
    same = {tuple(asdict(tile).values()): tile for tile in grid if legal(tile, problem, arch) is None}
    return [base, *(tile for tile in same.values() if tile != base)]


def with_tile(tile: dict[str, Any]) -> Callable[[ConvProblem, GradOperands], tuple[torch.Tensor, torch.Tensor | None]]:
    """`forward` with the tile of a tuned row."""
    return functools.partial(forward, tile=Tile(**tile))


@functools.lru_cache(maxsize=4096)
def constants(problem: ConvProblem, tile: Tile) -> dict[str, Any]:
    """All arguments but the tensors and eps."""
    p = problem
    height, width = cdiv(p.H, p.stride[0]), cdiv(p.W, p.stride[1])
    values = grad.geometry(p) | {
        "ROWS": p.N * height * width, "HEIGHT": height, "WIDTH": width, "SWAP": tile.SWAP,
        "PERIOD_H": grad.period(p.stride[0], p.dilation[0]), "PERIOD_W": grad.period(p.stride[1], p.dilation[1]),
        "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N, "BLOCK_K": tile.BLOCK_K}
    # The last tile computes offsets beyond x, and a whole image of windows beyond du, before it masks them.
    pixels = values["ROWS"] * p.stride[0] * p.stride[1] + tile.BLOCK_M * p.stride[0] * p.stride[1]
    reach = max(pixels * p.C, (p.N + 1) * (p.P + p.R * p.dilation[0]) * (p.Q + p.S * p.dilation[1]) * p.K,
                p.K * p.depth)
    values["WIDE"] = reach > grad.LARGEST_INDEX
    return values


def parts(problem: ConvProblem, tile: Tile) -> int:
    """Tiles of pixels, of all parity classes."""
    return cdiv(constants(problem, tile)["ROWS"], tile.BLOCK_M) * problem.stride[0] * problem.stride[1]


def bind(problem: ConvProblem, o: GradOperands, dx: torch.Tensor, sums: torch.Tensor | None,
         tile: Tile) -> tuple[Any, int, dict[str, Any]]:
    """The kernel, the number of programs and the arguments of the launch that writes `dx` and the parts of the sums."""
    arguments = grad.operands(problem, o) | constants(problem, tile) | {"dx": dx, "sums": sums}
    weight, dtype = o.weight, o.dy.dtype
    if weight.dtype != dtype or not weight.is_contiguous(memory_format=torch.channels_last):
        arguments["weight"] = packed(("krsc", dtype), (weight,), lambda: weight.detach().to(
            dtype, memory_format=torch.channels_last))
    if not problem.prologue:
        arguments["x"] = None
    groups = problem.groups * cdiv(problem.C // problem.groups, tile.BLOCK_N)
    return dgrad_gemm, parts(problem, tile) * groups, arguments


def forward(problem: ConvProblem, operands: GradOperands,
            tile: Tile | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Runs one launch, and with a prologue a second one that adds up its sums.

    Args:
        problem: the forward convolution; `refuse(problem)` must be None.
        operands: dy, u, x and residual dense in channels_last memory; the weight in any strides.
        tile: a tuned tile; by default the shipped heuristic's.

    Returns:
        (dx, None), or with a prologue (dz', sums [2, C] in fp32); dx and dz' are [N, C, H, W] in dy's dtype,
        channels_last, newly allocated.

    Raises:
        ValueError: the tile cannot run this problem on dy's device.
    """
    p, dy = problem, operands.dy
    arch = arch_of(dy.device)
    tile = chosen(tile, p, arch, pick, legal)
    dx = torch.empty((p.N, p.C, p.H, p.W), dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
    if not p.prologue:
        launch(*bind(p, operands, dx, None, tile), dy.device, tile.options)
        return dx, None
    sums = torch.empty((parts(p, tile), 2, p.C), dtype=torch.float32, device=dy.device)
    launch(*bind(p, operands, dx, sums, tile), dy.device, tile.options)
    return dx, grad.sum_parts(sums, torch.empty((2, p.C), dtype=torch.float32, device=dy.device))
