"""conv_bn_stats of 1x1 convolutions by the tensor memory accelerator: tile "gemm1x1" (Hopper).

The persistent matrix product of `conv_bn_act_tma` with the statistics of `conv_bn_stats` behind each tile. What a norm
in front changes goes through registers, from where wgmma reads its first operand.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fused_resnet.kernels.triton import conv_bn_act_tma as tma
from fused_resnet.kernels.triton.epilogue import activate, fold, store_block
from fused_resnet.kernels.triton.launch import descriptor, multiprocessors
from fused_resnet.kernels.triton.legal import Tile
from fused_resnet.kernels.triton.norm import store_moments, vector
from fused_resnet.problem import ConvOperands, ConvProblem


@triton.jit(do_not_specialize=["M", "pre_eps"])
def conv_moments1x1(x, weight, y, means, squares, bias, pivot, pre_gamma, pre_beta, pre_mean, pre_var, pre_eps, M,
                    C: tl.constexpr, K: tl.constexpr, PROLOGUE: tl.constexpr, PRECISION: tl.constexpr,
                    SWAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """y [M, K] from x [M, C] and weight [K, C], and the moments of each tile: means - pivot, squares [tiles, K]."""
    TILES: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * TILES, tl.num_programs(0)):
        row = tile // TILES
        k = tile % TILES * BLOCK_N
        acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
        for c in range(0, C, BLOCK_K):
            xs, ws = x.load([row * BLOCK_M, c]), weight.load([k, c])
            if PROLOGUE != "":
                before = c + tl.arange(0, BLOCK_K)[None, :]
                scale, shift = fold(None, pre_gamma, pre_beta, pre_mean, pre_var, pre_eps, before, before < C)
                xs = activate(xs.to(tl.float32) * scale + shift, PROLOGUE).to(ws.dtype)
            if SWAP:
                acc = tl.dot(ws, xs.T, acc, input_precision=PRECISION)
            else:
                acc = tl.dot(xs, ws.T, acc, input_precision=PRECISION)
        m, channel = row * BLOCK_M + tl.arange(0, BLOCK_M), k + tl.arange(0, BLOCK_N)
        if SWAP:
            m, channel = m[None, :], channel[:, None]
        else:
            m, channel = m[:, None], channel[None, :]
        acc += vector(bias, channel, channel < K, 0.0)
        u = acc.to(y.dtype)
        store_block(u, y, [row * BLOCK_M, k], SWAP)
        store_moments(u, means, squares, pivot, row, m, M, channel, channel < K, K, BLOCK_M, 1 if SWAP else 0)


def bind(problem: ConvProblem, operands: ConvOperands, u: torch.Tensor, means: torch.Tensor, squares: torch.Tensor,
         tile: Tile) -> tuple[Any, int, dict[str, Any]]:
    """The kernel, the number of programs and the arguments of the launch that writes `u` and the tiles' moments.

    `operands.weight` is dense in channels_last and has x's dtype; `tma.aligned(operands)` holds.
    """
    views, (tiles, values) = tma.shapes(problem, tile), tma.constants(problem, tile)
    tensors = {"x": operands.x, "weight": operands.weight, "y": u}
    arguments = operands._asdict() | values | {
        "means": means, "squares": squares, "pivot": operands.mean,
        **{name: descriptor(tensor, *views[name]) for name, tensor in tensors.items()}}
    programs = min(tiles, multiprocessors(operands.x.device))
    return conv_moments1x1, programs, {name: arguments[name] for name in conv_moments1x1.arg_names}
