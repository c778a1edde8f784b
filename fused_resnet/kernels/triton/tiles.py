"""Tile shapes: the shipped table, the one judgement of what can run and the one choice.

Rows are heuristic: the compiler's figures (registers, shared memory, instructions) were checked for
every one of them, the speed of none was measured on a GPU. A tuned row replaces them per problem.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from fused_resnet.problem import ELEMENT_BYTES, ConvProblem

# Dynamic shared memory that one program may hold, per class of architectures.
SHARED_LIMIT = {80: 166912, 86: 101376, 90: 232448}
# Programs that fill the smallest chip of a class once: its multiprocessors.
FILL = {80: 108, 86: 84, 90: 132}


@dataclass(frozen=True)
class Tile:
    """What one program computes, and how.

    BLOCK_M output pixels x BLOCK_N output channels, reduced BLOCK_K elements at a time. SWAP makes the
    channels the rows of the matrix product. kernel is "gemm" or "depthwise" (BLOCK_K unused).
    """

    kernel: str
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int = 16
    num_warps: int = 4
    num_stages: int = 3
    SWAP: bool = False
    label: str = "heuristic"

    def __str__(self) -> str:
        sizes = f"{self.BLOCK_M}x{self.BLOCK_N}x{self.BLOCK_K}-w{self.num_warps}s{self.num_stages}"
        return f"{self.kernel}-{sizes}{'-swap' if self.SWAP else ''}"

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def shared(self, problem: ConvProblem) -> int:
        """Bytes of shared memory that the pipelined loads take; the gate compares the compiler's own figure."""
        if self.kernel == "depthwise":
            return 0
        step = (self.BLOCK_M + self.BLOCK_N) * ELEMENT_BYTES[problem.dtype] + 16 * bool(problem.prologue)
        return step * self.BLOCK_K * self.num_stages

    def instruction(self, dtype: str, arch: int) -> str:
        """The tensor-core instruction that its machine code must hold: "HGMMA", "HMMA", or "" for none."""
        if self.kernel == "depthwise" or dtype == "fp32":
            return ""
        return "HGMMA" if arch == 90 else "HMMA"


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below `n`."""
    return 1 << (n - 1).bit_length()


def arch_class(arch: int) -> int:
    """The architecture whose rows serve `arch`: by its tensor-core instruction and its shared memory."""
    if arch == 90:
        return 90
    return 86 if arch in (86, 89, 120, 121) else 80


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
    ("depthwise", 80, "half"): {"depthwise": Tile("depthwise", 32, 64)},
    ("depthwise", 80, "tf32"): {"depthwise": Tile("depthwise", 32, 32)},
    ("depthwise", 80, "fp32"): {"depthwise": Tile("depthwise", 32, 32)},
}
SHIPPED = {(*key, bucket): tile for key, row in _ROWS.items() for bucket, tile in row.items()}


def dtype_class(dtype: str) -> str:
    return "half" if dtype in ("fp16", "bf16") else dtype


def row(kernel: str, arch: int, dtype: str, bucket: str) -> Tile:
    """The shipped row of the class, else that of sm_80, which every later architecture can run."""
    key = (dtype_class(dtype), bucket)
    return SHIPPED.get((kernel, arch_class(arch), *key)) or SHIPPED[(kernel, 80, *key)]


def legal(tile: Tile, problem: ConvProblem, arch: int) -> str | None:
    """Why `tile` cannot compute `problem` on `arch`, or None."""
    if arch < 80:
        return f"sm_{arch} is older than sm_80"
    if tile.kernel not in ("gemm", "depthwise"):
        return f"there is no kernel {tile.kernel!r}"
    if tile.kernel == "depthwise" and not problem.depthwise:
        return "the depthwise kernel needs one input channel a group"
    for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps"):
        size = getattr(tile, name)
        if size < 1 or size & (size - 1) or (name.startswith("BLOCK") and size < 16):
            return f"{name}={size} is no power of two" + (" from 16 on" if name.startswith("BLOCK") else "")
    sums = tile.BLOCK_M * tile.BLOCK_N // (32 * tile.num_warps)
    if sums > 128:
        return f"{sums} sums in the registers of one thread, more than 128"
    if tile.SWAP and problem.prologue:
        return "a prologue needs the pixels as the first operand, which wgmma can read from registers"
    if tile.instruction(problem.dtype, arch) == "HGMMA":
        rows = tile.BLOCK_N if tile.SWAP else tile.BLOCK_M
        if rows < 64 or tile.num_warps % 4:
            return f"wgmma needs 64 rows and 4 warps, not {rows} and {tile.num_warps}"
    limit, shared = SHARED_LIMIT[arch_class(arch)], tile.shared(problem)
    if shared > limit:
        return f"{shared} bytes of shared memory; sm_{arch} has {limit}"
    return None


def bucket(problem: ConvProblem, arch: int) -> str:
    """The size bucket of a problem: what limits its tile.

    "thin" and "slim": few output channels a group; "flat": few input channels; "few": too few pixels to fill the
    chip with large tiles; "prologue"; "pointwise": 1x1; "narrow": up to 64 output channels, or a window with a
    residual; "wide": the rest.
    """
    if problem.depthwise:
        return "depthwise"
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


def flat(problem: ConvProblem) -> bool:
    """Whether the reduction runs over the elements of the window: tap by tap, few channels would fill BLOCK_K badly."""
    return problem.C // problem.groups < 16 and problem.R * problem.S > 1


@functools.lru_cache(maxsize=4096)
def pick(problem: ConvProblem, arch: int) -> Tile:
    """The shipped tile for `problem`, its reduction trimmed to the channels that there are.

    Raises:
        ValueError: no tile can run on `arch`.
    """
    size = bucket(problem, arch)
    tile = row("depthwise" if size == "depthwise" else "gemm", arch, problem.dtype, size)
    if tile.kernel == "gemm":
        cg = problem.C // problem.groups
        # Whole blocks where the channels divide so, as 3 x 32 for 96, but never less than 32 of 48.
        block = power_of_two(problem.depth) if flat(problem) else min(max(32, cg & -cg), power_of_two(cg))
        tile = replace(tile, BLOCK_K=max(16, min(tile.BLOCK_K, block)))
    if reason := legal(tile, problem, arch):
        raise ValueError(f"no Triton tile for {problem.id} on sm_{arch}: {reason}")
    return tile
