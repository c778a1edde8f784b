"""Parts: a module seen as the convolution or the batch norm that its forward contains.

Some classes do more than their base: a norm with its activation, a convolution with its norm. Where a trace has shown
that such a forward begins with the plain operation on the module's own tensors, the part stands for that operation. It
shares the module's whole state, so nothing goes stale; calling it runs the operation alone, without hooks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class _Part:
    """What parts share. `whole` is the module; the part's attributes are its attributes."""

    whole: nn.Module

    def __init__(self, whole: nn.Module):
        object.__setattr__(self, "__dict__", whole.__dict__)
        object.__setattr__(self, "whole", whole)

    def __reduce_ex__(self, protocol: Any) -> tuple:  # a copy is a part of the copied module
        return type(self), (self.whole,)


class ConvPart(_Part, nn.Conv2d):
    """The convolution that a module's forward does with its own weight, bias, stride, padding, dilation, groups."""

    __slots__ = ("whole",)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class NormPart(_Part, nn.BatchNorm2d):
    """The batch norm that a module's forward does as `torch.nn.BatchNorm2d` does it."""

    __slots__ = ("whole",)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return nn.BatchNorm2d.forward(self, x)

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() != 4:
            type(self.whole).forward(self.whole, input)  # which has its own words for it


class FrozenPart(_Part, nn.Module):
    """The frozen norm that a module's forward spells out: x times a scale plus a shift, both of its own buffers."""

    __slots__ = ("eps", "whole")

    def __init__(self, whole: nn.Module, eps: float):
        super().__init__(whole)
        object.__setattr__(self, "eps", eps)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return FrozenPart, (self.whole, self.eps)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        names = ("weight", "bias", "running_mean", "running_var")
        weight, bias, mean, var = (getattr(self, name).reshape(1, -1, 1, 1) for name in names)
        scale = weight * (var + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)
