"""The steps behind the last map on the CPU: the mean of each channel, and the classifier.

Both are small, and wait for memory rather than for arithmetic: at batch 1 PyTorch's take a twentieth of a ResNet-50.
The classifier is a convolution of maps of one pixel, with weights that are packed once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from fused_resnet import native
from fused_resnet.fusing.steps import Call, Slot
from fused_resnet.ops import conv_bn_act as family
from fused_resnet.problem import ConvOperands

DTYPES = (torch.float32, torch.bfloat16)
MOST = 64  # rows of a classifier: ours took 0.2 to 0.8 of PyTorch's time for 1 to 64 (2048 -> 1000, two Zen 5 cores)
_filters: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def better(call: Call) -> Call:
    """`call`, or what runs it faster where its operands allow."""
    if call.kind == "call_module" and type(call.target) is nn.Linear and not call.opaque and _reads_one(call):
        return Classifier(call)
    return Mean(call) if _is_mean(call) and _reads_one(call) else call


def _reads_one(call: Call) -> bool:
    return len(call.args) > 0 and type(call.args[0]) is Slot and not call.kwargs


def _is_mean(call: Call) -> bool:
    if call.kind == "call_module":
        return type(call.target) is nn.AdaptiveAvgPool2d and not call.opaque and len(call.args) == 1
    return call.target is F.adaptive_avg_pool2d and len(call.args) == 2


class Mean(Call):
    """A pool to one pixel."""

    def __init__(self, call: Call):
        self.__dict__.update(call.__dict__)

    def run(self, values: list, tidy: bool, finite: bool = True) -> Any:
        x = values[self.args[0].at]
        size = self.target.output_size if self.kind == "call_module" else self.args[1]
        if (size in (1, (1, 1), [1, 1]) and _plain(x) and x.dim() == 4 and 0 not in x.shape
                and x.is_contiguous(memory_format=torch.channels_last)):
            return torch.ops.fused_resnet._mean_pool.default(x)
        return super().run(values, tidy, finite)


class Classifier(Call):
    """A linear layer on few rows."""

    def __init__(self, call: Call):
        self.__dict__.update(call.__dict__)

    def run(self, values: list, tidy: bool, finite: bool = True) -> Any:
        x, weight, bias = values[self.args[0].at], self.target._parameters["weight"], self.target._parameters["bias"]
        if (not finite or not _plain(x) or x.dim() != 2 or not 0 < x.shape[0] <= MOST or not x.is_contiguous()
                or any(type(t) is not nn.Parameter or t.dtype is not x.dtype or not t.is_cpu
                       for t in (weight, bias) if t is not None)
                or weight.dim() != 2 or weight.shape[1] != x.shape[1] or 0 in weight.shape
                or bias is not None and bias.shape != weight.shape[:1]):
            return super().run(values, tidy, finite)
        o = ConvOperands(x[:, :, None, None], _filters_of(weight), bias)
        problem = family.problem_of(o.x, o.weight, bias, None, None, "identity", "", (1, 1), (0, 0), (1, 1), 1)
        return family.execute(problem, o, finite).flatten(1)


def _plain(x: Any) -> bool:
    return (isinstance(x, torch.Tensor) and x.is_cpu and x.dtype in DTYPES and native.missing("cpu") is None
            and not torch.is_autocast_enabled("cpu"))


def _filters_of(weight: torch.Tensor) -> torch.Tensor:
    """weight [K, C] as filters [K, C, 1, 1]: one tensor for a weight, because packed weights are known by theirs."""
    known = _filters.get(weight)
    if (known is None or known.data_ptr() != weight.data_ptr() or known.shape[:2] != weight.shape
            or known.stride()[:2] != weight.stride()):
        known = _filters[weight] = weight.detach()[:, :, None, None]
    return known
