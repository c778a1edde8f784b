"""y = maxpool(act((conv(x, w) + bias - mean) * gamma / sqrt(var + eps) + beta)), 3x3 pool with stride 2, inference.

The image is packed to 4 channels, so that a pixel is one aligned load, and the window of a pixel is one row
of a matrix product: R rows x 8 pixels x 4 channels, 256 for 7x7, where the weights of what is no part of the
window are zero. A program owns BLOCK_M columns of the pooled map (of any images) x BLOCK_N channels and walks down
its rows. The rows of the convolution follow each other, so that the row which two windows of the pool share is
computed once; the columns which they share are computed twice: 1.5 times the products, none of them stored.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from fused_resnet.kernels.packing import packed
from fused_resnet.kernels.triton.epilogue import activate, fold
from fused_resnet.kernels.triton.launch import arch_of, launch, multiprocessors
from fused_resnet.kernels.triton.legal import SHARED_LIMIT, Tile, arch_class, cdiv, chosen, dtype_class, power_of_two
from fused_resnet.kernels.triton.window import in_image
from fused_resnet.problem import ACTIVATIONS, ELEMENT_BYTES, ConvOperands, ConvProblem

FOLDED = False
DTYPES = ("fp32", "tf32", "fp16", "bf16")
CHANNELS = 4  # of a packed pixel
PACK_OPTIONS = {"num_warps": 4, "num_stages": 1}
PACK_BLOCK = 256
BLOCK_LIMIT = 1024  # columns that the last program may count beyond the last image
# (class of architectures, class of dtypes) -> tile, all heuristic: compiled, not measured. BLOCK_K is the window's.
# The addresses of a window of 256 elements take the registers: with 4 warps, 64 columns spilled.
TILES = {
    (90, "half"): Tile("stem", 64, 64, 0, 8, 3), (90, "tf32"): Tile("stem", 64, 64, 0, 8, 2),
    (80, "half"): Tile("stem", 64, 64, 0, 8, 3), (80, "tf32"): Tile("stem", 32, 64, 0, 8, 2),
    (86, "half"): Tile("stem", 32, 64, 0, 4, 2), (86, "tf32"): Tile("stem", 16, 16, 0, 4, 2),
    (90, "fp32"): Tile("stem", 32, 32, 0, 4, 2), (80, "fp32"): Tile("stem", 32, 32, 0, 4, 2),
    (86, "fp32"): Tile("stem", 32, 32, 0, 4, 2),
}


# Columns, channels and warps of the tiles that tuning may choose.
SHAPES = ((16, 64, 4), (32, 64, 4), (32, 64, 8), (64, 32, 4), (64, 32, 8), (64, 64, 8), (128, 32, 8))
# (wgmma, bytes of an element) -> addresses and values that a thread holds without spilling, as compiled: 176 did not
# spill for 16 bits and 224 did; for 32 bits the largest tile that was tried stands here.
REGISTERS = {(True, 2): 176, (False, 2): 112, (True, 4): 112, (False, 4): 88}


@triton.jit(do_not_specialize=["PIXELS", "H", "W", "stride_n", "stride_c", "stride_h", "stride_w"])
def pack_pixels(x, y, stride_n, stride_c, stride_h, stride_w, PIXELS, H, W, C: tl.constexpr, CHANNELS: tl.constexpr,
                BLOCK: tl.constexpr):
    """x in any strides -> y [N, H, W, CHANNELS], zeros behind the C channels."""
    pixel = (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[:, None]
    c = tl.arange(0, CHANNELS).to(tl.int64)[None, :]
    row = pixel // W
    at = row // H * stride_n + row % H * stride_h + pixel % W * stride_w + c * stride_c
    tl.store(y + pixel * CHANNELS + c, tl.load(x + at, mask=(pixel < PIXELS) & (c < C), other=0.0), mask=pixel < PIXELS)


@triton.jit(do_not_specialize=["COLUMNS", "ROWS", "H", "W", "P", "Q", "PP", "QP", "eps"])
def conv_pool(x, weight, y, bias, gamma, beta, mean, var, eps, COLUMNS, ROWS, H, W, P, Q, PP, QP,
              K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
              PAD_H: tl.constexpr, PAD_W: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
              CHANNELS: tl.constexpr, LINE: tl.constexpr,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """y [N, PP, QP, K] from x [N, H, W, CHANNELS] and weight [K, BLOCK_K]; LINE pixels are one row of a window.

    ROWS pooled rows a program: one row of the convolution to begin with, then two for each.
    """
    TILES: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    strips = tl.cdiv(PP, ROWS)
    pid = tl.program_id(0)
    top = pid // TILES % strips * ROWS
    m = (pid // TILES // strips * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    k = (pid % TILES * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    e = tl.arange(0, BLOCK_K)
    q = m % QP
    image = (m // QP).to(tl.int64)
    pixels = x + image * (H * W * CHANNELS)
    r = (e // (LINE * CHANNELS))[None, :]
    s = (e // CHANNELS % LINE)[None, :]
    inside = (m < COLUMNS) & (r < R) & (s < S)
    ws = tl.load(weight + k * BLOCK_K + e[:, None], mask=k < K, other=0.0)
    scale, shift = fold(bias, gamma, beta, mean, var, eps, k, k < K)

    best = tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32)  # of the rows of the window so far
    line = best  # of the columns of the row so far
    i, j = 0, 0
    for _ in range(3 * (2 * ROWS + 1)):
        p = 2 * top - 1 + i
        column = 2 * q - 1 + j
        h = p * STRIDE_H - PAD_H + r
        w = column * STRIDE_W - PAD_W + s
        ok = inside & in_image(h, w, H, W)
        xs = tl.load(pixels + (h * W + w) * CHANNELS + (e % CHANNELS)[None, :], mask=ok, other=0.0)
        v = activate(tl.dot(xs, ws, input_precision=PRECISION) * scale + shift, ACTIVATION)
        v = tl.where(in_image(p, column, P, Q), v, float("-inf"))
        line = tl.maximum(tl.where(j == 0, float("-inf"), line), v, propagate_nan=tl.PropagateNan.ALL)
        total = tl.maximum(best, line, propagate_nan=tl.PropagateNan.ALL)
        # Each second row ends one window and begins the next.
        ends = (j == 2) & (i % 2 == 0)
        pooled = top + i // 2 - 1
        out = y + ((image * PP + pooled) * QP + q) * K + k
        tl.store(out, total.to(y.dtype.element_ty),
                 mask=(m < COLUMNS) & (k < K) & (ends & (i > 0) & (pooled < PP)))
        best = tl.where(ends, line, tl.where(j == 2, total, best))
        j = tl.where(j == 2, 0, j + 1)
        i += tl.where(j == 0, 1, 0)


def refuse(problem: ConvProblem) -> str | None:
    """Why these kernels cannot run `problem`, or None. Looks at sizes and flags only."""
    p = problem
    if p.dtype not in DTYPES:
        return f"the Triton kernels compute {', '.join(DTYPES)}, not {p.dtype}"
    if p.device == "cpu" and p.dtype not in ("fp32", "fp16"):
        return f"the Triton interpreter computes fp32 and fp16 only, not {p.dtype}"
    if p.activation not in ACTIVATIONS:
        return f"the Triton kernels have no activation {p.activation!r}"
    if p.C > CHANNELS or max(p.R, p.S) > 8:
        return f"a window of {p.R}x{p.S} pixels of {p.C} channels is larger than 8x8 of {CHANNELS}"
    if p.groups > 1 or p.dilation != (1, 1):
        return "the stem has neither groups nor dilation"
    if max(p.H * p.W * CHANNELS, p.N * p.output_shape[3] + BLOCK_LIMIT) >= 2**31:
        return f"{p.N} images of {p.H}x{p.W} pixels are too large for 32-bit offsets within one, or in their columns"
    return None


def needs_finite(problem: ConvProblem) -> bool:
    """Never: NaN and Inf go through these kernels as they go through stock's."""
    return False


