"""y = act((conv(pro(x), w) + bias - mean) * gamma / sqrt(var + eps) + beta + residual), one launch, inference.

Implicit GEMM over NHWC: a program owns BLOCK_M output pixels x BLOCK_N output channels of one group
and gathers the pixels of one tap, or of BLOCK_K elements of the window, at a time; nothing is unfolded
in memory. The programs of one pixel tile are neighbours in the grid, so that x is read from L2 after
the first. With one input channel a group there is nothing to multiply in tensor cores, and a second
kernel accumulates elementwise. The norm's vectors are read live, so nothing goes stale.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from fused_resnet.kernels.packing import packed
from fused_resnet.kernels.triton.epilogue import activate, finish, fold
from fused_resnet.kernels.triton.launch import arch_of, launch
from fused_resnet.kernels.triton.tiles import Tile, cdiv, flat, legal, pick
from fused_resnet.problem import ACTIVATIONS, ConvOperands, ConvProblem

FOLDED = False
DTYPES = ("fp32", "tf32", "fp16", "bf16")
LARGEST_INDEX = 2**31 - 1
# Sizes of the batch and of the image are plain numbers: one binary serves every image size of a layer.
SIZES = ["M", "H", "W", "P", "Q", "eps", "pre_eps"]


@triton.jit
def locate(m, H, W, P, Q, C: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
           PAD_W: tl.constexpr):
    """Row, column and offset of the first tap of output pixels `m`; all three may lie outside of the image."""
    row = m // Q
    h = row % P * STRIDE_H - PAD_H
    w = m % Q * STRIDE_W - PAD_W
    return h, w, ((row // P * H + h) * W + w) * C


@triton.jit
def in_image(h, w, H, W):
    return (h >= 0) & (h < H) & (w >= 0) & (w < W)


@triton.jit
def advance(r, s, c, CG: tl.constexpr, R: tl.constexpr, S: tl.constexpr, BLOCK_K: tl.constexpr):
    """The next block of channels, and after a tap's last the next tap.

    Counters, because div and mod of a flattened step were miscompiled on Hopper (pytorch#173068).
    """
    if CG > BLOCK_K:
        c = tl.multiple_of(tl.where(c + BLOCK_K >= CG, 0, c + BLOCK_K), BLOCK_K)
    if R * S > 1:
        s += tl.where(c == 0, 1, 0)
        r += tl.where(s == S, 1, 0)
        s = tl.where(s == S, 0, s)
    return r, s, c


@triton.jit(do_not_specialize=SIZES)
def conv_gemm(x, weight, y, residual, bias, gamma, beta, mean, var, eps,
              pre_gamma, pre_beta, pre_mean, pre_var, pre_eps, M, H, W, P, Q,
              C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, GROUPS: tl.constexpr,
              STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
              DIL_H: tl.constexpr, DIL_W: tl.constexpr, ACTIVATION: tl.constexpr, PROLOGUE: tl.constexpr,
              PRECISION: tl.constexpr, WIDE: tl.constexpr, FLAT: tl.constexpr, SWAP: tl.constexpr,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Tensor-core convolution of x [N, H, W, C] with weight [K, R, S, C / GROUPS] into y [N, P, Q, K].

    WIDE computes offsets in 64 bits. FLAT lets the reduction run over the elements of the window instead
    of tap by tap: with few channels a tap fills a small part of BLOCK_K. SWAP makes the channels the rows
    of the accumulator, so that a narrow layer still issues the widest wgmma.
    """
    CG: tl.constexpr = C // GROUPS
    KG: tl.constexpr = K // GROUPS
    DEPTH: tl.constexpr = R * S * CG
    TILES: tl.constexpr = (KG + BLOCK_N - 1) // BLOCK_N
    STEPS: tl.constexpr = (DEPTH + BLOCK_K - 1) // BLOCK_K if FLAT else R * S * ((CG + BLOCK_K - 1) // BLOCK_K)
    SINGLE: tl.constexpr = R == 1 and S == 1 and PAD_H == 0 and PAD_W == 0
    RAGGED: tl.constexpr = (DEPTH if FLAT else CG) % BLOCK_K != 0

    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
        W = W.to(tl.int64)
    group = pid % (GROUPS * TILES) // TILES
    m = pid // (GROUPS * TILES) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = pid % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    e = tl.arange(0, BLOCK_K)
    if SWAP:  # x is [BLOCK_K, BLOCK_M], weight [BLOCK_N, BLOCK_K]
        m, k, ex, ew = m[None, :], k[:, None], e[:, None], e[None, :]
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:  # x is [BLOCK_M, BLOCK_K], weight [BLOCK_K, BLOCK_N]
        m, k, ex, ew = m[:, None], k[None, :], e[None, :], e[:, None]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    h0, w0, corner = locate(m, H, W, P, Q, C, STRIDE_H, STRIDE_W, PAD_H, PAD_W)
    if SINGLE and STRIDE_H == 1 and STRIDE_W == 1:
        corner = m * C  # the same without a division
    filters = (group * KG + k) * DEPTH

    r, s, c = 0, 0, 0
    for step in range(STEPS):
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
        ws = tl.load(weight + filters + start + ew, mask=w_ok, other=0.0)
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

    channel = group * KG + k
    finish(acc, y, residual, m * K + channel, (m < M) & (k < KG), bias, gamma, beta, mean, var, eps,
           channel, k < KG, ACTIVATION)


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
    c = k // (K // C)
    h0, w0, corner = locate(m, H, W, P, Q, C, STRIDE_H, STRIDE_W, PAD_H, PAD_W)
    inside = (m < M) & (k < K)
    if PROLOGUE != "":
        scale, shift = fold(None, pre_gamma, pre_beta, pre_mean, pre_var, pre_eps, c, k < K)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in range(R):
        for s in tl.static_range(S):
            ok = inside & in_image(h0 + r * DIL_H, w0 + s * DIL_W, H, W)
            xs = tl.load(x + corner + c + (r * DIL_H * W + s * DIL_W) * C, mask=ok, other=0.0).to(tl.float32)
            if PROLOGUE != "":
                xs = tl.where(ok, activate(xs * scale + shift, PROLOGUE), 0.0)
            acc += xs * tl.load(weight + k * (R * S) + r * S + s, mask=k < K, other=0.0).to(tl.float32)

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
    reach = max(p.N * p.H * p.W * p.C, (values["M"] + tile.BLOCK_M) * p.K, p.K * p.depth)
    values["WIDE"] = reach > LARGEST_INDEX
    if tile.kernel == "gemm":
        values |= {"GROUPS": p.groups, "PRECISION": "ieee" if p.dtype == "fp32" else "tf32", "SWAP": tile.SWAP,
                   "FLAT": flat(p), "BLOCK_K": tile.BLOCK_K}
    return values


def bind(problem: ConvProblem, operands: ConvOperands, y: torch.Tensor, tile: Tile) -> tuple[Any, int, dict[str, Any]]:
    """The kernel, the number of programs and the arguments of the launch that writes `y`."""
    weight, dtype = operands.weight, operands.x.dtype
    if weight.dtype != dtype or not weight.is_contiguous(memory_format=torch.channels_last):
        weight = packed(("krsc", dtype), (weight,), lambda: operands.weight.detach().to(
            dtype, memory_format=torch.channels_last))
    arguments = operands._asdict() | {"weight": weight, "y": y} | constants(problem, tile)
    del arguments["reuse"]
    groups = problem.groups if tile.kernel == "gemm" else 1
    programs = cdiv(arguments["M"], tile.BLOCK_M) * groups * cdiv(problem.K // groups, tile.BLOCK_N)
    return (conv_gemm if tile.kernel == "gemm" else conv_depthwise), programs, arguments


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
    if tile is None:
        tile = pick(problem, arch)
    elif reason := legal(tile, problem, arch):
        raise ValueError(f"{tile} cannot run {problem.id} on sm_{arch}: {reason}")
    y = torch.empty(problem.output_shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if y.numel():
        launch(*bind(problem, operands, y, tile), x.device, tile.options)
    return y
