"""Compiles one share of the tiles of `conv_dgrad` and `conv_wgrad`, a JSON line each: `compile_grads.py SHARE OF`."""

import dataclasses
from functools import partial

import torch

from fused_resnet.kernels.triton import conv_dgrad, conv_wgrad, grad
from fused_resnet.kernels.triton.legal import Tile
from fused_resnet.numerics import DTYPES
from fused_resnet.problem import ConvProblem, GradOperands
from fused_resnet.testing import aot
from fused_resnet.testing.cases import conv
from tests.gate.workers import work

ARCHS = (80, 90)
KERNELS = {"dgrad": conv_dgrad, "wgrad": conv_wgrad}
# (problem, whether du is made from dz and u): layers of ResNet-50, ResNet-18 and ResNeXt, the stem, narrow channels,
# and offsets of 64 bits.
LAYERS = [
    (conv(64, 64, 56, n=64, prologue="relu"), True), (conv(128, 128, 56, n=64, stride=2, prologue="relu"), True),
    (conv(256, 64, 56, 1, n=64), True), (conv(64, 256, 56, 1, n=64, prologue="relu"), False),
    (conv(512, 512, 7, n=64, prologue="relu"), True), (conv(256, 512, 56, 1, n=64, stride=2), False),
    (conv(1024, 1024, 14, n=64, groups=32, prologue="relu"), True), (conv(3, 64, 224, 7, n=64, stride=2), False),
    (conv(48, 40, 56, n=64, dilation=2, prologue="relu6"), True), (conv(64, 64, 224, n=2048, stride=2), True),
]
# How many of them in each type.
COUNTS = {"bf16": len(LAYERS), "fp16": 1, "tf32": 3, "fp32": 2}
SWAPPED = [(Tile("dgrad", m, 64, 64, warps, stages, SWAP=True), LAYERS[3]) for m, warps, stages in ((128, 4, 3),
                                                                                                  (256, 8, 2))]
PARTS = (8, 5000)


def cases() -> list[tuple[int, ConvProblem, bool, Tile]]:
    """(architecture, problem, whether u is given, tile): the shipped tiles, and those that only tuning may choose."""
    found = []
    for arch in ARCHS:
        for dtype, count in COUNTS.items():
            for problem, through in LAYERS[:count]:
                problem = problem._replace(device="cuda", dtype=dtype)
                found += [(arch, problem, through, kernel.pick(problem, arch)) for kernel in KERNELS.values()]
    return found + [(90, problem._replace(device="cuda", dtype="bf16"), through, tile)
                    for tile, (problem, through) in SWAPPED]


def name(arch: int, problem: ConvProblem, through: bool, tile: Tile) -> str:
    return f"sm_{arch}-{problem.id}{'-u' if through else ''}-{tile}"


def operands(problem: ConvProblem, through: bool) -> GradOperands:
    """Operands without memory: the compiler asks for types only."""
    p, dtype = problem, DTYPES[problem.dtype]

    def image(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)

    def vectors(channels: int, *names: str) -> dict[str, torch.Tensor]:
        return {name: torch.empty(channels, device="meta") for name in names}

    found = {"dy": image(*p.output_shape), "weight": image(p.K, p.C // p.groups, p.R, p.S),
             "x": image(p.N, p.C, p.H, p.W)}
    if through:
        found |= vectors(p.K, "gamma", "mean", "var") | {"u": found["dy"], "means": torch.empty(2, p.K, device="meta")}
    if p.prologue:
        found |= vectors(p.C, "pre_gamma", "pre_beta", "pre_mean", "pre_var")
    else:
        found |= {"residual": found["x"], "mask": torch.empty(8, dtype=torch.uint8, device="meta")}
    return GradOperands(**found)


def report(arch: int, problem: ConvProblem, through: bool, tile: Tile) -> dict:
    """What the compiler made of the launch that `forward` would do."""
    given = operands(problem, through)
    if tile.kernel == "dgrad":
        sums = torch.empty(8, device="meta") if problem.prologue else None
        kernel, _, arguments = conv_dgrad.bind(problem, given, given.x, sums, tile)
    else:
        kernel, _, arguments = conv_wgrad.bind(problem, given, torch.empty(8, device="meta"), tile)
    return dataclasses.asdict(aot.check(kernel, arguments, arch, tile.options))


def sums(arch: int, count: int) -> dict:
    """The launch that adds up `count` parts."""
    parts = torch.empty(count, 2, 64, device="meta")
    kernel, _, arguments = grad.bind_sum(parts, parts[0])
    return dataclasses.asdict(aot.check(kernel, arguments, arch, grad.ADD_OPTIONS))


if __name__ == "__main__":
    work({name(*case): partial(report, *case) for case in cases()}
         | {f"sm_{arch}-sum{count}": partial(sums, arch, count) for arch in ARCHS for count in PARTS})
