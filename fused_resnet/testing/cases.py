"""The shape catalogue: every test, gate and benchmark takes its problems from here.

Problems are fp32 on the CPU; use `problem._replace(dtype=..., device=..., N=...)` for others.
"""

from __future__ import annotations

from fused_resnet.ops.stem import StemProblem
from fused_resnet.problem import ACTIVATIONS, ConvProblem, Int8Problem


def conv(c: int, k: int, size: int | tuple[int, int], kernel: int | tuple[int, int] = 3, *, n: int = 2,
         stride: int | tuple[int, int] = 1, padding: int | tuple[int, int] | None = None,
         dilation: int | tuple[int, int] = 1, **flags) -> ConvProblem:
    """A problem with torch.nn.Conv2d's way of giving sizes; padding defaults to "same" at stride 1."""

    def pair(value: int | tuple[int, int]) -> tuple[int, int]:
        return (value, value) if isinstance(value, int) else value

    (h, w), (r, s), d = pair(size), pair(kernel), pair(dilation)
    pad = (d[0] * (r - 1) // 2, d[1] * (s - 1) // 2) if padding is None else pair(padding)
    return ConvProblem("cpu", "fp32", n, h, w, c, k, r, s, pair(stride), pad, d, **flags)


# One of each feature, small enough for Triton's interpreter.
TINY = [
    conv(16, 32, 6), conv(16, 32, 6, 1), conv(16, 16, 6, residual=True), conv(32, 32, 7, stride=2),
    conv(32, 64, 6, 1, stride=2, activation="identity"), conv(3, 16, 9, 7, stride=2, n=1),
    conv(16, 32, 5, 1, residual=True, bias=True), conv(16, 16, 5, norm=False, bias=True),
    conv(16, 16, 5, norm=False, activation="identity"), conv(32, 32, 6, groups=4), conv(32, 32, 6, groups=32),
    conv(16, 16, 8, dilation=2), conv(16, 16, 5, prologue="relu"), conv(16, 16, 5, prologue="identity", residual=True),
    *[conv(16, 16, 4, 1, activation=a, residual=r) for a in ACTIVATIONS for r in (False, True)],
]
# Nothing a multiple of anything; borders, strides that leave a remainder, one pixel, one channel, empty batch.
RAGGED = [
    conv(1, 1, 1, 1, n=1), conv(1, 5, 3), conv(3, 24, 7), conv(24, 48, (5, 9)), conv(48, 24, (1, 7), (1, 3)),
    conv(17, 19, 5, residual=True), conv(20, 36, (7, 4), (3, 5), stride=(2, 1)), conv(8, 8, 1, 3),
    conv(16, 8, 5, 2, padding=0), conv(12, 12, 6, 3, stride=3, padding=2), conv(8, 16, 9, 5, padding=(3, 1)),
    conv(10, 15, 5, groups=5), conv(6, 12, 5, groups=6), conv(48, 48, 5, groups=3, dilation=(1, 2)),
    conv(24, 24, 5, 1, prologue="silu", norm=False, activation="identity"), conv(5, 7, 6, 3, prologue="relu", stride=2),
    conv(7, 7, 3, 3, prologue="hardswish", groups=7), conv(64, 64, 2, 3, n=1), conv(16, 16, 4, 4, stride=4, padding=0),
    conv(16, 32, 4, n=0), conv(130, 70, 3, 1, n=1),
]
CATALOGUE = TINY + RAGGED
# Convolutions with the max-pool behind them: odd sizes, one pixel, channels from 1 to 4, every activation.
STEMS = [StemProblem(*problem) for problem in (
    conv(3, 16, (18, 15), 7, stride=2), conv(3, 70, 9, 7, n=3, stride=2, bias=True), conv(3, 8, (40, 11), 7, stride=2),
    conv(4, 8, (7, 30), (5, 3), stride=(1, 2), padding=(0, 3)), conv(1, 24, 8), conv(3, 8, 1, 7, stride=2),
    conv(2, 16, 6, 1, n=1), conv(3, 16, 12, 8, stride=(3, 4), padding=2), conv(3, 8, 9, 7, n=0, stride=2),
    *[conv(3, 8, 9, 7, n=1, stride=2, activation=a) for a in ACTIVATIONS])]
# Of 8-bit values: every shape of the catalogue that such launches take, with every kind of residual and result.
INT8 = [Int8Problem(problem._replace(dtype="int8", residual=bool(residual)), residual, out)
        for problem in dict.fromkeys(
            p._replace(residual=False) for p in CATALOGUE
            if p.groups == 1 and not p.prologue and p.activation in ("identity", "relu", "relu6"))
        for residual in ("", "uint8", "fp32") for out in ("uint8", "fp32")]


def resnet_layers(name: str, n: int = 1, size: int = 224) -> list[tuple[ConvProblem, int]]:
    """The distinct fused launches of a torchvision ResNet with how often each occurs.

    Args:
        name: resnet18 ... resnet152, resnext50_32x4d, resnext101_32x8d, wide_resnet50_2 or wide_resnet101_2.
        n: batch.
        size: edge of the input image in pixels.
    """
    depths = {"18": (2, 2, 2, 2), "34": (3, 4, 6, 3), "50": (3, 4, 6, 3), "101": (3, 4, 23, 3), "152": (3, 8, 36, 3)}
    kind, _, rest = name.partition("resne")
    number = "".join(ch for ch in rest.split("_")[0] if ch.isdigit())
    if number not in depths or kind not in ("", "wide_"):
        raise ValueError(f"unknown network {name!r}")
    groups, base = {"resnext50_32x4d": (32, 4), "resnext101_32x8d": (32, 8)}.get(name, (1, 64))
    base *= 2 if kind else 1
    counts: dict[ConvProblem, int] = {}

    def add(problem: ConvProblem) -> int:
        counts[problem] = counts.get(problem, 0) + 1
        return problem.P

    edge = (add(conv(3, 64, size, 7, n=n, stride=2)) - 1) // 2 + 1
    c = 64
    for stage, depth in enumerate(depths[number]):
        planes = 64 * 2**stage
        for block in range(depth):
            stride = 2 if stage and not block else 1
            out = planes if number in ("18", "34") else 4 * planes
            if stride > 1 or c != out:
                add(conv(c, out, edge, 1, n=n, stride=stride, activation="identity"))
            if out == planes:
                half = add(conv(c, planes, edge, n=n, stride=stride))
                add(conv(planes, planes, half, n=n, residual=True))
            else:
                width = planes * base // 64 * groups
                add(conv(c, width, edge, 1, n=n))
                half = add(conv(width, width, edge, n=n, stride=stride, groups=groups))
                add(conv(width, out, half, 1, n=n, residual=True))
            c, edge = out, half
    return list(counts.items())


NETWORKS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
            "wide_resnet50_2", "wide_resnet101_2")
LAYERS = {name: resnet_layers(name) for name in NETWORKS}
