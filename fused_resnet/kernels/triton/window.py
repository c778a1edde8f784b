"""Where the elements of a window lie: index arithmetic that the convolution kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_resnet.kernels.triton.epilogue import activate, fold


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


@triton.jit
def corner(tile, TILES: tl.constexpr, TILES_P, TILES_Q, NB: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
           BLOCK_N: tl.constexpr):
    """First image, row, column and channel of a box of the output; the channels of one box follow each other."""
    row = tile // TILES // TILES_Q
    return row // TILES_P * NB, row % TILES_P * TH, tile // TILES % TILES_Q * TW, tile % TILES * BLOCK_N


@triton.jit
def tap(r, s, c, p, q, C: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
        PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr):
    """Where one tap's box of x begins, in the view that splits rows and columns by the stride; all but the image."""
    # Whole strides that cover the padding: quotients are taken of what is not negative.
    LEAD_H: tl.constexpr = (PAD_H + STRIDE_H - 1) // STRIDE_H
    LEAD_W: tl.constexpr = (PAD_W + STRIDE_W - 1) // STRIDE_W
    h = r * DIL_H + (LEAD_H * STRIDE_H - PAD_H)
    w = s * DIL_W + (LEAD_W * STRIDE_W - PAD_W)
    return p + h // STRIDE_H - LEAD_H, h % STRIDE_H, q + w // STRIDE_W - LEAD_W, w % STRIDE_W * C + c


@triton.jit
def turn(slot, phase, SLOTS: tl.constexpr):
    """The next buffer of a ring, and the parity of the round that it is for."""
    around = (slot + 1) // SLOTS
    return slot + 1 - around * SLOTS, phase ^ around


@triton.jit
def elementwise(x, weight, m, k, inside, pre_gamma, pre_beta, pre_mean, pre_var, pre_eps, H, W, P, Q,
                C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, GROUPS: tl.constexpr,
                STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
                DIL_H: tl.constexpr, DIL_W: tl.constexpr, PROLOGUE: tl.constexpr):
    """Sums of output pixels `m` [BLOCK_M, 1] and channels `k` [1, BLOCK_N] without a matrix product."""
    CG: tl.constexpr = C // GROUPS
    h0, w0, corner = locate(m, H, W, P, Q, C, STRIDE_H, STRIDE_W, PAD_H, PAD_W)
    acc = tl.zeros((m + k).shape, tl.float32)
    for i in range(CG):
        c = k // (K // GROUPS) * CG + i
        if PROLOGUE != "":
            scale, shift = fold(None, pre_gamma, pre_beta, pre_mean, pre_var, pre_eps, c, k < K)
        for r in range(R):
            for s in tl.static_range(S):
                ok = inside & in_image(h0 + r * DIL_H, w0 + s * DIL_W, H, W)
                xs = tl.load(x + corner + c + (r * DIL_H * W + s * DIL_W) * C, mask=ok, other=0.0).to(tl.float32)
                if PROLOGUE != "":
                    xs = tl.where(ok, activate(xs * scale + shift, PROLOGUE), 0.0)
                filters = weight + k * (R * S * CG) + (r * S + s) * CG + i
                acc += xs * tl.load(filters, mask=k < K, other=0.0).to(tl.float32)
    return acc
