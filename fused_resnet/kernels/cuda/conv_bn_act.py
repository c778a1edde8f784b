"""conv + BN + residual + activation in one launch of the native library's `_conv_bn_act`.

A tile names one of its kernels, "mma" (mma.sync, from sm_80 on) or "sm90" (wgmma and TMA), with the pixels and the
filters of a block. The norm's vectors are read live; weights are KRSC, which is what channels_last weights are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fused_resnet import native
from fused_resnet.kernels import raw
from fused_resnet.kernels.cuda.native import FOLDED, aligned, capability, needs_finite, weight_in, wide
from fused_resnet.problem import ACTIVATIONS, ConvOperands, ConvProblem

HALVES = ("bf16", "fp16")
DTYPES = (*HALVES, "fp32", "tf32")  # fp32 is multiplied in fp32, where TF32 is allowed, too
FP32 = torch.float32
LARGEST = 2**30  # of a size, and of the terms of a sum
CHUNK = 8  # channels of one load
ANY_TILE = -1  # the library's own rule decides


@dataclass(frozen=True)
class Tile:
    """A row of the library's table."""

    kernel: str
    BLOCK_M: int  # pixels of a block
    BLOCK_N: int  # filters of a block
    label: str = "heuristic"

    @classmethod
    def named(cls, name: str) -> Tile:
        """The tile of an entry of `native.CONV_TILES`."""
        kernel, _, sizes = name.rpartition("_")
        pixels, _, filters = sizes.partition("x")
        return cls(kernel, int(pixels), int(filters))

    def __str__(self) -> str:
        return f"{self.kernel}_{self.BLOCK_M}x{self.BLOCK_N}"

    @functools.cached_property
    def index(self) -> int:
        """Its place in the table.

        Raises:
            ValueError: the library has no such tile.
        """
        if str(self) not in native.CONV_TILES:
            raise ValueError(f"the library has no tile {self}, but {', '.join(native.CONV_TILES)}")
        return native.CONV_TILES.index(str(self))


def refuse(problem: ConvProblem) -> str | None:
    """Why these kernels cannot run `problem`, or None."""
    return _unfit(problem) or raw.refuse("cuda", "conv_bn_act", problem.device)


def _unfit(p: ConvProblem) -> str | None:
    """Why no machine's library could run `p`, or None."""
    if p.dtype not in DTYPES:
        return f"computes {', '.join(DTYPES)}, not {p.dtype}"
    for activation in (p.activation, p.prologue or "identity"):
        if activation not in ACTIVATIONS:
            return f"has no activation {activation!r}"
    if max(p.N, p.C, p.H, p.W, p.K, p.P, p.Q, p.depth) >= LARGEST:
        return "a size or a sum is longer than 2^30"
    return None


def legal(tile: Tile, problem: ConvProblem, arch: int) -> str | None:
    """Why `tile` cannot run `problem` on compute capability `arch`, or None."""
    if reason := _unfit(problem):
        return reason
    p = problem
    if str(tile) not in native.CONV_TILES:
        return f"the library has no tile {tile}"
    if tile.kernel == "sm90":
        return _sm90_refusal(p, arch)
    if tile.BLOCK_N > 64 and (p.dtype not in HALVES or p.C // p.groups % CHUNK or p.prologue):
        return "tiles of 128 filters take 16-bit elements, channels in eights and no prologue"
    return None


def _sm90_refusal(p: ConvProblem, arch: int) -> str | None:
    """Why wgmma and TMA cannot make `p`: as csrc/common/conv_sm90.h has it, where the bounds come from."""
    if arch != 90:
        return f"wgmma and TMA are those of sm_90, not of sm_{arch}"
    if p.dtype not in HALVES or p.prologue or p.groups > 1 or p.C % CHUNK or p.K % CHUNK:
        return "tiles of sm_90 take 16-bit elements, one group, channels and filters in eights, and no prologue"
    reach = [(size - 1) * dilation for size, dilation in zip((p.R, p.S), p.dilation, strict=True)]
    corners = [corner for pad, far in zip(p.padding, reach, strict=True) for corner in (-pad, pad - far)]
    if max(p.stride) > 8 or max(reach) > 254 or min(corners) < -128 or max(corners) > 127:
        return "a stride, a window or a padding is beyond what TMA takes"
    blocks = -(-p.N * p.P * p.Q // 128) * -(-p.K // 64)
    if p.N * p.P * p.Q > 2**31 - 1024 or p.C * p.H * p.W >= 2**39 or blocks >= 2**31:
        return "an image or the batch is beyond what TMA takes"
    return native.without_sm90()


def candidates(problem: ConvProblem, arch: int | None = None) -> list[Tile | None]:
    """The tiles worth measuring, wgmma's first; None, the library's own rule, for what no tile of the table suits.

    These are few filters a group, for which the rule has narrower tiles, and depthwise convolutions.

    Args:
        problem: what is computed.
        arch: compute capability without the dot; by default the current GPU's.
    """
    arch = arch or capability()
    filters = problem.K // problem.groups
    found = [tile for tile in map(Tile.named, native.CONV_TILES) if legal(tile, problem, arch) is None
             and tile.BLOCK_N < 2 * filters]
    return sorted(found, key=lambda tile: tile.kernel != "sm90") or [None]


def with_tile(tile: dict[str, Any]) -> Callable[[ConvProblem, ConvOperands], torch.Tensor]:
    """`forward` with the tile of a tuned row."""
    return functools.partial(forward, tile=Tile(**tile))


def forward(problem: ConvProblem, o: ConvOperands, tile: Tile | None = None) -> torch.Tensor:
    """One launch.

    Args:
        problem: what is computed; `refuse(problem)` must be None.
        o: x and residual dense in channels_last memory; vectors in any float dtype.
        tile: a tuned tile; by default the library's own rule decides.

    Returns:
        [N, K, P, Q] in x's dtype, channels_last, newly allocated.

    Raises:
        ValueError: the library has no such tile.
        RuntimeError: the tile cannot run this problem.
    """
    (x, weight, bias, gamma, beta, mean, var, residual, pre_gamma, pre_beta, pre_mean, pre_var, eps, pre_eps, _) = o
    # The vectors of a norm are of one dtype; where they are not, the library widens them itself, a launch for each.
    if mean is not None and mean.dtype is not FP32:
        gamma, beta, mean, var = wide((gamma, beta, mean, var))
    if bias is not None and bias.dtype is not FP32:
        bias, = wide((bias,))
    if pre_mean is not None and pre_mean.dtype is not FP32:
        pre_gamma, pre_beta, pre_mean, pre_var = wide((pre_gamma, pre_beta, pre_mean, pre_var))
    index = ANY_TILE
    if tile is not None:  # the library's rule takes images that begin anywhere
        index, x = tile.index, aligned(x)
        residual = residual if residual is None else aligned(residual)
    return torch.ops.fused_resnet._conv_bn_act.default(
        x, weight_in(x.dtype, weight), bias, gamma, beta, mean, var, residual, pre_gamma, pre_beta, pre_mean, pre_var,
        eps, pre_eps, problem.activation, problem.prologue, problem.stride, problem.padding, problem.dilation,
        problem.groups, index)


__all__ = ["FOLDED", "candidates", "forward", "needs_finite", "refuse", "with_tile"]
