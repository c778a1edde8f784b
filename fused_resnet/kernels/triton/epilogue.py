"""What every kernel does around its accumulation, written once.

The norm is read live as four vectors and folded into one scale and one shift per channel in fp32;
residual and activation follow in fp32, and one rounding to the output's type ends the launch.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(v, KIND: tl.constexpr):
    """Applies the activation and keeps NaN: a comparison with NaN is false, `tl.maximum` would drop it on a GPU."""
    if KIND == "relu":
        v = tl.where(v <= 0.0, 0.0, v)
    elif KIND == "relu6":
        v = tl.where(v <= 0.0, 0.0, tl.where(v >= 6.0, 6.0, v))
    elif KIND == "silu":
        v = v / (1.0 + tl.exp(-v))
    elif KIND == "hardswish":
        gate = v + 3.0
        v = v * tl.where(gate <= 0.0, 0.0, tl.where(gate >= 6.0, 6.0, gate)) * (1.0 / 6.0)
    return v


@triton.jit
def fold(bias, gamma, beta, mean, var, eps, channel, ok):
    """Scale and shift with `v * scale + shift == (v + bias - mean) * gamma / sqrt(var + eps) + beta`.

    Vectors that are None are left out, and what nothing remains of is a plain number; a scale and a shift made before
    come as gamma and beta alone. `channel` may have any shape; loads are masked with `ok`. Gluon kernels call this and
    `activate` too, so neither makes a tensor without a layout.
    """
    scale, shift = 1.0, 0.0
    if bias is not None:
        shift = tl.load(bias + channel, mask=ok, other=0.0).to(tl.float32)
    if var is not None:
        # Correctly rounded on a GPU too: rsqrt's approximation would cost one more ulp of every output.
        scale = tl.div_rn(scale, tl.sqrt_rn(tl.load(var + channel, mask=ok, other=1.0).to(tl.float32) + eps))
    if gamma is not None:
        scale *= tl.load(gamma + channel, mask=ok, other=0.0).to(tl.float32)
    if mean is not None:
        shift -= tl.load(mean + channel, mask=ok, other=0.0).to(tl.float32)
    shift *= scale
    if beta is not None:
        shift += tl.load(beta + channel, mask=ok, other=0.0).to(tl.float32)
    return scale, shift


@triton.jit
def finish(acc, y, residual, offset, ok, bias, gamma, beta, mean, var, eps, channel, channel_ok,
           ACTIVATION: tl.constexpr):
    """Stores `activation(norm(acc + bias) + residual)`; `offset` and `ok` have the accumulator's shape."""
    scale, shift = fold(bias, gamma, beta, mean, var, eps, channel, channel_ok)
    acc = acc * scale + shift
    if residual is not None:
        acc += tl.load(residual + offset, mask=ok, other=0.0).to(tl.float32)
    tl.store(y + offset, activate(acc, ACTIVATION).to(y.dtype.element_ty), mask=ok)


@triton.jit
def finish_block(acc, y, residual, at, bias, gamma, beta, mean, var, eps, k, K, ACTIVATION: tl.constexpr,
                 SWAP: tl.constexpr):
    """`finish` through tensor descriptors: stores the block at coordinates `at`, whose channels start with `k`.

    With SWAP the channels are the rows of `acc`: scale and shift are then few values a thread, and the block is
    transposed on its way to shared memory, from where it leaves.
    """
    channel = k + tl.arange(0, acc.shape[0 if SWAP else 1])
    channel = channel[:, None] if SWAP else channel[None, :]
    scale, shift = fold(bias, gamma, beta, mean, var, eps, channel, channel < K)
    acc = acc * scale + shift
    if residual is not None:
        other = residual.load(at)
        if SWAP:
            acc += other.reshape(acc.shape[1], acc.shape[0]).T.to(tl.float32)
        else:
            acc += other.reshape(acc.shape).to(tl.float32)
    store_block(activate(acc, ACTIVATION).to(y.dtype), y, at, SWAP)


@triton.jit
def store_block(block, y, at, SWAP: tl.constexpr):
    """Stores [pixels, channels], with SWAP [channels, pixels], as the block of descriptor `y` at coordinates `at`."""
    if SWAP:
        block = block.T
    y.store(at, block.reshape(y.block_shape))
