"""dx = gamma / sqrt(var + eps) * (dz - s0 - xhat * s1), and the shortcut's gradient: dz, or that through its own norm.

One pass: dy, the mask, x and a normalised shortcut are read once, dx and dr are written once. See `strips`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from fused_resnet.kernels.triton.bn_act_sums import load_dz
from fused_resnet.kernels.triton.launch import launch
from fused_resnet.kernels.triton.norm import backward_vectors, through_norm
from fused_resnet.kernels.triton.strips import SIZES, Strip, candidates, chosen, constants, refuse
from fused_resnet.problem import NormProblem

FOLDED = False


@triton.jit(do_not_specialize=SIZES)
def differentiate(dy, mask, x, residual, dx, dr, gamma, mean, var, eps, means, r_gamma, r_mean, r_var, r_eps, r_means,
                  M, STEPS, C: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """dx and, where it is given, dr from dy, x and residual [M, C]; dr is dz where r_var is None."""
    TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    first = pid % TILES * BLOCK_C
    c = (first + tl.arange(0, BLOCK_C))[None, :]
    x_mean, x_s0, x_scale, x_slope = backward_vectors(gamma, mean, var, eps, means, c, c < C, C)
    if r_var is not None:
        other_mean, other_s0, other_scale, other_slope = backward_vectors(r_gamma, r_mean, r_var, r_eps, r_means,
                                                                          c, c < C, C)
    for step in range(STEPS):
        m = ((pid // TILES * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        offset = m * C + c
        ok = (m < M) & (c < C)
        dz = load_dz(dy, mask, offset, ok, m, first, M, C, BLOCK_C)
        given = tl.load(x + offset, mask=ok, other=0.0)
        tl.store(dx + offset, through_norm(dz, given, x_mean, x_s0, x_scale, x_slope).to(dx.dtype.element_ty), mask=ok)
        if dr is not None:
            du = dz
            if r_var is not None:
                other = tl.load(residual + offset, mask=ok, other=0.0)
                du = through_norm(dz, other, other_mean, other_s0, other_scale, other_slope)
            tl.store(dr + offset, du.to(dr.dtype.element_ty), mask=ok)


def needs_finite(problem: NormProblem) -> bool:
    """Never: NaN goes to the elements that stock's goes to."""
    return False


def with_tile(tile: dict[str, Any]) -> Callable[[NormProblem, Any], tuple[torch.Tensor, torch.Tensor | None]]:
    """`forward` with the tile of a tuned row."""
    return functools.partial(forward, tile=Strip(**tile))


def bind(problem: NormProblem, operands: Any, dx: torch.Tensor, dr: torch.Tensor | None,
         tile: Strip) -> tuple[Any, int, dict[str, Any]]:
    """The kernel, the number of programs and the arguments of the launch that writes `dx` and `dr`."""
    programs, values = constants(problem, tile)
    arguments = operands._asdict() | values | {"dx": dx, "dr": dr}
    if problem.shortcut != "norm":
        arguments |= dict.fromkeys(("residual", "r_gamma", "r_mean", "r_var", "r_means"))
    return differentiate, programs, {name: arguments[name] for name in differentiate.arg_names}


def forward(problem: NormProblem, operands: Any, tile: Strip | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One launch.

    Args:
        problem: what is computed; `refuse(problem)` must be None.
        operands: `ops.bn_act.NormOperands`; dy, x and residual are dense in channels_last memory, `means` and
            `r_means` are dense.
        tile: a tuned tile; by default the heuristic's.

    Returns:
        dx and dr [N, C, H, W] in x's dtype, channels_last; dr is None without a shortcut.

    Raises:
        ValueError: the tile cannot run this problem.
    """
    x, tile = operands.x, chosen(problem, tile)
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    dr = torch.empty_like(dx) if problem.shortcut else None
    launch(*bind(problem, operands, dx, dr, tile), x.device, tile.options)
    return dx, dr


__all__ = ["FOLDED", "candidates", "forward", "needs_finite", "refuse", "with_tile"]
