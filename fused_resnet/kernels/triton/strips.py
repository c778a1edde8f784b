"""How the kernels of `bn_act`, `bn_act_sums` and `bn_act_grad` walk over a tensor.

x is a matrix of M = N * H * W rows and C columns. A program owns BLOCK_C columns of a strip of rows and goes down it
BLOCK_M rows at a time, so that a channel's vectors are read, and its square root is taken, once a strip. How many
strips there are follows from the sizes alone, and sums have the same bits on every GPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

from fused_resnet.kernels.triton.legal import cdiv, power_of_two
from fused_resnet.problem import ELEMENT_BYTES, NormProblem

DTYPES = ("fp32", "tf32", "fp16", "bf16")
LARGEST_INDEX = 2**31 - 1
# Sizes are plain numbers: one binary serves every batch and image size.
SIZES = ["M", "STEPS", "eps", "r_eps"]
MOST_SUMS = 64  # elements that one thread may hold of a tile: each costs up to three sums in `bn_act_sums`


@dataclass(frozen=True)
class Strip:
    """BLOCK_M rows x BLOCK_C channels a step; about PROGRAMS programs share the rows."""

    BLOCK_M: int
    BLOCK_C: int
    PROGRAMS: int = 2048
    num_warps: int = 4
    label: str = "heuristic"

    def __str__(self) -> str:
        return f"strip-{self.BLOCK_M}x{self.BLOCK_C}-p{self.PROGRAMS}w{self.num_warps}"

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": 1}

    def count(self, problem: NormProblem) -> int:
        """How many strips the rows are cut into."""
        blocks = cdiv(problem.depth, self.BLOCK_M)
        return cdiv(blocks, cdiv(blocks, cdiv(self.PROGRAMS, cdiv(problem.C, self.BLOCK_C))))


def refuse(problem: NormProblem) -> str | None:
    """Why these kernels cannot run `problem`, or None. Looks at sizes and flags only."""
    if problem.dtype not in DTYPES:
        return f"the Triton kernels compute {', '.join(DTYPES)}, not {problem.dtype}"
    if problem.device == "cpu" and problem.dtype not in ("fp32", "fp16"):
        return f"the Triton interpreter computes fp32 and fp16 only, not {problem.dtype}"
    if problem.activation not in ("identity", "relu", "relu6"):
        return f"the gradient of {problem.activation!r} does not follow from one bit an element"
    if problem.shortcut not in ("", "tensor", "norm"):
        return f"there is no shortcut {problem.shortcut!r}"
    return None


def legal(tile: Strip, problem: NormProblem) -> str | None:
    """Why `tile` cannot compute `problem`, or None."""
    for name in ("BLOCK_M", "BLOCK_C", "PROGRAMS", "num_warps"):
        size = getattr(tile, name)
        if size < 1 or size & (size - 1):
            return f"{name}={size} is no power of two"
    if tile.BLOCK_C < 8:
        return f"BLOCK_C={tile.BLOCK_C} is less than one byte of the mask"
    if tile.BLOCK_C >= 2 * max(8, problem.C):
        return f"BLOCK_C={tile.BLOCK_C} is twice the {problem.C} channels"
    each = tile.BLOCK_M * tile.BLOCK_C // (32 * tile.num_warps)
    if each > MOST_SUMS:
        return f"{each} elements in the registers of one thread, more than {MOST_SUMS}"
    return None


def pick(problem: NormProblem) -> Strip:
    """The heuristic's tile, not measured: whole rows up to 128 channels, 32 bytes of each tensor in a thread's hands.

    Three sums of 64 bytes a thread each spilled.
    """
    channels = min(128, max(8, power_of_two(problem.C)))
    return Strip(4096 // ELEMENT_BYTES[problem.dtype] // channels, channels)


@functools.lru_cache(maxsize=1024)
def candidates(problem: NormProblem, arch: int | None = None) -> list[Strip]:
    """The tiles worth measuring for `problem`, the shipped one first; they are the same for every `arch`."""
    base = pick(problem)
    grid = [Strip(elements // channels, channels, programs, warps) for channels in (64, 128, 256, base.BLOCK_C)
            for elements, warps in ((1024, 4), (2048, 4), (4096, 4), (4096, 8)) for programs in (1024, 2048, 4096)]
    unique = dict.fromkeys(replace(tile, label="heuristic") for tile in grid)
    return [base, *(tile for tile in unique if tile != base and legal(tile, problem) is None)]


def chosen(problem: NormProblem, tile: Strip | None) -> Strip:
    """The given tile, by default the heuristic's.

    Raises:
        ValueError: the tile cannot run this problem.
    """
    if tile is None:
        return pick(problem)
    if reason := legal(tile, problem):
        raise ValueError(f"{tile} cannot run {problem.id}: {reason}")
    return tile


@functools.lru_cache(maxsize=4096)
def constants(problem: NormProblem, tile: Strip) -> tuple[int, dict[str, Any]]:
    """How many programs there are, and what all three kernels are given but tensors and eps."""
    p, strips = problem, tile.count(problem)
    rows = cdiv(cdiv(p.depth, tile.BLOCK_M), strips)
    values = {"M": p.depth, "STEPS": rows, "C": p.C, "BLOCK_M": tile.BLOCK_M, "BLOCK_C": tile.BLOCK_C,
              # The last step computes offsets beyond the tensor before it masks them.
              "WIDE": p.depth * p.C + (rows * tile.BLOCK_M + 1) * max(p.C, tile.BLOCK_C) > LARGEST_INDEX}
    return strips * cdiv(p.C, tile.BLOCK_C), values