def window(problem: ConvProblem) -> tuple[int, int]:
    """Rows and pixels a row of a window, each rounded up to a power of two; together 16 elements at least."""
    return power_of_two(problem.R), max(4, power_of_two(problem.S))


def pick(problem: ConvProblem, arch: int) -> Tile:
    """The shipped tile for `problem`."""
    return TILES[arch_class(arch), dtype_class(problem.dtype)]


def shared(tile: Tile, problem: ConvProblem, arch: int) -> int:
    """Bytes of shared memory: windows that are loaded ahead, the weights, and the output, which changes its layout."""
    rows, pixels = window(problem)
    # wgmma still reads the window before; without it that is in registers.
    ahead = tile.num_stages - (not _wgmma(problem, arch))
    loads = (tile.BLOCK_M * ahead + tile.BLOCK_N) * rows * pixels * CHANNELS
    return (loads + tile.BLOCK_M * tile.BLOCK_N) * ELEMENT_BYTES[problem.dtype]


def _wgmma(problem: ConvProblem, arch: int) -> bool:
    return arch_class(arch) == 90 and problem.dtype != "fp32"


def legal(tile: Tile, problem: ConvProblem, arch: int) -> str | None:
    """Why `tile` cannot compute `problem` on `arch`, or None."""
    sizes = (tile.BLOCK_M, tile.BLOCK_N, tile.num_warps)
    if tile.kernel != "stem" or tile.SWAP or tile.SPLIT_K != 1:
        return f"{tile} is no tile of the stem"
    if any(size < 1 or size & (size - 1) for size in sizes) or min(sizes[:2]) < 16:
        return f"{tile.BLOCK_M} x {tile.BLOCK_N} and {tile.num_warps} warps are no powers of two, blocks from 16 on"
    if problem.device == "cuda" and problem.dtype == "fp32" and max(tile.BLOCK_M, tile.BLOCK_N) > 32:
        return "more than 32 x 32 sums in fp32, without tensor cores, spill registers"
    rows, pixels = window(problem)
    registers = tile.BLOCK_M * (rows * pixels * CHANNELS + 3 * tile.BLOCK_N) // (32 * tile.num_warps)
    if registers > REGISTERS[_wgmma(problem, arch), ELEMENT_BYTES[problem.dtype]]:
        return f"{registers} addresses of a window and values of a pool in the registers of one thread"
    if _wgmma(problem, arch) and (tile.BLOCK_M < 64 or tile.num_warps % 4):
        return f"wgmma needs 64 rows and 4 warps, not {tile.BLOCK_M} and {tile.num_warps}"
    if (used := shared(tile, problem, arch)) > SHARED_LIMIT[arch_class(arch)]:
        return f"{used} bytes of shared memory; sm_{arch} has {SHARED_LIMIT[arch_class(arch)]}"
    return None


