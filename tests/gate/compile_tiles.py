"""Compiles one share of the shipped tiles and prints one JSON line each: `compile_tiles.py SHARE OF`.

Runs in its own process, because Triton either compiles or interprets for the life of a process.
"""

import dataclasses
import itertools
from functools import partial

import torch

from fused_resnet.kernels.triton import conv_bn_act, stem, tiles
from fused_resnet.kernels.triton.legal import TMA, Tile, legal
from fused_resnet.numerics import DTYPES
from fused_resnet.ops.stem import StemProblem
from fused_resnet.problem import ConvOperands, ConvProblem
from fused_resnet.testing import aot
from fused_resnet.testing.cases import LAYERS, conv
from tests.gate.workers import work

ARCHS = (80, 90)
# Problems that reach each row of the table: the plain one, and what costs registers beside it.
REPRESENTATIVE = {
    "grouped": [conv(128, 128, 56, n=32, groups=32), conv(256, 256, 56, n=32, groups=32, stride=2),
                conv(512, 512, 14, n=32, groups=32, residual=True), conv(64, 64, 14, groups=16, prologue="relu"),
                conv(128, 128, 112, n=2048, groups=32)],
    "thin": [conv(48, 48, 56, n=32, groups=4), conv(80, 80, 56, n=32, groups=5, stride=2),
             conv(3, 16, 32, n=32), conv(16, 16, 32, n=32, residual=True), conv(64, 10, 8, 1, bias=True, norm=False)],
    "slim": [conv(1024, 1024, 14, n=32, groups=32), conv(256, 32, 28, 1, n=32, activation="hardswish"),
             conv(32, 32, 16, n=32, residual=True), conv(24, 24, 5, 1, prologue="silu"),
             conv(3, 32, 224, n=8, stride=2)],
    "flat": [conv(3, 64, 224, 7, n=32, stride=2), conv(12, 70, 56, n=32, residual=True),
             conv(4, 96, 56, 5, prologue="relu"), conv(1, 64, 28, n=32, activation="silu", bias=True)],
    "narrow": [conv(64, 64, 56, n=64), conv(64, 64, 56, n=64, residual=True, bias=True, activation="hardswish"),
               conv(256, 64, 56, 1, n=64), conv(128, 128, 28, n=64, residual=True),
               conv(48, 40, 56, n=64, dilation=2, residual=True), conv(64, 64, 56, n=64, stride=2),
               conv(64, 64, 224, n=1024, residual=True)],
    "wide": [conv(128, 128, 56, n=64, stride=2), conv(512, 512, 14, n=128), conv(200, 136, 56, (1, 7), n=64),
             conv(96, 160, 56, n=64, activation="hardswish"),
             conv(256, 256, 28, n=64, stride=2, bias=True, activation="silu")],
    "pointwise": [conv(64, 256, 56, 1, n=64, residual=True),
                  conv(256, 512, 56, 1, n=64, stride=2, activation="identity"),
                  conv(512, 2048, 14, 1, n=64, residual=True, bias=True, activation="silu"),
                  conv(1024, 256, 14, 1, n=64), conv(72, 200, 28, 1, n=64)],
    "prologue": [conv(64, 64, 56, n=64, prologue="relu"), conv(256, 256, 28, n=64, prologue="relu", residual=True),
                 conv(256, 1024, 28, 1, n=64, prologue="silu", residual=True),
                 conv(48, 96, 56, n=64, stride=2, prologue="hardswish", activation="hardswish")],
    "few": [conv(512, 512, 7, n=1, residual=True), conv(512, 2048, 7, 1, n=1, residual=True),
            conv(256, 256, 14, n=1, stride=2), conv(2048, 512, 7, 1, n=1), conv(130, 70, 3, 1, n=1),
            conv(128, 128, 8, n=1, prologue="relu")],
    "depthwise": [conv(96, 96, 56, n=32, groups=96, activation="relu6"), conv(32, 64, 28, 5, n=8, groups=32, stride=2),
                  conv(64, 64, 56, 7, n=32, groups=64, residual=True, prologue="relu"),
                  conv(96, 96, 224, n=512, groups=96)],
}


