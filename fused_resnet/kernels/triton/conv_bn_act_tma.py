"""conv_bn_act by the tensor memory accelerator: tiles "gemm1x1" and "box" (Hopper).

x, weight, residual and output are reached through tensor descriptors. The hardware computes the addresses,
fills what lies outside of the image with zeros, which is the padding, and drops what is stored outside of
the output. "gemm1x1" is a persistent matrix product, each program taking every so-many-th tile of
BLOCK_M pixels x BLOCK_N channels. In "box" a tile is a box of BLOCK_M = NB images x TH rows x TW columns,
and a tap is the box moved by the tap's offset. For strides, image rows and columns are split into quotient
and remainder, a view of the same memory: a tap has one remainder, so that a strided box is dense in it.
Coordinates have 32 bits, addresses are the hardware's: a tensor may be of any size. With SWAP the weights are
the first operand, so that 64 or 128 output channels issue the widest wgmma, 256 pixels at a time.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from fused_resnet.kernels.triton.epilogue import activate, finish_block, fold, store_block
from fused_resnet.kernels.triton.launch import descriptor, multiprocessors
from fused_resnet.kernels.triton.legal import Tile, box, cdiv
from fused_resnet.kernels.triton.window import advance, corner, in_image, tap
from fused_resnet.problem import ConvOperands, ConvProblem


@triton.jit(do_not_specialize=["M", "eps", "pre_eps"])
def conv_gemm1x1(x, weight, y, residual, sums, bias, gamma, beta, mean, var, eps,
                 pre_gamma, pre_beta, pre_mean, pre_var, pre_eps, M, C: tl.constexpr, K: tl.constexpr,
                 ACTIVATION: tl.constexpr, PROLOGUE: tl.constexpr, PRECISION: tl.constexpr, SWAP: tl.constexpr,
                 SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """y [M, K] from x [M, C] and weight [K, C]; the channels of one pixel tile follow each other, for L2."""
    TILES: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    SHARE: tl.constexpr = (C + BLOCK_K * SPLIT_K - 1) // (BLOCK_K * SPLIT_K) * BLOCK_K
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * TILES * SPLIT_K, tl.num_programs(0)):
        m = tile // (TILES * SPLIT_K) * BLOCK_M
        k = tile % TILES * BLOCK_N
        split = tile // TILES % SPLIT_K
        acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
        first, last = 0, C
        if SPLIT_K > 1:
            first = split * SHARE
            last = tl.minimum(first + SHARE, C)
        for c in range(first, last, BLOCK_K):
            xs, ws = x.load([m, c]), weight.load([k, c])
            if PROLOGUE != "":
                channel = c + tl.arange(0, BLOCK_K)[None, :]
                scale, shift = fold(None, pre_gamma, pre_beta, pre_mean, pre_var, pre_eps, channel, channel < C)
                xs = activate(xs.to(tl.float32) * scale + shift, PROLOGUE).to(ws.dtype)
            if SWAP:
                acc = tl.dot(ws, xs.T, acc, input_precision=PRECISION)
            else:
                acc = tl.dot(xs, ws.T, acc, input_precision=PRECISION)
        if SPLIT_K > 1:
            store_block(acc, sums, [split, m, k], SWAP)
        else:
            finish_block(acc, y, residual, [m, k], bias, gamma, beta, mean, var, eps, k, K, ACTIVATION, SWAP)


@triton.jit(do_not_specialize=["H", "W", "TILES_P", "TILES_Q", "eps", "pre_eps"])
def conv_box(x, weight, y, residual, sums, bias, gamma, beta, mean, var, eps,
             pre_gamma, pre_beta, pre_mean, pre_var, pre_eps, H, W, TILES_P, TILES_Q,
             C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, GROUPS: tl.constexpr,
             STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
             DIL_H: tl.constexpr, DIL_W: tl.constexpr, ACTIVATION: tl.constexpr, PROLOGUE: tl.constexpr,
             PRECISION: tl.constexpr, SWAP: tl.constexpr, SPLIT_K: tl.constexpr,
             NB: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """y [N, P, Q, K] from x [N, H / STRIDE_H, STRIDE_H, W / STRIDE_W, STRIDE_W * C] and weight [K, R * S * CG]."""
    CG: tl.constexpr = C // GROUPS
    TILES: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    BLOCK_M: tl.constexpr = NB * TH * TW
    BLOCKS: tl.constexpr = CG // BLOCK_K
    SHARE: tl.constexpr = (R * S * BLOCKS + SPLIT_K - 1) // SPLIT_K
    split = tl.program_id(0) % SPLIT_K
    n, p, q, k = corner(tl.program_id(0) // SPLIT_K, TILES, TILES_P, TILES_Q, NB, TH, TW, BLOCK_N)
    group = k // (K // GROUPS) * CG  # its first input channel; no block of output channels is of two groups

    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    r, s, c = 0, 0, 0
    first, last = 0, R * S * BLOCKS
    if SPLIT_K > 1:
        first = split * SHARE
        last = tl.minimum(first + SHARE, last)
        r, s, c = first // (BLOCKS * S), first // BLOCKS % S, first % BLOCKS * BLOCK_K
    for step in range(first, last):
        h, sub_h, w, sub_w = tap(r, s, group + c, p, q, C, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W)
        xs = x.load([n, h, sub_h, w, sub_w]).reshape(BLOCK_M, BLOCK_K)
        ws = weight.load([k, step * BLOCK_K])
        if PROLOGUE != "":
            channel = group + c + tl.arange(0, BLOCK_K)[None, :]
            scale, shift = fold(None, pre_gamma, pre_beta, pre_mean, pre_var, pre_eps, channel, channel < C)
            pixel = tl.arange(0, BLOCK_M)[:, None]
            ok = in_image((p + pixel // TW % TH) * STRIDE_H + r * DIL_H - PAD_H,
                          (q + pixel % TW) * STRIDE_W + s * DIL_W - PAD_W, H, W)
            # Padding is zero after the norm, not before it.
            xs = tl.where(ok, activate(xs.to(tl.float32) * scale + shift, PROLOGUE), 0.0).to(ws.dtype)
        if SWAP:
            acc = tl.dot(ws, xs.T, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(xs, ws.T, acc, input_precision=PRECISION)
        r, s, c = advance(r, s, c, CG, R, S, BLOCK_K)
    if SPLIT_K > 1:
        store_block(acc, sums, [split, n, p, q, k], SWAP)
    else:
        finish_block(acc, y, residual, [n, p, q, k], bias, gamma, beta, mean, var, eps, k, K, ACTIVATION, SWAP)


def aligned(operands: ConvOperands) -> bool:
    """Whether descriptors can stand for the tensors: they start at multiples of 16 bytes."""
    return all(t is None or t.data_ptr() % 16 == 0 for t in (operands.x, operands.weight, operands.residual))


@functools.lru_cache(maxsize=4096)
def shapes(problem: ConvProblem, tile: Tile) -> dict[str, tuple]:
    """(shape, strides, block) of each tensor that a descriptor stands for."""
    p = problem
    weight = (p.K, p.depth), (p.depth, 1), (tile.BLOCK_N, tile.BLOCK_K)
    if tile.kernel == "gemm1x1":
        pixels = p.N * p.P * p.Q
        x = (pixels, p.C), (p.C, 1), (tile.BLOCK_M, tile.BLOCK_K)
        y = (pixels, p.K), (p.K, 1), (tile.BLOCK_M, tile.BLOCK_N)
    else:
        (sh, sw), (nb, th, tw) = p.stride, box(p, tile.BLOCK_M)
        x = ((p.N, cdiv(p.H, sh), sh, cdiv(p.W, sw), sw * p.C),
             (p.H * p.W * p.C, sh * p.W * p.C, p.W * p.C, sw * p.C, 1), (nb, th, 1, tw, tile.BLOCK_K))
        y = (p.N, p.P, p.Q, p.K), (p.P * p.Q * p.K, p.Q * p.K, p.K, 1), (nb, th, tw, tile.BLOCK_N)
    # The parts of a split reduction lie behind each other, each as large as the output.
    sums = (tile.SPLIT_K, *y[0]), (p.N * p.P * p.Q * p.K, *y[1]), (1, *y[2])
    return {"x": x, "weight": weight, "y": y, "residual": y, "sums": sums}


@functools.lru_cache(maxsize=4096)
def constants(problem: ConvProblem, tile: Tile) -> tuple[int, dict[str, Any]]:
    """How many tiles there are, and all arguments but the tensors and both eps."""
    p = problem
    values = {"C": p.C, "K": p.K, "ACTIVATION": p.activation, "PROLOGUE": p.prologue,
              "PRECISION": "ieee" if p.dtype == "fp32" else "tf32", "SWAP": tile.SWAP, "SPLIT_K": tile.SPLIT_K,
              "BLOCK_N": tile.BLOCK_N, "BLOCK_K": tile.BLOCK_K}
    blocks = cdiv(p.K, tile.BLOCK_N) * tile.SPLIT_K
    if tile.kernel == "gemm1x1":
        pixels = p.N * p.P * p.Q
        return cdiv(pixels, tile.BLOCK_M) * blocks, values | {"M": pixels, "BLOCK_M": tile.BLOCK_M}
    nb, th, tw = box(p, tile.BLOCK_M)
    rows, columns = cdiv(p.P, th), cdiv(p.Q, tw)
    values |= {"H": p.H, "W": p.W, "TILES_P": rows, "TILES_Q": columns, "R": p.R, "S": p.S, "GROUPS": p.groups,
               "STRIDE_H": p.stride[0], "STRIDE_W": p.stride[1], "PAD_H": p.padding[0], "PAD_W": p.padding[1],
               "DIL_H": p.dilation[0], "DIL_W": p.dilation[1], "NB": nb, "TH": th, "TW": tw}
    return cdiv(p.N, nb) * rows * columns * blocks, values


def bind(problem: ConvProblem, operands: ConvOperands, y: torch.Tensor, sums: torch.Tensor | None,
         tile: Tile) -> tuple[Any, int, dict[str, Any]]:
    """The kernel, the number of programs and the arguments of the launch that writes `y`, or the parts of its sums.

    `operands.weight` is dense in channels_last and has x's dtype; `aligned(operands)` holds.
    """
    o = operands
    tensors = {"x": o.x, "weight": o.weight, "y": y, "residual": o.residual, "sums": sums}
    arguments = o._asdict() | {name: None if tensors[name] is None else descriptor(tensors[name], *view)
                               for name, view in shapes(problem, tile).items()}
    del arguments["reuse"]
    tiles, values = constants(problem, tile)
    if tile.kernel == "box":
        return conv_box, tiles, arguments | values
    return conv_gemm1x1, min(tiles, multiprocessors(o.x.device)), arguments | values
