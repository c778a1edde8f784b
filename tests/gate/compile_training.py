"""Compiles one share of the kernels of bn_act* and conv_bn_stats and prints a JSON line each: `SHARE OF`."""

import dataclasses
from functools import partial
from typing import Any

import torch

from fused_resnet.kernels.triton import bn_act, bn_act_grad, bn_act_sums, conv_bn_stats, strips
from fused_resnet.kernels.triton.legal import Tile
from fused_resnet.numerics import DTYPES
from fused_resnet.ops.bn_act import NormOperands
from fused_resnet.problem import ConvOperands, NormProblem
from fused_resnet.testing import aot
from fused_resnet.testing.cases import conv
from tests.gate.workers import work

ARCHS = (80, 90)
NORMS = [(64, "bf16", shortcut) for shortcut in ("", "tensor", "norm")] + [
    (256, "fp16", "norm"), (64, "fp32", "norm"), (24, "bf16", "norm"), (20, "bf16", "norm")]
PLAIN = {"norm": False, "activation": "identity"}
CONVS = [conv(64, 64, 56, n=64, **PLAIN), conv(64, 64, 56, n=64, prologue="relu", **PLAIN),
         conv(64, 256, 56, 1, n=64, prologue="relu", **PLAIN), conv(256, 128, 56, 1, n=64, **PLAIN),
         conv(512, 512, 7, n=64, stride=2, prologue="relu", **PLAIN),
         conv(128, 128, 56, n=32, groups=32, prologue="relu", bias=True, **PLAIN),
         conv(3, 64, 224, 7, n=32, stride=2, **PLAIN)]
TINY = torch.empty(1, device="meta")


def cases() -> list[tuple[str, int, Any, Any]]:
    """(kernel, architecture, problem, tile)."""
    found: list[tuple[str, int, Any, Any]] = []
    for arch in ARCHS:
        for c, dtype, shortcut in NORMS:
            problem = NormProblem("cuda", dtype, 64, 56, 56, c, "relu", shortcut)
            found += [(name, arch, problem, strips.pick(problem)) for name in ("forward", "sums", "grad")]
        found.append(("add", arch, NormProblem("cuda", "bf16", 64, 56, 56, 64), strips.pick(problem)))
        for dtype, problems in (("bf16", CONVS), ("fp16", CONVS[:5:4]), ("tf32", CONVS[1:4]), ("fp32", CONVS[2:4])):
            for one in problems:
                one = one._replace(device="cuda", dtype=dtype)
                found.append(("conv", arch, one, conv_bn_stats.pick(one, arch)))
        found += [("conv", arch, one, tile) for one, tile in descriptors() if arch == 90]
        found += [(name, arch, CONVS[1]._replace(device="cuda", dtype="bf16"), conv_bn_stats.pick(one, arch))
                  for name in ("fold", "join", "join last")]
    return found


def descriptors() -> list[tuple[Any, Tile]]:
    """Tiles of tensor descriptors that tuning may choose, with a problem each."""
    grid = [(CONVS[2], (128, 128, 64, 8, 3), False), (CONVS[2], (128, 64, 64, 4, 4), False),
            (CONVS[3], (256, 128, 64, 8, 3), True), (CONVS[3], (128, 128, 64, 8, 4), False)]
    return [(one._replace(device="cuda", dtype="bf16"), Tile("gemm1x1", *sizes, SWAP=swap))
            for one, sizes, swap in grid]


def name(kernel: str, arch: int, problem: Any, tile: Any) -> str:
    return f"{kernel} sm_{arch}-{problem.id}-{tile}"


def image(problem: Any, *shape: int) -> torch.Tensor:
    """A tensor without memory: the compiler asks for types only."""
    return torch.empty(shape, dtype=DTYPES[problem.dtype], device="meta", memory_format=torch.channels_last)


def of_norm(kernel: str, problem: NormProblem, tile: strips.Strip) -> tuple[Any, dict[str, Any], dict[str, int]]:
    """Kernel, arguments and options of a launch of bn_act*."""
    x, vector = image(problem, *problem.output_shape), torch.empty(problem.C, device="meta")
    mask, means = torch.empty(8, dtype=torch.uint8, device="meta"), torch.empty((2, problem.C), device="meta")
    other = [vector] * 4 if problem.shortcut == "norm" else [None] * 4
    o = NormOperands(x, *[vector] * 4, x if problem.shortcut else None, *other, dy=x, mask=mask, means=means,
                     r_means=means if problem.shortcut == "norm" else None)
    bound = {"forward": lambda: bn_act.bind(problem, o, x, mask, tile),
             "sums": lambda: bn_act_sums.bind(problem, o, vector, tile),
             "grad": lambda: bn_act_grad.bind(problem, o, x, x if problem.shortcut else None, tile),
             "add": lambda: bn_act_sums.bind_add(vector, vector)}[kernel]()
    return bound[0], bound[2], tile.options if kernel != "add" else bn_act_sums.ADD_OPTIONS


def of_conv(kernel: str, problem: Any, tile: Any) -> tuple[Any, dict[str, Any], dict[str, int]]:
    """Kernel, arguments and options of a launch of conv_bn_stats."""
    p, vectors = problem, [torch.empty(problem.C, device="meta")] * 4
    o = ConvOperands(image(p, p.N, p.C, p.H, p.W), image(p, p.K, p.C // p.groups, p.R, p.S),
                     image(p, p.K, 1, 1, 1) if p.bias else None, mean=TINY)
    if kernel == "conv":  # what the launch ahead has folded
        o = o._replace(pre_gamma=vectors[0], pre_beta=vectors[1]) if p.prologue else o
        bound = conv_bn_stats.bind(p, o, image(p, *p.output_shape), TINY, TINY, tile)
        return bound[0], bound[2], tile.options
    if kernel == "fold":
        o = o._replace(pre_gamma=TINY, pre_beta=TINY, pre_mean=TINY, pre_var=TINY)
        bound = conv_bn_stats.bind_fold(p, o, torch.empty((2, p.C), device="meta"))
    else:
        parts = torch.empty((100 if kernel == "join last" else 100_000, p.K), device="meta")
        bound = conv_bn_stats.bind_join(p, o, (parts, parts), tile.BLOCK_M, 1, (parts, parts))
    return bound[0], bound[2], conv_bn_stats.SMALL_OPTIONS


def report(kernel: str, arch: int, problem: Any, tile: Any) -> dict:
    """What the compiler made of one launch."""
    of = of_norm if isinstance(problem, NormProblem) else of_conv
    function, arguments, options = of(kernel, problem, tile)
    return dataclasses.asdict(aot.check(function, arguments, arch, options))


if __name__ == "__main__":
    work({name(*case): partial(report, *case) for case in cases()})