POINTWISE = [conv(64, 256, 56, 1, n=64, residual=True), conv(1024, 256, 14, 1, n=64),
             conv(72, 200, 28, 1, n=64, bias=True, activation="hardswish")]
BOXES = [conv(64, 64, 56, n=64, residual=True), conv(128, 128, 56, n=64, stride=2), conv(512, 512, 7, n=256),
         conv(256, 512, 56, 1, n=64, stride=2, activation="identity"), conv(64, 192, 28, (1, 7), n=64, dilation=2)]
# Tiles that tuning may choose and the heuristic does not: a legal one of each extreme.
DESCRIPTORS = [(Tile("gemm1x1", 128, 128, 64, 8, 3), POINTWISE), (Tile("gemm1x1", 128, 64, 64, 4, 4), POINTWISE),
               (Tile("gemm1x1", 128, 256, 64, 8, 3), POINTWISE), (Tile("gemm1x1", 256, 128, 64, 8, 3), POINTWISE),
               (Tile("box", 128, 128, 64, 8, 4), BOXES), (Tile("box", 128, 64, 64, 4, 4), BOXES),
               (Tile("box", 256, 64, 64, 8, 3), BOXES), (Tile("box", 128, 256, 64, 8, 3), BOXES),
               (Tile("box", 256, 128, 64, 8, 3), BOXES)]


