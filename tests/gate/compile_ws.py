"""Compiles one share of the tiles "ws" and prints one JSON line each: `compile_ws.py SHARE OF`.

Runs in its own process, because Triton either compiles or interprets for the life of a process.
"""

import dataclasses
from functools import partial

import torch

from fused_resnet.kernels.triton import conv_bn_act_ws, legal, tiles
from fused_resnet.problem import ConvProblem
from fused_resnet.testing import aot
from fused_resnet.testing.cases import conv
from tests.gate import compile_tiles
from tests.gate.workers import work

# One layer of each kind in ResNet-50 and ResNet-18 at batch 64, whose candidates hold every shape of tile, and what
# costs registers beside it.
LAYERS = [conv(64, 64, 56, n=64), conv(64, 64, 56, n=64, residual=True), conv(128, 128, 56, n=64, stride=2),
          conv(64, 256, 56, 1, n=64, residual=True), conv(256, 512, 56, 1, n=64, stride=2, activation="identity")]
COSTLY = [conv(512, 512, 7, n=64, bias=True, residual=True, activation="silu"),
          conv(256, 1024, 14, 1, n=64, bias=True, activation="hardswish")]


def cases() -> list[tuple[ConvProblem, legal.Tile]]:
    """(problem, tile): every candidate of the layers in bf16; of what costs registers in all three dtypes."""
    problems = [problem._replace(dtype="bf16") for problem in LAYERS]
    problems += [COSTLY[0]._replace(dtype="bf16"), COSTLY[1]._replace(dtype="fp16"), COSTLY[0]._replace(dtype="tf32")]
    problems = [problem._replace(device="cuda") for problem in problems]
    return [(problem, tile) for problem in problems for tile in tiles.candidates(problem, 90)
            if tile.kernel == legal.WS]


def name(problem: ConvProblem, tile: legal.Tile) -> str:
    return f"{problem.id}-{tile}"


def report(problem: ConvProblem, tile: legal.Tile) -> dict:
    """What the compiler made of the launch that `forward` would do on a GPU."""
    given = compile_tiles.operands(problem)
    y = torch.empty(problem.output_shape, dtype=given.x.dtype, device="meta", memory_format=torch.channels_last)
    kernel, _, arguments = conv_bn_act_ws.bind(problem, given, y, tile)
    return dataclasses.asdict(aot.check(kernel, arguments, 90, tile.options))


if __name__ == "__main__":
    work({name(*case): partial(report, *case) for case in cases()})
