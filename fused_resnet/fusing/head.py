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

from fused_resnet import native, tape
from fused_resnet.fusing.steps import Call, Slot
from fused_resnet.ops import conv_bn_act as family
from fused_resnet.problem import ConvOperands

DTYPES = (torch.float32, torch.bfloat16)
MOST = 64  # rows of a classifier: ours took 0.2 to 0.8 of PyTorch's time for 1 to 64 (2048 -> 1000, two Zen 5 cores)
ROWS = 1, -1  # flattened from and to: one row an image
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

    @property
    def size(self) -> Any:
        """What is asked of each map."""
        return self.target.output_size if self.kind == "call_module" else self.args[1]

    def takes(self, x: Any) -> bool:
        """Whether ours runs it."""
        return (self.size in (1, (1, 1), [1, 1]) and _plain(x) and x.dim() == 4 and 0 not in x.shape
                and x.is_contiguous(memory_format=torch.channels_last))

    def run(self, values: list, tidy: bool, finite: bool = True) -> Any:
        x = values[self.args[0].at]
        return tape.mean_pool(x) if self.takes(x) else super().run(values, tidy, finite)


class Classifier(Call):
    """A linear layer on few rows."""

    def __init__(self, call: Call):
        self.__dict__.update(call.__dict__)

    def tensors(self) -> tuple[Any, Any]:
        """Weight and bias, of which either may have been removed: what it reads besides values."""
        own = self.target._parameters
        return own["weight"], own["bias"]

    def takes(self, x: Any) -> bool:
        """Whether ours runs it on rows, or on maps of one pixel."""
        if not _plain(x) or not 0 < x.shape[0] <= MOST:
            return False
        weight, bias = self.tensors()
        return (all(type(t) is nn.Parameter and t.dtype is x.dtype and t.is_cpu
                    for t in (weight, bias) if t is not None)
                and weight.dim() == 2 and weight.shape[1] == x.shape[1] and 0 not in weight.shape
                and (bias is None or bias.shape == weight.shape[:1]))

    def of_maps(self, x: torch.Tensor, finite: bool) -> torch.Tensor:
        """[N, C, 1, 1] -> [N, K]."""
        weight, bias = self.tensors()
        o = ConvOperands(x, _filters_of(weight), bias)
        problem = family.problem_of(o.x, o.weight, bias, None, None, "identity", "", (1, 1), (0, 0), (1, 1), 1)
        return family.execute(problem, o, finite).flatten(1)

    def run(self, values: list, tidy: bool, finite: bool = True) -> Any:
        x = values[self.args[0].at]
        if not finite or not self.takes(x) or x.dim() != 2 or not x.is_contiguous():
            return super().run(values, tidy, finite)
        return self.of_maps(x[:, :, None, None], finite)


class Head(Classifier):
    """The mean, its flattening and the classifier as one step, which a tape can hold: nobody reads what is between."""

    taped = True

    def __init__(self, mean: Mean, flat: Call, classifier: Classifier):
        super().__init__(classifier)
        self.args, self.x, self.parts = mean.args, mean.args[0].at, (mean, flat, classifier)
        between = {mean.out, flat.out}
        self.frees = tuple({slot for part in self.parts for slot in part.frees} - between)

    def numbers(self) -> tuple:
        """What else it does depends on."""
        mean, flat, _ = self.parts
        weight, bias = self.tensors()
        return mean.size, _flattened(flat), id(weight), id(bias)

    def run(self, values: list, tidy: bool, finite: bool = True) -> Any:
        mean, flat, _ = self.parts
        x = values[self.x]
        if finite and mean.takes(x) and _flattened(flat) == ROWS and self.takes(x):
            return self.of_maps(tape.mean_pool(x), finite)
        for part in self.parts:
            out = values[part.out] = part.run(values, tidy, finite)
        values[mean.out] = values[flat.out] = None
        return out


def joined(steps: list) -> list:
    """Steps with every mean, flattening and classifier that follow one another as one; they know what they free."""
    out: list[Any] = []
    for step in steps:
        mean, flat = out[-2:] if len(out) > 1 else (None, None)
        if (type(step) is Classifier and type(mean) is Mean and type(flat) is Call and _flattened(flat) is not None
                and step.args[0].at == flat.out and flat.out in step.frees
                and flat.args[0].at == mean.out and mean.out in flat.frees):
            out[-2:] = [Head(mean, flat, step)]
        else:
            out.append(step)
    return out


def _flattened(call: Call) -> tuple | None:
    """From which to which dimension a call flattens; None where it does something else."""
    if call.kind == "call_module":
        of = call.target
        return (of.start_dim, of.end_dim) if type(of) is nn.Flatten and not call.opaque and _reads_one(call) else None
    if call.target not in (torch.flatten, "flatten") or not _reads_one(call):
        return None
    return *call.args[1:], *(0, -1)[len(call.args) - 1:]


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
