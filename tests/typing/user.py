"""A program of a user with type checks on: `make lint` reads it under mypy's strict rules, a test runs it.

A `type: ignore` stands where mypy must complain: one that is not needed is an error, too.
"""

from typing import Any, assert_type

import torch
from torch import nn

import fused_resnet as fr
from fused_resnet.backends import Choice
from fused_resnet.fusing import Report, Row, Verification
from fused_resnet.graphs import Captured
from fused_resnet.models import CifarResNet, ResNet
from fused_resnet.numerics import Bound, Error
from fused_resnet.problem import ConvProblem


class Net(nn.Module):
    """A block of ours between plain modules."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = fr.nn.ConvBNAct2d(3, channels)
        self.block = fr.nn.BasicBlock(channels, channels)
        self.channels = channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.block(self.stem(x))
        return y


def inference(model: Net, x: torch.Tensor) -> torch.Tensor:
    fused = fr.fuse(model, filter=lambda name, module: name != "stem", memory_format=torch.channels_last, tune=False)
    assert_type(fused, Net)  # the class is kept
    assert_type(fused.channels, int)
    report = fr.report(fused)
    assert_type(report, Report)
    assert_type([row for row in report], list[Row])
    assert_type(report.fused, int)
    assert_type(report.to_json(), str)
    verification = fr.verify(model, fused, (x,))
    assert_type(verification, Verification)
    assert_type(verification.fused, Error)
    assert_type(verification.bound, Bound)
    assert_type(fr.refresh(fused), int)
    with fr.capture(fused, x, batches=(1, 2)) as captured:
        assert_type(captured, Captured)
        assert_type(captured.batches, tuple[int, ...])
        answer: Any = captured(x, copy=False)
    assert_type(fr.unfuse(fused), Net)
    assert isinstance(answer, torch.Tensor)
    return answer


def functions(x: torch.Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> torch.Tensor:
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None and var is not None
    with torch.no_grad(), fr.backends.use("reference"):
        y = fr.functional.conv_bn_act(x, conv.weight, norm.weight, norm.bias, mean, var, padding=1, activation="silu",
                                      prologue=fr.functional.Prologue(None, None, torch.zeros(3), torch.ones(3)))
        assert_type(y, torch.Tensor)
        return fr.functional.stem(y, y.new_ones(4, y.shape[1], 7, 7), None, None, torch.zeros(4), torch.ones(4))


def choices(problem: ConvProblem) -> str:
    assert_type(problem.flops, int)
    assert_type(fr.backends.available(), dict[str, str | None])
    assert_type(fr.backends.explain(problem), list[tuple[str, str | None]])
    choice = fr.backends.choose("conv_bn_act", problem)
    assert_type(choice, Choice)
    assert_type(choice.label, str)
    return choice.name


def mistakes() -> None:
    fr.fuse("resnet50")  # type: ignore[type-var]
    fr.fuse(nn.ReLU(), recompute="yes")  # type: ignore[arg-type]
    fr.fuse(nn.ReLU(), channels_last=True)  # type: ignore[call-arg]
    fr.models.cifar_resnet("20")  # type: ignore[arg-type]
    fr.nn.Bottleneck(64, 64, strides=2)  # type: ignore[call-arg]
    fr.capture(nn.ReLU(), torch.zeros(1), batches=8)  # type: ignore[arg-type]
    fr.functional.conv_bn_act(torch.zeros(1))  # type: ignore[call-arg]
    print(fr.no_such_name)  # type: ignore[attr-defined]


def main() -> str:
    assert_type(fr.__version__, str)
    assert_type(fr.models.resnet18(num_classes=3), ResNet)
    assert_type(fr.models.cifar_resnet(8), CifarResNet)
    x = torch.randn(2, 3, 16, 16)
    y = inference(Net(8).eval(), x)
    z = functions(x, nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    used = choices(ConvProblem("cpu", "fp32", 2, 16, 16, 8, 8, 3, 3))
    return f"{tuple(y.shape)} {tuple(z.shape)} {used}"


if __name__ == "__main__":
    print(main())
