"""Residual blocks whose forwards launch once for each convolution.

Constructor arguments, attribute names and state-dict keys are those of torchvision (`BasicBlock`,
`Bottleneck`), of the common tutorials (`ResidualBlock`) and of kuangliu/pytorch-cifar
(`PreActBlock`). Each `forward` is that of the stock block, which compilers, exporters and TorchScript
read; called eagerly, `fused` carries it out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fused_resnet.nn.executor import hooked, is_norm, planned, run, state
from fused_resnet.nn.training import refuse_alone

Norm = Callable[..., nn.Module]
# Convolutions with their norms and activations, and the module of the shortcut (None: the input itself)
Branch = tuple[list[tuple[nn.Module, nn.Module, nn.Module | None]], nn.Module | None]


def conv3x3(in_planes: int, out_planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    """3x3 convolution that keeps the size at stride 1."""
    return nn.Conv2d(in_planes, out_planes, 3, stride, dilation, dilation, groups, bias=False)


def conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution."""
    return nn.Conv2d(in_planes, out_planes, 1, stride, bias=False)


def project(x: torch.Tensor, shortcut: nn.Module | None, group: Any = None) -> torch.Tensor:
    """What a block adds to its output: x itself, or the shortcut's; a convolution with its norm is one launch."""
    if shortcut is None:
        return x
    alone = not state.inside and group is None
    if alone or type(shortcut) is not nn.Sequential or len(shortcut) < 2 or hooked(shortcut):
        for norm in filter(is_norm, shortcut.modules()):
            refuse_alone(group, norm)
        state.finite = False  # what a foreign module answers may hold NaN
        return shortcut(x)
    *head, conv, norm = shortcut
    for module in head:
        state.finite = False
        x = module(x)
    return run(x, conv, norm, group=group)


class _Block(nn.Module):
    """What blocks share in training, where they are one residual branch (`nn.training`)."""

    # Save little for backward and make the rest again; False keeps all; None: the stock modules, or launches of ours.
    recompute: bool | None = None
    # torch.distributed group that the norms take the statistics of the batch over; None for this process alone.
    process_group: Any = None

    branch: Callable[[], Branch]  # what `forward` is made of, where it is such a branch

    def fused(self, x: torch.Tensor) -> torch.Tensor:
        """`forward` in launches."""
        (*inner, (conv, norm, activation)), shortcut = self.branch()
        group = self.process_group
        out = x
        for modules in inner:
            out = run(out, *modules, group=group)
        return run(out, conv, norm, activation, residual=lambda: project(x, shortcut, group), group=group)


class BasicBlock(_Block):
    """Two 3x3 convolutions: torchvision.models.resnet.BasicBlock.

    Source: He et al. 2015, arXiv:1512.03385, figure 5 left.

    Args:
        inplanes: channels of the input.
        planes: channels of the output.
        stride: of the first convolution.
        downsample: module for the shortcut where the input's shape is not the output's.
        groups, base_width, dilation: as for Bottleneck; only 1, 64 and 1 are supported.
        norm_layer: makes a norm from its number of channels; None means torch.nn.BatchNorm2d.

    Raises:
        ValueError: groups or base_width.
        NotImplementedError: dilation.
    """

    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None,
                 groups: int = 1, base_width: int = 64, dilation: int = 1, norm_layer: Norm | None = None):
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        if groups != 1 or base_width != 64:
            raise ValueError("BasicBlock only supports groups=1 and base_width=64")
        if dilation > 1:
            raise NotImplementedError("Dilation > 1 not supported in BasicBlock")
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def branch(self) -> Branch:
        return [(self.conv1, self.bn1, self.relu), (self.conv2, self.bn2, self.relu)], self.downsample

    @planned
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, inplanes, H, W] -> [N, planes, P, Q], with the strides that the stock modules give."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(_Block):
    """1x1 reduce, 3x3, 1x1 expand: torchvision.models.resnet.Bottleneck (v1.5: the 3x3 carries the stride).

    Source: He et al. 2015, arXiv:1512.03385, figure 5 right; groups as in Xie et al. 2017,
    arXiv:1611.05431; wide as in Zagoruyko and Komodakis 2016, arXiv:1605.07146.

    Args:
        inplanes: channels of the input.
        planes: a quarter of the output's channels.
        stride: of the 3x3 convolution.
        downsample: module for the shortcut where the input's shape is not the output's.
        groups: of the 3x3 convolution.
        base_width: channels of one group for each 64 planes.
        dilation: of the 3x3 convolution.
        norm_layer: makes a norm from its number of channels; None means torch.nn.BatchNorm2d.
    """

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None,
                 groups: int = 1, base_width: int = 64, dilation: int = 1, norm_layer: Norm | None = None):
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = conv1x1(inplanes, width)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def branch(self) -> Branch:
        return [(self.conv1, self.bn1, self.relu), (self.conv2, self.bn2, self.relu),
                (self.conv3, self.bn3, self.relu)], self.downsample

    @planned
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, inplanes, H, W] -> [N, 4 * planes, P, Q], with the strides that the stock modules give."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResidualBlock(_Block):
    """The two-convolution block of most tutorials, with its own shortcut.

    Loads the state dict of blocks that own a `shortcut` and of those that are given a `downsample`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: of the first convolution.
        downsample: module for the shortcut. None makes `shortcut`: empty where the shapes agree,
            else a 1x1 convolution and a batch norm.
    """

    expansion = 1

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, downsample: nn.Module | None = None):
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = downsample
        self.shortcut = nn.Sequential()
        if downsample is None and (stride != 1 or in_channels != out_channels):
            self.shortcut = nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))

    def branch(self) -> Branch:
        return [(self.conv1, self.bn1, self.relu), (self.conv2, self.bn2, self.relu)], (
            self.shortcut if self.downsample is None else self.downsample)

    @planned
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, P, Q], with the strides that the stock modules give."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x) if self.downsample is None else self.downsample(x)
        return self.relu(out)


class PreActBlock(_Block):
    """Norm and ReLU in front of each convolution, nothing after the add.

    Source: He et al. 2016, arXiv:1603.05027, figure 4e, with the shortcut of kuangliu/pytorch-cifar:
    a projection reads the first norm and ReLU, an identity the raw input.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: of the first convolution.
    """

    expansion = 1

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(conv1x1(in_channels, out_channels, stride))

    @planned
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, P, Q], with the strides that the stock modules give."""
        out = self.relu(self.bn1(x))
        identity = self.shortcut(out) if len(self.shortcut) else x
        out = self.conv2(self.relu(self.bn2(self.conv1(out))))
        out += identity
        return out

    def fused(self, x: torch.Tensor) -> torch.Tensor:
        """`forward` in launches: the first norm is the prologue of the first, unless the shortcut reads it, too."""
        refuse_alone(self.process_group, self.bn1)
        if len(self.shortcut):
            out = self.relu(self.bn1(x))
            identity = self.shortcut(out)
            out = run(out, self.conv1, self.bn2, self.relu, group=self.process_group)
        else:
            identity = x
            out = run(x, self.conv1, self.bn2, self.relu, prologue=(self.bn1, self.relu), group=self.process_group)
        return run(out, self.conv2, residual=identity)
