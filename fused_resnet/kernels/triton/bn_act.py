"""y = act((x - mean) / sqrt(var + eps) * gamma + beta + shortcut), and one bit an element: one pass, in training.

A program walks down a strip of rows, see `strips`. Where C is no multiple of 8, a byte of the mask belongs to two
pixels; the elements are then taken in the order of memory, as rows of BLOCK_C, and every element looks its channel's
vectors up. Every element is read and written once, 16 bytes at a time where C is a multiple of 8.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from fused_resnet.kernels.triton.epilogue import activate
from fused_resnet.kernels.triton.launch import launch
from fused_resnet.kernels.triton.legal import cdiv
from fused_resnet.kernels.triton.norm import affine, forward_vectors, pack_bits, passes
from fused_resnet.kernels.triton.strips import SIZES, Strip, candidates, chosen, constants, refuse
from fused_resnet.problem import NormProblem

FOLDED = False


@triton.jit(do_not_specialize=SIZES)
def normalise_add_act(x, residual, y, mask, gamma, beta, mean, var, eps, r_gamma, r_beta, r_mean, r_var, r_eps,
                      M, STEPS, C: tl.constexpr, ACTIVATION: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
                      BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """y and mask from x and residual [M, C]. FLAT takes the matrix as rows of BLOCK_C in the order of memory."""
    TILES: tl.constexpr = 1 if FLAT else (C + BLOCK_C - 1) // BLOCK_C
    COLUMNS: tl.constexpr = BLOCK_C if FLAT else C  # of a row in memory
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
        M = M.to(tl.int64)
    first = pid % TILES * BLOCK_C
    c = (first + tl.arange(0, BLOCK_C))[None, :]
    byte = (first // 8 + tl.arange(0, BLOCK_C // 8))[None, :]
    if not FLAT:
        x_mean, x_scale, x_shift = forward_vectors(gamma, beta, mean, var, eps, c, c < C)
        if r_var is not None:
            other_mean, other_scale, other_shift = forward_vectors(r_gamma, r_beta, r_mean, r_var, r_eps, c, c < C)
    for step in range(STEPS):
        m = ((pid // TILES * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        offset = m * COLUMNS + c
        if FLAT:
            ok = offset < M * C
            byte_ok = m * COLUMNS + byte * 8 < M * C
            channel = offset % C
            x_mean, x_scale, x_shift = forward_vectors(gamma, beta, mean, var, eps, channel, ok)
            if r_var is not None:
                other_mean, other_scale, other_shift = forward_vectors(r_gamma, r_beta, r_mean, r_var, r_eps,
                                                                       channel, ok)
        else:
            ok = (m < M) & (c < C)
            byte_ok = (m < M) & (byte < C // 8)
        z = affine(tl.load(x + offset, mask=ok, other=0.0), x_mean, x_scale, x_shift)
        if residual is not None:
            other = tl.load(residual + offset, mask=ok, other=0.0)
            if r_var is not None:
                z += affine(other, other_mean, other_scale, other_shift)
            else:
                z += other.to(tl.float32)
        tl.store(y + offset, activate(z, ACTIVATION).to(y.dtype.element_ty), mask=ok)
        if mask is not None:
            flags = passes(z, ACTIVATION)
            if FLAT:
                flags &= ok  # a byte may reach beyond the last element
            tl.store(mask + m * (COLUMNS // 8) + byte, pack_bits(flags), mask=byte_ok)


def needs_finite(problem: NormProblem) -> bool:
    """Never: NaN passes, as in stock."""
    return False


def with_tile(tile: dict[str, Any]) -> Callable[[NormProblem, Any], tuple[torch.Tensor, torch.Tensor | None]]:
    """`forward` with the tile of a tuned row."""
    return functools.partial(forward, tile=Strip(**tile))


def bind(problem: NormProblem, operands: Any, y: torch.Tensor, mask: torch.Tensor | None,
         tile: Strip) -> tuple[Any, int, dict[str, Any]]:
    """The kernel, the number of programs and the arguments of the launch that writes `y` and `mask`."""
    programs, values = constants(problem, tile)
    arguments = operands._asdict() | values | {
        "y": y, "mask": mask, "ACTIVATION": problem.activation, "FLAT": problem.C % 8 != 0}
    if arguments["FLAT"]:
        steps = values["STEPS"]
        programs = cdiv(problem.depth * problem.C, tile.BLOCK_M * tile.BLOCK_C * steps)
    return normalise_add_act, programs, {name: arguments[name] for name in normalise_add_act.arg_names}


def forward(problem: NormProblem, operands: Any, tile: Strip | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One launch.

    Args:
        problem: what is computed; `refuse(problem)` must be None.
        operands: `ops.bn_act.NormOperands`; x and residual are dense in channels_last memory.
        tile: a tuned tile; by default the heuristic's.

    Returns:
        y [N, C, H, W] in x's dtype, channels_last, and its mask, uint8 of [ceil(N * H * W * C / 8)]; None for the
        identity.

    Raises:
        ValueError: the tile cannot run this problem.
    """
    x, tile = operands.x, chosen(problem, tile)
    y = torch.empty(problem.output_shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    mask = None
    if problem.activation != "identity":
        mask = torch.empty(cdiv(x.numel(), 8), dtype=torch.uint8, device=x.device)
    launch(*bind(problem, operands, y, mask, tile), x.device, tile.options)
    return y, mask


__all__ = ["FOLDED", "candidates", "forward", "needs_finite", "refuse", "with_tile"]
