"""conv_bn_act by the tensor memory accelerator: tiles "gemm1x1" and "box" (Hopper).

x, weight, residual and output are reached through tensor descriptors. The hardware computes the addresses,
fills what lies outside of the image with zeros, which is the padding, and drops what is stored outside of
the output. "gemm1x1" is a persistent matrix product, each program taking every so-many-th tile of
BLOCK_M pixels x BLOCK_N channels. In "box" a tile is a box of BLOCK_M = NB images x TH rows x TW columns,
and a tap is the box moved by the tap's offset. For strides, image rows and columns are split into quotient
and remainder, a view of the same memory: a tap has one remainder, so that a strided box is dense in it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from fused_resnet.kernels.triton.epilogue import finish_block
from fused_resnet.kernels.triton.launch import descriptor, multiprocessors
from fused_resnet.kernels.triton.legal import Tile, box, cdiv
from fused_resnet.kernels.triton.window import advance
from fused_resnet.problem import ConvOperands, ConvProblem


@triton.jit(do_not_specialize=["M", "eps"])
def conv_gemm1x1(x, weight, y, residual, bias, gamma, beta, mean, var, eps, M, C: tl.constexpr, K: tl.constexpr,
                 ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """y [M, K] from x [M, C] and weight [K, C]; the channels of one pixel tile follow each other, for L2."""
    TILES: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * TILES, tl.num_programs(0)):
        m = tile // TILES * BLOCK_M
        k = tile % TILES * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for c in range(0, C, BLOCK_K):
            acc = tl.dot(x.load([m, c]), weight.load([k, c]).T, acc, input_precision=PRECISION)
        finish_block(acc, y, residual, [m, k], bias, gamma, beta, mean, var, eps, k, K, ACTIVATION)


@triton.jit(do_not_specialize=["TILES_P", "TILES_Q", "eps"])
def conv_box(x, weight, y, residual, bias, gamma, beta, mean, var, eps, TILES_P, TILES_Q,
             C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
             STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
             DIL_H: tl.constexpr, DIL_W: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
             NB: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """y [N, P, Q, K] from x [N, H / STRIDE_H, STRIDE_H, W / STRIDE_W, STRIDE_W * C] and weight [K, R * S * C]."""
    TILES: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    BLOCK_M: tl.constexpr = NB * TH * TW
    # Whole strides that cover the padding: quotients are taken of what is not negative.
    LEAD_H: tl.constexpr = (PAD_H + STRIDE_H - 1) // STRIDE_H
    LEAD_W: tl.constexpr = (PAD_W + STRIDE_W - 1) // STRIDE_W
    pid = tl.program_id(0)
    k = pid % TILES * BLOCK_N
    row = pid // TILES // TILES_Q
    n = row // TILES_P * NB
    p = row % TILES_P * TH
    q = pid // TILES % TILES_Q * TW

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    r, s, c = 0, 0, 0
    for step in range(R * S * (C // BLOCK_K)):
        h = r * DIL_H + (LEAD_H * STRIDE_H - PAD_H)
        w = s * DIL_W + (LEAD_W * STRIDE_W - PAD_W)
        xs = x.load([n, p + h // STRIDE_H - LEAD_H, h % STRIDE_H, q + w // STRIDE_W - LEAD_W, w % STRIDE_W * C + c])
        ws = weight.load([k, step * BLOCK_K])
        acc = tl.dot(xs.reshape(BLOCK_M, BLOCK_K), ws.T, acc, input_precision=PRECISION)
        r, s, c = advance(r, s, c, C, R, S, BLOCK_K)
    finish_block(acc, y, residual, [n, p, q, k], bias, gamma, beta, mean, var, eps, k, K, ACTIVATION)


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
        y = (pixels, p.K), (p.K, 1), (tile.BLOCK_M, tile.BLOCK_N)
        return {"x": ((pixels, p.C), (p.C, 1), (tile.BLOCK_M, tile.BLOCK_K)), "weight": weight, "y": y, "residual": y}
    (sh, sw), (nb, th, tw) = p.stride, box(p, tile.BLOCK_M)
    y = (p.N, p.P, p.Q, p.K), (p.P * p.Q * p.K, p.Q * p.K, p.K, 1), (nb, th, tw, tile.BLOCK_N)
    x = ((p.N, cdiv(p.H, sh), sh, cdiv(p.W, sw), sw * p.C), (p.H * p.W * p.C, sh * p.W * p.C, p.W * p.C, sw * p.C, 1),
         (nb, th, 1, tw, tile.BLOCK_K))
    return {"x": x, "weight": weight, "y": y, "residual": y}


@functools.lru_cache(maxsize=4096)
def constants(problem: ConvProblem, tile: Tile) -> tuple[int, dict[str, Any]]:
    """How many tiles there are, and all arguments but the tensors and eps."""
    p = problem
    values = {"C": p.C, "K": p.K, "ACTIVATION": p.activation, "PRECISION": "ieee" if p.dtype == "fp32" else "tf32",
              "BLOCK_N": tile.BLOCK_N, "BLOCK_K": tile.BLOCK_K}
    if tile.kernel == "gemm1x1":
        pixels = p.N * p.P * p.Q
        return cdiv(pixels, tile.BLOCK_M) * cdiv(p.K, tile.BLOCK_N), values | {"M": pixels, "BLOCK_M": tile.BLOCK_M}
    nb, th, tw = box(p, tile.BLOCK_M)
    rows, columns = cdiv(p.P, th), cdiv(p.Q, tw)
    values |= {"TILES_P": rows, "TILES_Q": columns, "R": p.R, "S": p.S, "STRIDE_H": p.stride[0],
               "STRIDE_W": p.stride[1], "PAD_H": p.padding[0], "PAD_W": p.padding[1], "DIL_H": p.dilation[0],
               "DIL_W": p.dilation[1], "NB": nb, "TH": th, "TW": tw}
    return cdiv(p.N, nb) * rows * columns * cdiv(p.K, tile.BLOCK_N), values


def bind(problem: ConvProblem, operands: ConvOperands, y: torch.Tensor, tile: Tile) -> tuple[Any, int, dict[str, Any]]:
    """The kernel, the number of programs and the arguments of the launch that writes `y`.

    `operands.weight` is dense in channels_last and has x's dtype; `aligned(operands)` holds.
    """
    o = operands
    tensors = {"x": o.x, "weight": o.weight, "y": y, "residual": o.residual}
    views = {name: None if tensors[name] is None else descriptor(tensors[name], *view)
             for name, view in shapes(problem, tile).items()}
    tiles, values = constants(problem, tile)
    vectors = {"bias": o.bias, "gamma": o.gamma, "beta": o.beta, "mean": o.mean, "var": o.var, "eps": o.eps}
    if tile.kernel == "box":
        return conv_box, tiles, views | vectors | values
    return conv_gemm1x1, min(tiles, multiprocessors(o.x.device)), views | vectors | values
