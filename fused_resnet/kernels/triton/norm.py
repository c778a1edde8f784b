"""Batch norm in training, as device functions: xhat, its gradient, and the bits of an activation's mask.

    xhat = (u - mean) / sqrt(var + eps)
    du   = gamma / sqrt(var + eps) * (dz - s0 - xhat * s1)

Formulas and the layout of the bits are those of `ops.bn_act` and `ops.bits`. Arithmetic is fp32 throughout. xhat is
made by subtraction, not from a folded scale and shift: where |mean| >> std the fold loses the digits that count.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def vector(v, channel, ok, ELSE: tl.constexpr):
    """A channel's values in fp32; ELSE stands for a vector that is None. `channel` may have any shape."""
    value = ELSE
    if v is not None:
        value = tl.load(v + channel, mask=ok, other=ELSE).to(tl.float32)
    return value


@triton.jit
def inverse_std(var, eps, channel, ok):
    """1 / sqrt(var + eps), on a GPU too within 2 ulp.

    A Newton step on the hardware's approximation: the correctly rounded root and quotient are subroutines, and saving
    registers around their calls spilled some.
    """
    v = vector(var, channel, ok, 1.0) + eps
    near = tl.rsqrt(v)
    return near * (1.5 - 0.5 * v * near * near)


@triton.jit
def normalise(u, mean, inverse):
    """xhat of `u` in fp32, from a channel's mean and `inverse_std`."""
    return (u.to(tl.float32) - mean) * inverse


@triton.jit
def forward_vectors(gamma, beta, mean, var, eps, channel, ok):
    """What `affine` takes of a channel: mean, scale and shift."""
    scale = inverse_std(var, eps, channel, ok) * vector(gamma, channel, ok, 1.0)
    return vector(mean, channel, ok, 0.0), scale, vector(beta, channel, ok, 0.0)


@triton.jit
def affine(u, mean, scale, shift):
    """xhat * gamma + beta in fp32."""
    return (u.to(tl.float32) - mean) * scale + shift


@triton.jit
def backward_vectors(gamma, mean, var, eps, means, channel, ok, C: tl.constexpr):
    """What `through_norm` takes of a channel: mean, s0, scale and slope. `means` [2, C] holds s0 and s1."""
    inverse = inverse_std(var, eps, channel, ok)
    scale = inverse * vector(gamma, channel, ok, 1.0)
    slope = scale * inverse * vector(means + C, channel, ok, 0.0)
    return vector(mean, channel, ok, 0.0), vector(means, channel, ok, 0.0), scale, slope


@triton.jit
def through_norm(dz, u, mean, s0, scale, slope):
    """du in fp32 from the gradient `dz` behind the norm and the norm's input `u`."""
    return (dz.to(tl.float32) - s0) * scale - (u.to(tl.float32) - mean) * slope


@triton.jit
def moments(values, ok, count, AXIS: tl.constexpr):
    """Mean, and sum of squared differences from it, of the `count` values along AXIS that are `ok`."""
    mean = tl.sum(tl.where(ok, values, 0.0), AXIS, keep_dims=True) / count
    away = tl.where(ok, values - mean, 0.0)
    return mean, tl.sum(away * away, AXIS, keep_dims=True)


@triton.jit
def store_moments(u, means, squares, pivot, tile, m, M, channel, channel_ok, K: tl.constexpr, BLOCK_M: tl.constexpr,
                  AXIS: tl.constexpr):
    """Stores the moments of u - pivot of one tile into means, squares [tiles, K].

    AXIS is that of the pixels `m`; `channel` and `channel_ok` are its channels along the other.
    """
    count = tl.minimum(M - tile * BLOCK_M, BLOCK_M).to(tl.float32)
    mean, square = moments(u.to(tl.float32) - vector(pivot, channel, channel_ok, 0.0), m < M, count, AXIS)
    tl.store(means + tile * K + channel, mean, mask=channel_ok)
    tl.store(squares + tile * K + channel, square, mask=channel_ok)


@triton.jit
def passes(z, KIND: tl.constexpr):
    """Whether the gradient goes through relu or relu6: True for NaN too, because comparisons with it are false."""
    stops = z <= 0.0
    if KIND == "relu6":
        stops |= z >= 6.0
    return stops == 0


@triton.jit
def pack_bits(flags):
    """[rows, 8 * n] flags -> [rows, n] uint8: bit i of byte b is column 8 * b + i."""
    bits = flags.to(tl.int32).reshape(flags.shape[0], flags.shape[1] // 8, 8)
    return tl.sum(bits << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)


@triton.jit
def unpack_bits(packed):
    """[rows, n] uint8 -> [rows, 8 * n] flags, the inverse of `pack_bits`."""
    bits = (packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return bits.reshape(packed.shape[0], packed.shape[1] * 8) != 0


@triton.jit
def bit_of(mask, offset, ok):
    """The flags of the elements at `offset` in memory order, one by one: where a tile's rows end inside of a byte."""
    byte = tl.load(mask + offset // 8, mask=ok, other=0).to(tl.int32)
    return ((byte >> (offset % 8).to(tl.int32)) & 1) != 0
