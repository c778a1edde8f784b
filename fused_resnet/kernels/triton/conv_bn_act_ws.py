"""conv_bn_act with warps that specialise: tiles "ws" (Hopper, written in Gluon).

The box of "box" in `conv_bn_act_tma`, with the loads taken out of the hands of the warps that multiply. One warp
loads the steps of tile after tile into a ring of num_stages buffers of x and of the weights, a second one the
residual's blocks into a ring of their own, and num_warps warps multiply straight from shared memory and finish
the tile: so the next tile's loads run while a tile is finished. The launch is persistent, one program on each
multiprocessor. With SWAP the channels are the rows of the product and the pixels its columns.

Every buffer has two mbarriers. `full` completes when the bytes that were asked for have arrived; `free` when the
multiplying warps have arrived, which they do once the product that read the buffer is known to be complete: after
one further product was started and `warpgroup_mma_wait(1)` returned, and at the end of a tile. Both sides go
round a ring with `turn`. The n-th round waits for phase n % 2 of `full`; of `free`, which starts out as complete
because a barrier's phase before its first counts as over, for the opposite.

What is known of this file: it compiles for sm_90a, with the instructions that tests/gate/test_ws_gate.py counts;
its functions, executed as plain Python over a model of barriers, copies and products that overlap at random, give
the convolution, neither read nor overwrite too early and always end (tests/kernels/test_triton_ws.py); `twin`,
which shares its index functions, gives it in Triton's interpreter. It has never run on a GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fused_resnet.kernels.triton import conv_bn_act_tma
from fused_resnet.kernels.triton.epilogue import activate, finish_block, fold
from fused_resnet.kernels.triton.launch import descriptor, multiprocessors
from fused_resnet.kernels.triton.legal import Tile, box, cdiv
from fused_resnet.kernels.triton.window import advance, corner, tap, turn
from fused_resnet.problem import ConvOperands, ConvProblem

# Registers of a thread in the two loading warps, which keep a few indices; the multiplying warps get what is left.
LOADER_REGISTERS = gl.constexpr(24)


@gluon.jit
def load_steps(x, weight, xs, ws, full, free, tiles, TILES_P, TILES_Q,
               C: gl.constexpr, K: gl.constexpr, R: gl.constexpr, S: gl.constexpr,
               STRIDE_H: gl.constexpr, STRIDE_W: gl.constexpr, PAD_H: gl.constexpr, PAD_W: gl.constexpr,
               DIL_H: gl.constexpr, DIL_W: gl.constexpr, NB: gl.constexpr, TH: gl.constexpr, TW: gl.constexpr,
               BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr):
    """One warp: the box of x and the block of weights of every step of every tile of this program."""
    slot, phase = 0, 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        n, p, q, k = corner(tile, (K + BLOCK_N - 1) // BLOCK_N, TILES_P, TILES_Q, NB, TH, TW, BLOCK_N)
        r, s, c = 0, 0, 0
        for step in range(R * S * (C // BLOCK_K)):
            h, rest_h, w, rest_w = tap(r, s, c, p, q, C, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W)
            mbarrier.wait(free.index(slot), phase ^ 1)
            arrived = full.index(slot)
            mbarrier.expect(arrived, x.block_type.nbytes + weight.block_type.nbytes)
            tma.async_copy_global_to_shared(x, [n, h, rest_h, w, rest_w], arrived, xs.index(slot))
            tma.async_copy_global_to_shared(weight, [k, step * BLOCK_K], arrived, ws.index(slot))
            slot, phase = turn(slot, phase, STAGES)
            r, s, c = advance(r, s, c, C, R, S, BLOCK_K)


@gluon.jit
def load_residual(residual, blocks, full, free, tiles, TILES_P, TILES_Q, K: gl.constexpr, NB: gl.constexpr,
                  TH: gl.constexpr, TW: gl.constexpr, BLOCK_N: gl.constexpr, OUTPUTS: gl.constexpr):
    """One warp: the residual's block of every tile, into the buffer that its output leaves from."""
    if residual is not None:
        slot, phase = 0, 0
        for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
            n, p, q, k = corner(tile, (K + BLOCK_N - 1) // BLOCK_N, TILES_P, TILES_Q, NB, TH, TW, BLOCK_N)
            mbarrier.wait(free.index(slot), phase ^ 1)
            mbarrier.expect(full.index(slot), residual.block_type.nbytes)
            tma.async_copy_global_to_shared(residual, [n, p, q, k], full.index(slot), blocks.index(slot))
            slot, phase = turn(slot, phase, OUTPUTS)


@gluon.jit
def multiply(xs, ws, full, free, slot, phase, STEPS: gl.constexpr, SWAP: gl.constexpr, STAGES: gl.constexpr,
             BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, LAYOUT: gl.constexpr):
    """The sums of one tile, the last product still running, and the buffer it reads; then where the ring stands."""
    acc = gl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), gl.float32, LAYOUT)
    before = slot
    for step in range(STEPS):
        mbarrier.wait(full.index(slot), phase)
        pixels, channels = xs.index(slot).reshape((BLOCK_M, BLOCK_K)), ws.index(slot)
        if SWAP:
            acc = warpgroup_mma(channels, pixels.permute((1, 0)), acc, is_async=True)
        else:
            acc = warpgroup_mma(pixels, channels.permute((1, 0)), acc, is_async=True)
        # One product may run: the one before it is complete, and nothing reads that one's buffer any more.
        acc = warpgroup_mma_wait(1, deps=(acc, ))
        gl.thread_barrier()  # one thread arrives for all warps
        mbarrier.arrive(free.index(before), pred=step > 0)
        before = slot
        slot, phase = turn(slot, phase, STAGES)
    return acc, before, slot, phase


