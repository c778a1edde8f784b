"""sum(dz), sum(dz * xhat) and, for a shortcut with a norm, sum(dz * xhat of r): what the gradient of a norm needs.

Each program adds up a strip of rows, see `strips`, and writes its part; a second launch adds the parts up. The order is
fixed by the sizes, there are no atomics, and no sum is longer than a few dozen additions before it joins a tree.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from fused_resnet.kernels.triton.launch import launch
from fused_resnet.kernels.triton.legal import cdiv
from fused_resnet.kernels.triton.norm import bit_of, inverse_std, normalise, unpack_bits, vector
from fused_resnet.kernels.triton.strips import SIZES, Strip, candidates, chosen, constants, refuse
from fused_resnet.problem import NormProblem

FOLDED = False
BLOCKS = {"BLOCK_P": 64, "BLOCK_C": 32}
ADD_OPTIONS = {"num_warps": 4, "num_stages": 1}


@triton.jit
def load_dz(dy, mask, offset, ok, m, first, M, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """dz in fp32 of rows `m` and the BLOCK_C channels from `first` on: dy where the mask is set."""
    dz = tl.load(dy + offset, mask=ok, other=0.0).to(tl.float32)
    if mask is not None:
        if C % 8 == 0:
            byte = (first // 8 + tl.arange(0, BLOCK_C // 8))[None, :]
            flags = unpack_bits(tl.load(mask + m * (C // 8) + byte, mask=(m < M) & (byte < C // 8), other=0))
        else:
            flags = bit_of(mask, offset, ok)
        dz = tl.where(flags, dz, 0.0)
    return dz


@triton.jit(do_not_specialize=SIZES)
def sum_strips(dy, mask, x, residual, parts, mean, var, eps, r_mean, r_var, r_eps, M, STEPS, C: tl.constexpr,
               WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """parts [strips, 2 or 3, C] from dy, x and, where r_var is given, residual [M, C]."""
    TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    SUMS: tl.constexpr = 2 if r_var is None else 3
    pid = tl.program_id(0)
    strip = pid // TILES
    if WIDE:
        pid = pid.to(tl.int64)
    first = pid % TILES * BLOCK_C
    column = first + tl.arange(0, BLOCK_C)
    c = column[None, :]
    x_mean, x_inverse = vector(mean, c, c < C, 0.0), inverse_std(var, eps, c, c < C)
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    dot = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    if r_var is not None:
        other_mean, other_inverse = vector(r_mean, c, c < C, 0.0), inverse_std(r_var, r_eps, c, c < C)
        other_dot = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for step in range(STEPS):
        m = ((pid // TILES * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        offset = m * C + c
        ok = (m < M) & (c < C)
        dz = load_dz(dy, mask, offset, ok, m, first, M, C, BLOCK_C)
        total += dz
        # dz is 0 beyond the last row, and what stands for x there is finite.
        dot += dz * normalise(tl.load(x + offset, mask=ok, other=0.0), x_mean, x_inverse)
        if r_var is not None:
            other = tl.load(residual + offset, mask=ok, other=0.0)
            other_dot += dz * normalise(other, other_mean, other_inverse)
    out = parts + strip * (SUMS * C) + column
    tl.store(out, tl.sum(total, 0), mask=column < C)
    tl.store(out + C, tl.sum(dot, 0), mask=column < C)
    if r_var is not None:
        tl.store(out + 2 * C, tl.sum(other_dot, 0), mask=column < C)


@triton.jit(do_not_specialize=["PARTS"])
def add_parts(parts, sums, PARTS, COLUMNS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """sums [COLUMNS] from parts [PARTS, COLUMNS]."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, PARTS, BLOCK_P):
        part = (start + tl.arange(0, BLOCK_P))[:, None]
        ok = (part < PARTS) & (column < COLUMNS)[None, :]
        total += tl.load(parts + part * COLUMNS + column[None, :], mask=ok, other=0.0)
    tl.store(sums + column, tl.sum(total, 0), mask=column < COLUMNS)


def needs_finite(problem: NormProblem) -> bool:
    """Never: NaN goes into the sums of its channel only."""
    return False


def with_tile(tile: dict[str, Any]) -> Callable[[NormProblem, Any], torch.Tensor]:
    """`forward` with the tile of a tuned row."""
    return functools.partial(forward, tile=Strip(**tile))


def bind(problem: NormProblem, operands: Any, parts: torch.Tensor, tile: Strip) -> tuple[Any, int, dict[str, Any]]:
    """The kernel, the number of programs and the arguments of the launch that writes `parts`."""
    programs, values = constants(problem, tile)
    arguments = operands._asdict() | values | {"parts": parts}
    if problem.shortcut != "norm":
        arguments |= dict.fromkeys(("residual", "r_mean", "r_var"))
    return sum_strips, programs, {name: arguments[name] for name in sum_strips.arg_names}


def bind_add(parts: torch.Tensor, sums: torch.Tensor) -> tuple[Any, int, dict[str, Any]]:
    """The launch that adds parts [strips, ...] up to `sums`, which is dense."""
    columns = sums.numel()
    arguments = {"parts": parts, "sums": sums, "PARTS": parts.shape[0], "COLUMNS": columns, **BLOCKS}
    return add_parts, cdiv(columns, BLOCKS["BLOCK_C"]), arguments


def forward(problem: NormProblem, operands: Any, tile: Strip | None = None) -> torch.Tensor:
    """Two launches.

    Args:
        problem: what is computed; `refuse(problem)` must be None.
        operands: `ops.bn_act.NormOperands`; dy, x and residual are dense in channels_last memory.
        tile: a tuned tile; by default the heuristic's.

    Returns:
        [2, C] in fp32, or [3, C] for a shortcut with a norm.

    Raises:
        ValueError: the tile cannot run this problem.
    """
    x, tile = operands.x, chosen(problem, tile)
    sums = torch.empty((3 if problem.shortcut == "norm" else 2, problem.C), dtype=torch.float32, device=x.device)
    parts = torch.empty((tile.count(problem), *sums.shape), dtype=torch.float32, device=x.device)
    launch(*bind(problem, operands, parts, tile), x.device, tile.options)
    launch(*bind_add(parts, sums), x.device, ADD_OPTIONS)
    return sums


__all__ = ["FOLDED", "candidates", "forward", "needs_finite", "refuse", "with_tile"]