def candidates(problem: ConvProblem, arch: int | None = None) -> list[Tile]:
    """The tiles worth measuring for `problem`, the shipped one first; `arch` is this machine's by default."""
    arch = arch or arch_of(torch.device(problem.device))
    base = pick(problem, arch)
    grid = [Tile("stem", m, n, 0, warps, stages) for (m, n, warps), stages in itertools.product(SHAPES, (2, 3))]
    return [base, *(tile for tile in grid if tile != base and tile.BLOCK_N < 2 * problem.K
                    and legal(tile, problem, arch) is None)]


def with_tile(tile: dict[str, Any]) -> Callable[[ConvProblem, ConvOperands], torch.Tensor]:
    """`forward` with the tile of a tuned row."""
    return functools.partial(forward, tile=Tile(**tile))


def _packed_weight(problem: ConvProblem, operands: ConvOperands) -> torch.Tensor:
    """[K, rows * pixels * CHANNELS] in x's dtype, kept while the live weight is the same."""
    weight, dtype, (rows, pixels) = operands.weight, operands.x.dtype, window(problem)

    def build() -> torch.Tensor:
        edges = (0, CHANNELS - problem.C, 0, pixels - problem.S, 0, rows - problem.R)
        return F.pad(weight.detach().to(dtype).permute(0, 2, 3, 1), edges).flatten(1).contiguous()

    return packed(("stem", dtype), (weight,), build)