@gluon.jit
def finish_tiles(xs, ws, full, free, blocks, full_blocks, free_blocks, y, residual, bias, gamma, beta, mean, var, eps,
                 tiles, TILES_P, TILES_Q, C: gl.constexpr, K: gl.constexpr, R: gl.constexpr, S: gl.constexpr,
                 ACTIVATION: gl.constexpr, SWAP: gl.constexpr, NB: gl.constexpr, TH: gl.constexpr, TW: gl.constexpr,
                 BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, OUTPUTS: gl.constexpr,
                 LAYOUT: gl.constexpr):
    """The multiplying warps: every tile of this program, from its products to the store of its output."""
    BLOCK_M: gl.constexpr = NB * TH * TW
    AXIS: gl.constexpr = 1 if SWAP else 0  # along which all sums belong to the same channel
    # With several buffers, the store of one tile goes on while the next tile is multiplied.
    STORES: gl.constexpr = 1 if OUTPUTS > 1 else 0
    slot, phase = 0, 0
    out, out_phase = 0, 0
    stored = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        n, p, q, k = corner(tile, (K + BLOCK_N - 1) // BLOCK_N, TILES_P, TILES_Q, NB, TH, TW, BLOCK_N)
        acc, before, slot, phase = multiply(xs, ws, full, free, slot, phase, R * S * (C // BLOCK_K), SWAP, STAGES,
                                            BLOCK_M, BLOCK_N, BLOCK_K, LAYOUT)
        acc = warpgroup_mma_wait(0, deps=(acc, ))
        gl.thread_barrier()
        mbarrier.arrive(free.index(before))

        channel = gl.expand_dims(k + gl.arange(0, BLOCK_N, gl.SliceLayout(AXIS, LAYOUT)), AXIS)
        scale, shift = fold(bias, gamma, beta, mean, var, eps, channel, channel < K)
        acc = acc * scale + shift
        block = blocks.index(out).reshape((BLOCK_M, BLOCK_N))
        if SWAP:
            block = block.permute((1, 0))
        if residual is not None:
            mbarrier.wait(full_blocks.index(out), out_phase)
            acc += block.load(LAYOUT).to(gl.float32)
        block.store(activate(acc, ACTIVATION).to(y.dtype))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(y, [n, p, q, k], blocks.index(out))
        tma.store_wait(STORES)
        gl.thread_barrier()  # every warp waits for what it stored itself
        if residual is not None:
            # The block that has left: this one, or that of the tile before if there is one.
            if STORES == 0:
                stored = out
            mbarrier.arrive(free_blocks.index(stored), pred=tile >= gl.num_programs(0) * STORES)
            stored = out
        out, out_phase = turn(out, out_phase, OUTPUTS)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tiles", "TILES_P", "TILES_Q", "eps"])
def conv_ws(x, weight, y, residual, bias, gamma, beta, mean, var, eps, tiles, TILES_P, TILES_Q,
            C: gl.constexpr, K: gl.constexpr, R: gl.constexpr, S: gl.constexpr,
            STRIDE_H: gl.constexpr, STRIDE_W: gl.constexpr, PAD_H: gl.constexpr, PAD_W: gl.constexpr,
            DIL_H: gl.constexpr, DIL_W: gl.constexpr, ACTIVATION: gl.constexpr,
            SWAP: gl.constexpr, NB: gl.constexpr, TH: gl.constexpr, TW: gl.constexpr, BLOCK_N: gl.constexpr,
            BLOCK_K: gl.constexpr, STAGES: gl.constexpr, OUTPUTS: gl.constexpr):
    """y [N, P, Q, K] from x [N, H / STRIDE_H, STRIDE_H, W / STRIDE_W, STRIDE_W * C] and weight [K, R * S * C]."""
    COLUMNS: gl.constexpr = NB * TH * TW if SWAP else BLOCK_N
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [gl.num_warps(), 1], [16, COLUMNS, 256 // x.dtype.primitive_bitwidth])
    xs = gl.allocate_shared_memory(x.dtype, [STAGES] + x.block_type.shape, x.layout)
    ws = gl.allocate_shared_memory(weight.dtype, [STAGES] + weight.block_type.shape, weight.layout)
    blocks = gl.allocate_shared_memory(y.dtype, [OUTPUTS] + y.block_type.shape, y.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full_blocks = gl.allocate_shared_memory(gl.int64, [OUTPUTS, 1], mbarrier.MBarrierLayout())
    free_blocks = gl.allocate_shared_memory(gl.int64, [OUTPUTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    for i in gl.static_range(OUTPUTS):
        mbarrier.init(full_blocks.index(i), count=1)
        mbarrier.init(free_blocks.index(i), count=1)
    fence_async_shared()  # the copy engine sees the barriers as they were made
    gl.warp_specialize([
        (finish_tiles, (xs, ws, full, free, blocks, full_blocks, free_blocks, y, residual, bias, gamma, beta, mean, var,
                        eps, tiles, TILES_P, TILES_Q, C, K, R, S, ACTIVATION, SWAP, NB, TH, TW, BLOCK_N,
                        BLOCK_K, STAGES, OUTPUTS, LAYOUT)),
        (load_steps, (x, weight, xs, ws, full, free, tiles, TILES_P, TILES_Q, C, K, R, S, STRIDE_H, STRIDE_W, PAD_H,
                      PAD_W, DIL_H, DIL_W, NB, TH, TW, BLOCK_N, BLOCK_K, STAGES)),
        (load_residual, (residual, blocks, full_blocks, free_blocks, tiles, TILES_P, TILES_Q, K, NB, TH, TW, BLOCK_N,
                         OUTPUTS)),
    ], [1, 1], [LOADER_REGISTERS, LOADER_REGISTERS])


@triton.jit(do_not_specialize=["tiles", "TILES_P", "TILES_Q", "eps"])
def twin(x, weight, y, residual, bias, gamma, beta, mean, var, eps, tiles, TILES_P, TILES_Q,
         C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
         STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
         DIL_H: tl.constexpr, DIL_W: tl.constexpr, ACTIVATION: tl.constexpr, SWAP: tl.constexpr,
         NB: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
         STAGES: tl.constexpr, OUTPUTS: tl.constexpr):
    """`conv_ws` as the interpreter can run it: its tiles, steps and coordinates, without warps, rings and barriers."""
    BLOCK_M: tl.constexpr = NB * TH * TW
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        n, p, q, k = corner(tile, (K + BLOCK_N - 1) // BLOCK_N, TILES_P, TILES_Q, NB, TH, TW, BLOCK_N)
        acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
        r, s, c = 0, 0, 0
        for step in range(R * S * (C // BLOCK_K)):
            h, rest_h, w, rest_w = tap(r, s, c, p, q, C, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W)
            pixels = x.load([n, h, rest_h, w, rest_w]).reshape(BLOCK_M, BLOCK_K)
            channels = weight.load([k, step * BLOCK_K])
            acc = tl.dot(channels, pixels.T, acc) if SWAP else tl.dot(pixels, channels.T, acc)
            r, s, c = advance(r, s, c, C, R, S, BLOCK_K)
        finish_block(acc, y, residual, [n, p, q, k], bias, gamma, beta, mean, var, eps, k, K, ACTIVATION, SWAP)


def unfolded(problem: ConvProblem) -> ConvProblem:
    """The same problem; where pixels have no neighbours they form one row, in which no box is ragged but the last."""
    p = problem
    if p.R * p.S > 1 or p.stride != (1, 1) or p.padding != (0, 0):
        return p
    return p._replace(N=1, H=1, W=p.N * p.H * p.W)


@functools.lru_cache(maxsize=4096)
def constants(problem: ConvProblem, tile: Tile) -> dict[str, Any]:
    """All arguments but the tensors and eps."""
    p = unfolded(problem)
    nb, th, tw = box(p, tile.BLOCK_M)
    rows, columns = cdiv(p.P, th), cdiv(p.Q, tw)
    return {"tiles": cdiv(p.N, nb) * rows * columns * cdiv(p.K, tile.BLOCK_N), "TILES_P": rows, "TILES_Q": columns,
            "C": p.C, "K": p.K, "R": p.R, "S": p.S, "STRIDE_H": p.stride[0], "STRIDE_W": p.stride[1],
            "PAD_H": p.padding[0], "PAD_W": p.padding[1], "DIL_H": p.dilation[0], "DIL_W": p.dilation[1],
            "ACTIVATION": p.activation, "SWAP": tile.SWAP, "NB": nb, "TH": th, "TW": tw, "BLOCK_N": tile.BLOCK_N,
            "BLOCK_K": tile.BLOCK_K, "STAGES": tile.num_stages, "OUTPUTS": tile.outputs(p)}


def gluon_descriptor(base: Any, shape: list[int], strides: list[int], block: list[int]) -> TensorDescriptor:
    """A descriptor whose blocks lie in shared memory in the widest swizzle that they fill."""
    element = {torch.float32: gl.float32, torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[base.dtype]
    return TensorDescriptor(base, shape, strides, block, gl.NVMMASharedLayout.get_default_for(block, element))


def bind(problem: ConvProblem, operands: ConvOperands, y: torch.Tensor, tile: Tile) -> tuple[Any, int, dict[str, Any]]:
    """The kernel, the number of programs and the arguments of the launch that writes `y`.

    `operands.weight` is dense in channels_last and has x's dtype; `conv_bn_act_tma.aligned(operands)` holds.
    """
    o = operands
    shapes = conv_bn_act_tma.shapes(unfolded(problem), tile)
    tensors = {"x": o.x, "weight": o.weight, "y": y, "residual": o.residual}
    views = {name: None if tensor is None else descriptor(tensor, *shapes[name], gluon_descriptor)
             for name, tensor in tensors.items()}
    vectors = {"bias": o.bias, "gamma": o.gamma, "beta": o.beta, "mean": o.mean, "var": o.var, "eps": o.eps}
    values = constants(problem, tile)
    kernel = twin if o.x.device.type == "cpu" else conv_ws
    return kernel, min(values["tiles"], multiprocessors(o.x.device)), views | vectors | values