def cases() -> list[tuple[str, int, ConvProblem, Tile]]:
    """(size bucket, architecture, problem, tile): every row of the table, every layer of two networks in bf16, TMA."""
    found = [(bucket, arch, problem._replace(device="cuda", dtype=dtype))
             for arch in ARCHS for dtype in ("bf16", "tf32", "fp32")
             for bucket, problems in REPRESENTATIVE.items() for problem in problems
             if (bucket, dtype) != ("grouped", "fp32") or problem.C // problem.groups < 16]
    found += [(bucket, arch, problems[0]._replace(device="cuda", dtype="fp16"))
              for arch in ARCHS for bucket, problems in REPRESENTATIVE.items()]
    layers = dict.fromkeys(problem._replace(device="cuda", dtype="bf16", N=64)
                           for name in ("resnet18", "resnet50") for problem, _ in LAYERS[name])
    found += [(tiles.bucket(problem, arch), arch, problem) for arch in ARCHS for problem in layers]
    return [(*case, tiles.pick(case[2], case[1])) for case in dict.fromkeys(found)] + descriptors()


def descriptors() -> list[tuple[str, int, ConvProblem, Tile]]:
    """The tiles that load through tensor descriptors, with the problems that each is legal for."""
    found = []
    for (tile, problems), dtype in itertools.product(DESCRIPTORS, ("bf16", "tf32")):
        tile = tile if dtype == "bf16" else dataclasses.replace(tile, BLOCK_K=32)
        for problem in problems:
            problem = problem._replace(device="cuda", dtype=dtype)
            if legal(tile, problem, 90) is None:
                found.append((tile.kernel, 90, problem, tile))
    return found


HARD = {"residual": True, "bias": True, "activation": "hardswish"}
# What costs most registers in each kind: tuning may choose any candidate, and one of each form is compiled.
TUNED = [conv(256, 256, 28, n=64, **HARD), conv(256, 256, 28, n=64, prologue="relu", residual=True),
         conv(256, 256, 28, 1, n=64, **HARD), conv(256, 256, 28, 1, n=64, prologue="silu", residual=True),
         conv(1024, 1024, 14, n=64, groups=32, **HARD), conv(512, 512, 7, n=1, **HARD),
         conv(512, 512, 7, 1, n=1, **HARD)]


def candidates() -> list[tuple[str, int, ConvProblem, Tile]]:
    """Of the candidates one of each form, with most stages: kernel, blocks, warps, SWAP, whether split or prologued."""
    found = {}
    for arch, dtype, problem in itertools.product(ARCHS, ("bf16", "tf32"), TUNED):
        problem = problem._replace(device="cuda", dtype=dtype)
        for tile in tiles.candidates(problem, arch)[1:]:
            form = dataclasses.replace(tile, num_stages=0, SPLIT_K=min(tile.SPLIT_K, 2))
            if tile.kernel in TMA or (tile.kernel == "gemm" and dtype == "bf16" and TUNED.index(
                    problem._replace(device="cpu", dtype="fp32")) < 2):
                found[arch, dtype, bool(problem.prologue), problem.R, form] = tile.kernel, arch, problem, tile
    return list(found.values())


def stems() -> list[tuple[int, ConvProblem, Tile]]:
    """(architecture, problem, tile): every shipped tile of the family `stem`, what costs registers beside it, and

    of the tiles that tuning may choose those with most stages.
    """
    shapes = [conv(3, 64, 224, 7, n=64, stride=2), conv(3, 32, 64, 3, n=64, bias=True, activation="silu")]
    problems = [StemProblem(*shape)._replace(device="cuda", dtype=dtype) for shape in shapes
                for dtype in ("bf16", "fp16", "tf32", "fp32")]
    found = [(arch, problem, stem.pick(problem, arch)) for arch in (80, 86, 90) for problem in problems]
    found += [(arch, problem, tile) for arch, problem in itertools.product(ARCHS, problems[:4])
              if problem.dtype != "fp16" for tile in stem.candidates(problem, arch) if tile.num_stages == 3]
    return list(dict.fromkeys(found))


def name(arch: int, problem: ConvProblem, tile: Tile) -> str:
    return f"sm_{arch}-{problem.id}-{tile}"


def operands(problem: ConvProblem) -> ConvOperands:
    """Operands without memory: the compiler asks for types only."""
    p, dtype = problem, DTYPES[problem.dtype]

    def image(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)

    def norm(channels: int) -> list[torch.Tensor]:
        return [torch.empty(channels, device="meta")] * 4

    return ConvOperands(
        image(p.N, p.C, p.H, p.W), image(p.K, p.C // p.groups, p.R, p.S),
        torch.empty(p.K, dtype=dtype, device="meta") if p.bias else None, *(norm(p.K) if p.norm else [None] * 4),
        image(*p.output_shape) if p.residual else None, *(norm(p.C) if p.prologue else [None] * 4))


def report(arch: int, problem: ConvProblem, tile: Tile) -> dict:
    """What the compiler made of the launch that `forward` would do; of two launches, the more of each."""
    given = operands(problem)
    y = torch.empty(problem.output_shape, dtype=given.x.dtype, device="meta", memory_format=torch.channels_last)
    if tile.kernel == "stem":
        second, _, image = stem.bind_pack(problem, given)
        kernel, _, arguments = stem.bind(problem, given, image["y"], y, tile)
        rest = [(second, image, stem.PACK_OPTIONS)]
    else:
        sums = conv_bn_act.partial_sums(problem, y, tile)
        kernel, _, arguments = conv_bn_act.bind(problem, given, y, sums, tile)
        rest = []
        if sums is not None:
            second, _, finish = conv_bn_act.bind_finish(problem, given, y, sums, tile)
            rest = [(second, finish, conv_bn_act.FINISH_OPTIONS)]
    found = dataclasses.asdict(aot.check(kernel, arguments, arch, tile.options))
    for second, arguments, options in rest:
        other = aot.check(second, arguments, arch, options)
        found |= {field: max(value, getattr(other, field)) for field, value in found.items() if field != "count"}
    return found


if __name__ == "__main__":
    work({name(*case): partial(report, *case) for case in [case[1:] for case in cases() + candidates()] + stems()})
