"""Tile shapes: the shipped table and the one choice.

Rows are heuristic: the compiler's figures (registers, shared memory, instructions) were checked for
every one of them, the speed of none was measured on a GPU. A tuned row replaces them per problem.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import asdict, replace

from fused_resnet.kernels.triton.legal import (
    SHARED_LIMIT,
    Tile,
    arch_class,
    cdiv,
    dtype_class,
    flat,
    legal,
    power_of_two,
)
from fused_resnet.problem import ConvProblem

# Programs that fill the smallest chip of a class once: its multiprocessors.
FILL = {80: 108, 86: 84, 90: 132}


def _gemm(*sizes: int, swap: bool = False) -> Tile:
    return Tile("gemm", *sizes, SWAP=swap)


# (kernel, class of architectures, class of dtypes) -> size bucket -> tile. Columns of _gemm: BLOCK_M, BLOCK_N,
# BLOCK_K, num_warps, num_stages. On Hopper windows keep to 4 warps (pytorch#173068), and 4 warps cannot hold
# 128 x 128 sums beside a residual, nor in TF32: both spilled.
_ROWS: dict[tuple[str, int, str], dict[str, Tile]] = {
    ("gemm", 90, "half"): {
        "thin": _gemm(128, 16, 32, 4, 3), "slim": _gemm(128, 32, 32, 4, 4), "flat": _gemm(64, 64, 32, 4, 3),
        "narrow": _gemm(128, 64, 64, 4, 3, swap=True), "wide": _gemm(128, 128, 64, 4, 3),
        "pointwise": _gemm(128, 128, 64, 8, 3), "prologue": _gemm(128, 64, 64, 4, 3), "few": _gemm(64, 64, 64, 4, 4)},
    ("gemm", 90, "tf32"): {
        "thin": _gemm(128, 16, 32, 4, 3), "slim": _gemm(128, 32, 32, 4, 3), "flat": _gemm(64, 64, 32, 4, 3),
        "narrow": _gemm(128, 64, 32, 4, 3, swap=True), "wide": _gemm(128, 64, 32, 4, 3, swap=True),
        "pointwise": _gemm(128, 128, 32, 8, 3), "prologue": _gemm(64, 64, 32, 4, 3), "few": _gemm(64, 64, 32, 4, 4)},
    ("gemm", 80, "half"): {
        "thin": _gemm(128, 16, 32, 4, 3), "slim": _gemm(128, 32, 32, 4, 4), "flat": _gemm(64, 64, 32, 4, 3),
        "narrow": _gemm(128, 64, 32, 4, 4), "wide": _gemm(128, 128, 32, 8, 4), "pointwise": _gemm(128, 128, 32, 8, 4),
        "prologue": _gemm(128, 64, 32, 4, 3), "few": _gemm(64, 64, 64, 4, 4)},
    ("gemm", 80, "tf32"): {
        "thin": _gemm(128, 16, 32, 4, 3), "slim": _gemm(128, 32, 32, 4, 3), "flat": _gemm(64, 64, 32, 4, 3),
        "narrow": _gemm(128, 64, 32, 4, 3), "wide": _gemm(128, 128, 32, 8, 3), "pointwise": _gemm(128, 128, 32, 8, 3),
        "prologue": _gemm(64, 64, 32, 4, 3), "few": _gemm(64, 64, 32, 4, 4)},
    ("gemm", 80, "fp32"): {
        "thin": _gemm(64, 16, 16, 4, 3), "slim": _gemm(64, 32, 16, 4, 3), "flat": _gemm(64, 64, 16, 4, 3),
        "narrow": _gemm(128, 64, 16, 4, 3), "wide": _gemm(128, 64, 16, 4, 3), "pointwise": _gemm(128, 64, 16, 4, 3),
        "prologue": _gemm(64, 64, 16, 4, 3), "few": _gemm(32, 32, 16, 4, 3)},
    ("grouped", 80, "half"): {"grouped": Tile("grouped", 128, 64, 64, 4, 3)},
    ("grouped", 80, "tf32"): {"grouped": Tile("grouped", 128, 32, 32, 4, 3)},
    ("grouped", 80, "fp32"): {"grouped": Tile("grouped", 64, 16, 16, 4, 3)},
    ("depthwise", 80, "half"): {"depthwise": Tile("depthwise", 32, 64)},
    ("depthwise", 80, "tf32"): {"depthwise": Tile("depthwise", 32, 32)},
    ("depthwise", 80, "fp32"): {"depthwise": Tile("depthwise", 32, 32)},
}
SHIPPED = {(*key, bucket): tile for key, row in _ROWS.items() for bucket, tile in row.items()}


def row(kernel: str, arch: int, dtype: str, bucket: str) -> Tile:
    """The shipped row of the class, else that of sm_80, which every later architecture can run."""
    key = (dtype_class(dtype), bucket)
    return SHIPPED.get((kernel, arch_class(arch), *key)) or SHIPPED[(kernel, 80, *key)]


def bucket(problem: ConvProblem, arch: int) -> str:
    """The size bucket of a problem: what limits its tile.

    "grouped": groups so narrow that several share a product; "thin" and "slim": few output channels a group;
    "flat": few input channels; "few": too few pixels to fill the chip with large tiles; "prologue"; "pointwise": 1x1;
    "narrow": up to 64 output channels, or a window with a residual; "wide": the rest.
    """
    if problem.depthwise:
        return "depthwise"
    if pack(problem) > 1:
        return "grouped"
    kg = problem.K // problem.groups
    if kg <= 32:
        return "thin" if kg <= 16 else "slim"
    window = problem.R * problem.S > 1
    if flat(problem):
        return "flat"
    pixels = problem.N * problem.P * problem.Q
    if cdiv(pixels, 128) * cdiv(kg, 128) * problem.groups < FILL[arch_class(arch)]:
        return "few"
    if problem.prologue:
        return "prologue"
    if kg <= 64 or (window and problem.residual):
        return "narrow"
    return "wide" if window else "pointwise"


def pack(problem: ConvProblem) -> int:
    """How many groups share one product: as many as fill its block of channels, 1 where a group does so alone."""
    cg, kg = problem.C // problem.groups, problem.K // problem.groups
    if problem.groups == 1 or problem.depthwise or cg & (cg - 1) or kg & (kg - 1):
        return 1
    # A product of 32 channels wastes nothing on groups of 32, and without tensor cores each zero costs as a number.
    block = {"fp32": 16, "tf32": 32}.get(problem.dtype, 64) if max(cg, kg) < 32 else 0
    fits = max(1, block // max(cg, kg))
    count = min(fits, problem.groups & -problem.groups)
    return count if count * min(cg, kg) >= 16 else 1


def split(problem: ConvProblem, tile: Tile, arch: int) -> int:
    """Over how many programs a reduction is split: what the tiles leave idle, at least 8 steps for each.

    Steps of one program follow each other, so that the longest program sets the time of a launch that does not
    fill the chip; the second launch must cost less than what is saved, which 16 steps stand for.
    """
    tiles = cdiv(problem.N * problem.P * problem.Q, tile.BLOCK_M) * problem.groups * cdiv(
        problem.K // problem.groups, tile.BLOCK_N)
    parts = min(FILL[arch_class(arch)] // max(tiles, 1), tile.steps(problem) // 8, 16)
    return 1 << (parts.bit_length() - 1) if parts > 1 and tile.steps(problem) >= 32 else 1


@functools.lru_cache(maxsize=4096)
def pick(problem: ConvProblem, arch: int) -> Tile:
    """The shipped tile for `problem`, its reduction trimmed to the channels that there are.

    Raises:
        ValueError: no tile can run on `arch`.
    """
    size = bucket(problem, arch)
    tile = row(size if size in ("grouped", "depthwise") else "gemm", arch, problem.dtype, size)
    cg, kg = problem.C // problem.groups, problem.K // problem.groups
    if tile.kernel == "grouped":
        tile = replace(tile, BLOCK_N=pack(problem) * kg, BLOCK_K=pack(problem) * cg)
    elif tile.kernel == "gemm":
        # Whole blocks where the channels divide so, as 3 x 32 for 96, but never less than 32 of 48.
        block = power_of_two(problem.depth) if flat(problem) else min(max(32, cg & -cg), power_of_two(cg))
        tile = replace(tile, BLOCK_K=max(16, min(tile.BLOCK_K, block)))
        if size == "few":
            tile = replace(tile, SPLIT_K=split(problem, tile, arch))
    if reason := legal(tile, problem, arch):
        raise ValueError(f"no Triton tile for {problem.id} on sm_{arch}: {reason}")
    return tile


# Pixels, channels, SWAP of the tiles of "gemm1x1" and "box" worth measuring. Swapped ones read both operands of
# wgmma from shared memory, a box of pixels too; the others send a box through registers, which a prologue needs.
_DESCRIPTOR_SHAPES = ((256, 64, True), (256, 128, True), (128, 64, True), (128, 128, True), (64, 64, False),
                      (128, 64, False), (128, 128, False), (256, 64, False), (128, 256, False), (256, 128, False))


# Pixels, channels, SWAP, warps of the tiles of "ws" worth measuring; each takes as many stages as fit.
_WS_SHAPES = ((128, 64, False, 4), (256, 64, True, 4), (128, 128, False, 8), (128, 128, True, 8), (256, 128, True, 8),
              (256, 128, False, 8), (128, 256, True, 8), (64, 64, True, 4))


def candidates(problem: ConvProblem, arch: int) -> list[Tile]:
    """The shipped tile first, then every other tile that is legal and not much larger than the problem.

    None of them has been measured when this is asked: it is what tuning measures.
    """
    base = pick(problem, arch)
    if problem.depthwise:
        grid = [replace(base, BLOCK_M=m, BLOCK_N=n) for m in (16, 32, 64) for n in (32, 64, 128)]
    else:
        grid = _descriptor_candidates(problem, arch) + _ws_candidates(problem)
        grid = [tile for tile in grid if legal(tile, problem, arch) is None]
        depths = {min(base.BLOCK_K, size) for size in ((64,) if grid else (32, 64))}
        grid += _gather_candidates(problem, base, arch, depths)
    same = {tuple(asdict(replace(tile, label="")).values()): tile for tile in [*grid, base]}
    rest = [tile for tile in same.values() if tile != base and legal(tile, problem, arch) is None]
    return [base, *rest]


def _gather_candidates(problem: ConvProblem, base: Tile, arch: int, depths: set[int]) -> list[Tile]:
    kg, grid = problem.K // problem.groups, []
    for m, n, depth, swap in itertools.product((64, 128, 256), (32, 64, 128, 256), depths, (False, True)):
        warps = 8 if m * n > 128 * 128 else 4
        if n < 2 * kg and m * n >= 4096 and (not swap or n == 64):
            grid.append(Tile("gemm", m, n, depth, warps, 4, SWAP=swap))
    if bucket(problem, arch) == "few":
        grid += [replace(base, SPLIT_K=parts) for parts in (1, 2, 4, 8, 16)]
    if problem.groups > 1:
        grid += [replace(row("grouped", arch, problem.dtype, "grouped"), BLOCK_M=m) for m in (64, 128)]
    if base.kernel == "grouped":
        grid += [replace(base, BLOCK_M=m, num_warps=warps) for m in (64, 128, 256) for warps in (4, 8)]
        grid.append(row("gemm", arch, problem.dtype, "thin" if kg <= 16 else "slim"))
    return grid + [replace(base, num_stages=stages) for stages in (2, 3, 5)] + [replace(base, num_warps=8)]


def _descriptor_candidates(problem: ConvProblem, arch: int) -> list[Tile]:
    p = problem
    kg, k = p.K // p.groups, _line(p)
    kernel = "gemm1x1" if legal(Tile("gemm1x1", 64, 64, k), p, arch) is None else "box"
    grid = [Tile(kernel, m, n, k, 8 if m * n >= 128 * 128 and (m, n) != (256, 64) else 4, stages, SWAP=swap)
            for (m, n, swap), stages in itertools.product(_DESCRIPTOR_SHAPES, (3, 4)) if n < 2 * kg]
    if p.groups > 1 and kg < 64:
        grid += [Tile(kernel, m, kg & -kg, k, 4, stages) for m in (128, 256) for stages in (3, 4)]
    if bucket(p, arch) == "few":
        # Swapped: ptxas serialised some of the split boxes that go through registers. A prologue leaves no choice.
        swap = not p.prologue
        grid += [Tile(kernel, m, 64, k, 4, 4, SWAP=swap, SPLIT_K=parts) for m in (64, 128) for parts in (2, 4, 8, 16)
                 if swap or kernel == "gemm1x1"]
    return grid


def _ws_candidates(problem: ConvProblem) -> list[Tile]:
    grid = []
    for m, n, swap, warps in _WS_SHAPES:
        tile = Tile("ws", m, n, _line(problem), warps, SWAP=swap)
        deep = [replace(tile, num_stages=stages) for stages in range(2, 9)]
        if n < 2 * problem.K:
            grid += [tile for tile in deep if tile.shared(problem) <= SHARED_LIMIT[90]][-1:]
    return grid


def _line(problem: ConvProblem) -> int:
    """BLOCK_K of tiles that load through descriptors: 128 bytes are one line of the hardware's swizzle."""
    cg = problem.C // problem.groups
    return max(16, min(64 if dtype_class(problem.dtype) == "half" else 32, cg & -cg))