def bind_pack(problem: ConvProblem, operands: ConvOperands) -> tuple[Any, int, dict[str, Any]]:
    """The launch that packs the image, into its argument y."""
    p, x = problem, operands.x
    names = ("stride_n", "stride_c", "stride_h", "stride_w")
    pixels = p.N * p.H * p.W
    arguments = dict(zip(names, x.stride(), strict=True)) | {
        "x": x, "y": torch.empty((p.N, p.H, p.W, CHANNELS), dtype=x.dtype, device=x.device), "PIXELS": pixels,
        "H": p.H, "W": p.W, "C": p.C, "CHANNELS": CHANNELS, "BLOCK": PACK_BLOCK}
    return pack_pixels, cdiv(pixels, PACK_BLOCK), arguments


@functools.lru_cache(maxsize=1024)
def constants(problem: ConvProblem, tile: Tile, multiprocessors: int) -> tuple[int, dict[str, Any]]:
    """How many programs there are, and all arguments but the tensors and eps."""
    p, (rows, pixels) = problem, window(problem)
    _, _, height, width = p.output_shape
    columns = p.N * width
    tiles = cdiv(columns, tile.BLOCK_M) * cdiv(p.K, tile.BLOCK_N)
    # Whole columns, unless that leaves multiprocessors idle; the shared row is computed again for each strip.
    strip = max(min(4, height), cdiv(height, max(1, cdiv(4 * multiprocessors, tiles))))
    return tiles * cdiv(height, strip), {
        "COLUMNS": columns, "ROWS": strip, "H": p.H, "W": p.W, "P": p.P, "Q": p.Q, "PP": height, "QP": width,
        "K": p.K, "R": p.R, "S": p.S, "STRIDE_H": p.stride[0], "STRIDE_W": p.stride[1], "PAD_H": p.padding[0],
        "PAD_W": p.padding[1], "ACTIVATION": p.activation, "PRECISION": "ieee" if p.dtype == "fp32" else "tf32",
        "CHANNELS": CHANNELS, "LINE": pixels, "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N,
        "BLOCK_K": rows * pixels * CHANNELS}


def bind(problem: ConvProblem, operands: ConvOperands, image: torch.Tensor, y: torch.Tensor,
         tile: Tile) -> tuple[Any, int, dict[str, Any]]:
    """The launch that writes `y` from the packed `image`."""
    o = operands
    programs, values = constants(problem, tile, multiprocessors(o.x.device))
    return conv_pool, programs, values | {
        "x": image, "weight": _packed_weight(problem, o), "y": y, "bias": o.bias, "gamma": o.gamma, "beta": o.beta,
        "mean": o.mean, "var": o.var, "eps": o.eps}


def forward(problem: ConvProblem, operands: ConvOperands, tile: Tile | None = None) -> torch.Tensor:
    """Packs the image in one launch and computes all the rest in another.

    Args:
        problem: what is computed, `output_shape` being the pooled one; `refuse(problem)` must be None.
        operands: x in any strides.
        tile: a tuned tile; by default the shipped heuristic's.

    Returns:
        The pooled map in x's dtype, channels_last, newly allocated.

    Raises:
        ValueError: the tile cannot run this problem on x's device.
    """
    x = operands.x
    arch = arch_of(x.device)
    tile = chosen(tile, problem, arch, pick, legal)
    y = torch.empty(problem.output_shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if y.numel():
        kernel, programs, arguments = bind_pack(problem, operands)
        launch(kernel, programs, arguments, x.device, PACK_OPTIONS)
        launch(*bind(problem, operands, arguments["y"], y, tile), x.device, tile.options)
    return y
