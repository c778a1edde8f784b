"""Tile shapes: the shipped table, the one judgement of what can run and the one choice.

Rows are heuristic: the compiler's figures (registers, shared memory, instructions) were checked for
every one of them, the speed of none was measured on a GPU. A tuned row replaces them per problem.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import asdict, dataclass, replace

from fused_resnet.problem import ELEMENT_BYTES, ConvProblem

# Dynamic shared memory that one program may hold, per class of architectures.
SHARED_LIMIT = {80: 166912, 86: 101376, 90: 232448}
# Kernels that reach memory through tensor descriptors.
TMA = ("gemm1x1", "box")
# Programs that fill the smallest chip of a class once: its multiprocessors.
FILL = {80: 108, 86: 84, 90: 132}


@dataclass(frozen=True)
class Tile:
    """What one program computes, and how.

    BLOCK_M output pixels x BLOCK_N output channels, reduced BLOCK_K elements at a time. SWAP makes the
    channels the rows of the matrix product. SPLIT_K programs share the reduction of one tile.

    kernel: "gemm"; "grouped", the same with several groups in one product; "depthwise" (BLOCK_K unused);
    "gemm1x1" and "box", which load through tensor descriptors (Hopper).
    """

    kernel: str
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int = 16
    num_warps: int = 4
    num_stages: int = 3
    SWAP: bool = False
    SPLIT_K: int = 1
    label: str = "heuristic"

    def __str__(self) -> str:
        sizes = f"{self.BLOCK_M}x{self.BLOCK_N}x{self.BLOCK_K}-w{self.num_warps}s{self.num_stages}"
        split = f"-split{self.SPLIT_K}" if self.SPLIT_K > 1 else ""
        return f"{self.kernel}-{sizes}{'-swap' if self.SWAP else ''}{split}"

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def shared(self, problem: ConvProblem) -> int:
        """Bytes of shared memory that the pipelined loads take; the gate compares the compiler's own figure."""
        if self.kernel == "depthwise":
            return 0
        element = ELEMENT_BYTES[problem.dtype]
        step = (self.BLOCK_M + self.BLOCK_N) * element + 16 * bool(problem.prologue)
        if self.kernel in TMA:
            # The output leaves from shared memory; of a tile with one step the loads, the residual's too, overlap
            # with the tile before. Barriers and alignment take less than 1 KiB.
            blocks = 1 + (problem.residual and self.steps(problem) == 1)
            return step * self.BLOCK_K * self.num_stages + blocks * self.BLOCK_M * self.BLOCK_N * element + 1024
        return step * self.BLOCK_K * self.num_stages

    def steps(self, problem: ConvProblem) -> int:
        """Products of BLOCK_K elements that one tile sums up."""
        if flat(problem):
            return cdiv(problem.depth, self.BLOCK_K)
        return problem.R * problem.S * cdiv(problem.C // problem.groups, self.BLOCK_K)

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
    ("grouped", 80, "half"): {"grouped": Tile("grouped", 128, 64, 64, 4, 3)},
    ("grouped", 80, "tf32"): {"grouped": Tile("grouped", 128, 32, 32, 4, 3)},
    ("grouped", 80, "fp32"): {"grouped": Tile("grouped", 64, 16, 16, 4, 3)},
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
    if tile.kernel not in ("gemm", "grouped", "depthwise", *TMA):
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
    if tile.SPLIT_K != 1 and (tile.kernel != "gemm" or not 1 <= tile.SPLIT_K <= tile.steps(problem)):
        return f"SPLIT_K={tile.SPLIT_K} of {tile.steps(problem)} steps: only the gemm kernel shares its steps out"
    if tile.SWAP and problem.prologue:
        return "a prologue needs the pixels as the first operand, which wgmma can read from registers"
    if tile.instruction(problem.dtype, arch) == "HGMMA":
        rows = tile.BLOCK_N if tile.SWAP else tile.BLOCK_M
        if rows < 64 or tile.num_warps % 4:
            return f"wgmma needs 64 rows and 4 warps, not {rows} and {tile.num_warps}"
    limit, shared = SHARED_LIMIT[arch_class(arch)], tile.shared(problem)
    if shared > limit:
        return f"{shared} bytes of shared memory; sm_{arch} has {limit}"
    if tile.kernel == "grouped":
        return _legal_grouped(tile, problem)
    return _legal_tma(tile, problem, arch) if tile.kernel in TMA else None


def _legal_grouped(tile: Tile, problem: ConvProblem) -> str | None:
    cg, kg = problem.C // problem.groups, problem.K // problem.groups
    pack = tile.BLOCK_K // cg
    if pack < 2 or cg & (cg - 1) or kg & (kg - 1):
        return f"{cg} -> {kg} channels a group are not powers of two that fit BLOCK_K={tile.BLOCK_K} twice"
    if problem.groups % pack or tile.BLOCK_N != pack * kg:
        return f"BLOCK_N={tile.BLOCK_N} is not the {kg} channels of each of {pack} out of {problem.groups} groups"
    return None


def _legal_tma(tile: Tile, problem: ConvProblem, arch: int) -> str | None:
    p = problem
    if arch_class(arch) != 90:
        return f"tensor descriptors are used on sm_90, not on sm_{arch}"
    if p.dtype == "fp32" and p.device == "cuda":
        return "fp32 without tensor cores spills registers here"
    if p.residual and tile.BLOCK_M * tile.BLOCK_N > 128 * 128:
        return f"{tile.BLOCK_M} x {tile.BLOCK_N} sums and a residual's block spill registers"
    if p.groups > 1 or p.prologue or tile.SWAP:
        return "the kernels with tensor descriptors have no groups, no prologue and no SWAP"
    if (p.C * ELEMENT_BYTES[p.dtype]) % 16 or (p.K * ELEMENT_BYTES[p.dtype]) % 16:
        return f"{p.C} -> {p.K} channels of {p.dtype} are not multiples of 16 bytes"
    if tile.kernel == "gemm1x1":
        single = p.R * p.S == 1 and p.stride == (1, 1) and p.padding == (0, 0)
        return None if single else "gemm1x1 needs one tap, stride 1 and no padding"
    if p.C % tile.BLOCK_K:
        return f"BLOCK_K={tile.BLOCK_K} does not divide {p.C} channels: a box would reach into the next tap"
    for size, taps, stride, pad in zip((p.H, p.W), (p.R, p.S), p.stride, p.padding, strict=True):
        if size % stride and (taps > 1 or pad):
            return f"stride {stride} does not divide {size}: rows or columns of a view would be of another line"
    return None


@functools.lru_cache(maxsize=4096)
def box(problem: ConvProblem, pixels: int) -> tuple[int, int, int]:
    """Images, rows and columns of a box of `pixels` (a power of two) that covers the output with fewest boxes.

    Among equals the one that reads least: the windows of neighbouring pixels overlap, those of two images do not.
    """
    sizes = [1 << i for i in range(pixels.bit_length())]
    shapes = [(pixels // (th * tw), th, tw) for th in sizes for tw in sizes if th * tw <= pixels]

    def cost(shape: tuple[int, int, int]) -> tuple[int, int]:
        nb, th, tw = shape
        boxes = cdiv(problem.N, nb) * cdiv(problem.P, th) * cdiv(problem.Q, tw)
        read = nb * (th * problem.stride[0] + problem.R) * (tw * problem.stride[1] + problem.S)
        return boxes, read

    return min(shapes, key=cost)


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


def flat(problem: ConvProblem) -> bool:
    """Whether the reduction runs over the elements of the window: tap by tap, few channels would fill BLOCK_K badly."""
    return problem.C // problem.groups < 16 and problem.R * problem.S > 1


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


def candidates(problem: ConvProblem, arch: int) -> list[Tile]:
    """The shipped tile first, then every other tile that is legal and not much larger than the problem.

    None of them has been measured when this is asked: it is what tuning measures.
    """
    base = pick(problem, arch)
    k, grid = min(base.BLOCK_K, 64), []
    if problem.depthwise:
        grid = [replace(base, BLOCK_M=m, BLOCK_N=n) for m in (16, 32, 64) for n in (32, 64, 128)]
    else:
        for m, n, depth, swap in itertools.product((64, 128, 256), (32, 64, 128, 256), {k, min(k, 32)}, (False, True)):
            warps = 8 if m * n > 128 * 128 else 4
            if n < 2 * problem.K // problem.groups and m * n >= 4096 and (not swap or n == 64):
                grid.append(Tile("gemm", m, n, depth, warps, 4, SWAP=swap))
        kernel = "gemm1x1" if legal(Tile("gemm1x1", 64, 64, k), problem, arch) is None else "box"
        for m, n in ((64, 64), (128, 64), (256, 64), (128, 128), (128, 256), (256, 128)):
            if n < 2 * problem.K:
                grid += [Tile(kernel, m, n, k, 8 if m * n >= 128 * 128 else 4, stages) for stages in (3, 4)]
        if bucket(problem, arch) == "few":
            grid += [replace(base, SPLIT_K=parts) for parts in (1, 2, 4, 8, 16)]
        if problem.groups > 1:
            grid += [replace(row("grouped", arch, problem.dtype, "grouped"), BLOCK_M=m) for m in (64, 128)]
        if base.kernel == "grouped":
            narrow = "thin" if problem.K // problem.groups <= 16 else "slim"
            grid += [replace(base, BLOCK_M=m, num_warps=warps) for m in (64, 128, 256) for warps in (4, 8)]
            grid.append(row("gemm", arch, problem.dtype, narrow))
        grid += [replace(base, num_stages=stages) for stages in (2, 3, 5)] + [replace(base, num_warps=8)]
    same = {tuple(asdict(replace(tile, label="")).values()): tile for tile in [*grid, base]}
    rest = [tile for tile in same.values() if tile != base and legal(tile, problem, arch) is None]
    return [base, *rest]
