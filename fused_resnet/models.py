"""ResNets whose forwards launch once for each convolution.

`ResNet` and its builders have torchvision's constructor arguments, attribute names and state-dict
keys: its checkpoints load with strict=True. `cifar_resnet` builds the small networks of the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fused_resnet.nn.blocks import BasicBlock, Bottleneck, Norm, conv1x1
from fused_resnet.nn.executor import planned, run

Block = type[BasicBlock] | type[Bottleneck]


class _Trunk(nn.Module):
    """What both families share: the stem, stages of blocks, initialisation."""

    # As of the blocks: torch.distributed group that the stem's norm takes the statistics of the batch over.
    process_group: Any = None

    def __init__(self, inplanes: int, stem: nn.Conv2d, groups: int = 1, width_per_group: int = 64,
                 norm_layer: Norm | None = None):
        super().__init__()
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self.inplanes = inplanes
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group
        self.conv1 = stem
        self.bn1 = self._norm_layer(inplanes)
        self.relu = nn.ReLU(inplace=True)

    def _make_layer(self, block: Block, planes: int, blocks: int, stride: int = 1,
                    dilate: bool = False) -> nn.Sequential:
        """One stage. `dilate` trades its stride for dilation, which its first block does not have yet."""
        downsample, first_dilation = None, self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        out = planes * block.expansion
        if stride != 1 or self.inplanes != out:
            downsample = nn.Sequential(conv1x1(self.inplanes, out, stride), self._norm_layer(out))
        layers = [block(self.inplanes, planes, stride, downsample, self.groups, self.base_width, first_dilation,
                        self._norm_layer)]
        self.inplanes = out
        for _ in range(1, blocks):
            layers.append(block(out, planes, groups=self.groups, base_width=self.base_width, dilation=self.dilation,
                                norm_layer=self._norm_layer))
        return nn.Sequential(*layers)

    def _initialise(self, zero_init_residual: bool) -> None:
        """He et al. 2015, arXiv:1502.01852; with zero_init_residual every block starts as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
                nn.init.constant_(module.weight, 1)
                nn.init.constant_(module.bias, 0)
        for block in self.modules() if zero_init_residual else ():
            if isinstance(block, BasicBlock | Bottleneck):
                last = block.bn3 if isinstance(block, Bottleneck) else block.bn2
                if last.weight is not None:
                    nn.init.constant_(last.weight, 0)  # type: ignore[arg-type]


class ResNet(_Trunk):
    """torchvision.models.ResNet.

    Source: He et al. 2015, arXiv:1512.03385, table 1, with the stride on the 3x3 convolution (v1.5).

    Args:
        block: BasicBlock or Bottleneck.
        layers: blocks in each of the four stages.
        num_classes: width of the classifier.
        zero_init_residual: start every block's last norm at 0 (arXiv:1706.02677).
        groups: of the 3x3 convolutions (ResNeXt).
        width_per_group: channels of one group for each 64 planes.
        replace_stride_with_dilation: three flags, one for each of the stages 2 to 4.
        norm_layer: makes a norm from its number of channels; None means torch.nn.BatchNorm2d.

    Raises:
        ValueError: replace_stride_with_dilation without three elements, or groups and widths that the block refuses.
    """

    def __init__(self, block: Block, layers: Sequence[int], num_classes: int = 1000, zero_init_residual: bool = False,
                 groups: int = 1, width_per_group: int = 64,
                 replace_stride_with_dilation: Sequence[bool] | None = None, norm_layer: Norm | None = None):
        dilate = (False, False, False) if replace_stride_with_dilation is None else replace_stride_with_dilation
        if len(dilate) != 3:
            raise ValueError(f"replace_stride_with_dilation should be None or a 3-element tuple, got {dilate}")
        super().__init__(64, nn.Conv2d(3, 64, 7, 2, 3, bias=False), groups, width_per_group, norm_layer)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], 2, dilate[0])
        self.layer3 = self._make_layer(block, 256, layers[2], 2, dilate[1])
        self.layer4 = self._make_layer(block, 512, layers[3], 2, dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        self._initialise(zero_init_residual)

    @planned(convert=False)
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] images -> [N, num_classes] logits."""
        return self.rest(self.maxpool(self.relu(self.bn1(self.conv1(x)))))

    def fused(self, x: torch.Tensor) -> torch.Tensor:
        """`forward` with the stem in one launch."""
        return self.rest(run(x, self.conv1, self.bn1, self.relu, pool=self.maxpool, group=self.process_group))

    def rest(self, x: torch.Tensor) -> torch.Tensor:
        """What follows the stem."""
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        x = self.avgpool(x)
        return self.fc(torch.flatten(x, 1))


class CifarResNet(_Trunk):
    """The thin ResNet for 32x32 images: a 3x3 stem and three stages of 16, 32 and 64 planes.

    Source: He et al. 2015, arXiv:1512.03385, section 4.2. Where the paper pads channels with zeros
    (option A), a 1x1 convolution and a norm project (option B): two small launches in the whole
    network, and nothing that a kernel would have to special-case.

    Args:
        block: BasicBlock or Bottleneck.
        blocks: in each stage.
        num_classes: width of the classifier.
        in_channels: of the images.
        zero_init_residual: start every block's last norm at 0.
        norm_layer: makes a norm from its number of channels; None means torch.nn.BatchNorm2d.
    """

    def __init__(self, block: Block, blocks: int, num_classes: int = 10, in_channels: int = 3,
                 zero_init_residual: bool = False, norm_layer: Norm | None = None):
        super().__init__(16, nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False), norm_layer=norm_layer)
        self.layer1 = self._make_layer(block, 16, blocks)
        self.layer2 = self._make_layer(block, 32, blocks, 2)
        self.layer3 = self._make_layer(block, 64, blocks, 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(64 * block.expansion, num_classes)
        self._initialise(zero_init_residual)

    @planned
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, in_channels, H, W] images -> [N, num_classes] logits."""
        return self.rest(self.relu(self.bn1(self.conv1(x))))

    def fused(self, x: torch.Tensor) -> torch.Tensor:
        """`forward` with the stem in one launch."""
        return self.rest(run(x, self.conv1, self.bn1, self.relu, group=self.process_group))

    def rest(self, x: torch.Tensor) -> torch.Tensor:
        """What follows the stem."""
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.avgpool(x)
        return self.fc(torch.flatten(x, 1))


def cifar_resnet(depth: int, num_classes: int = 10, in_channels: int = 3, block: Block = BasicBlock,
                 **options: Any) -> CifarResNet:
    """A ResNet for CIFAR of any depth: 20, 32, 44, 56, 110 and 1202 in the paper.

    Args:
        depth: layers with weights: 6n + 2 with BasicBlock, 9n + 2 with Bottleneck.
        num_classes: width of the classifier.
        in_channels: of the images.
        block: BasicBlock or Bottleneck.
        **options: of CifarResNet.

    Raises:
        ValueError: a depth that no whole number of blocks gives.
    """
    step = 9 if issubclass(block, Bottleneck) else 6
    blocks, rest = divmod(depth - 2, step)
    if blocks < 1 or rest:
        raise ValueError(f"a CIFAR ResNet of {block.__name__} has {step}n + 2 layers, {depth} is not of this form")
    return CifarResNet(block, blocks, num_classes, in_channels, **options)


def resnet18(**options: Any) -> ResNet:
    """ResNet-18; options are those of `ResNet`."""
    return ResNet(BasicBlock, (2, 2, 2, 2), **options)


def resnet34(**options: Any) -> ResNet:
    """ResNet-34; options are those of `ResNet`."""
    return ResNet(BasicBlock, (3, 4, 6, 3), **options)


def resnet50(**options: Any) -> ResNet:
    """ResNet-50; options are those of `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **options)


def resnet101(**options: Any) -> ResNet:
    """ResNet-101; options are those of `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 23, 3), **options)


def resnet152(**options: Any) -> ResNet:
    """ResNet-152; options are those of `ResNet`."""
    return ResNet(Bottleneck, (3, 8, 36, 3), **options)


def resnext50_32x4d(**options: Any) -> ResNet:
    """ResNeXt-50 of 32 groups, 4 channels wide (arXiv:1611.05431); options are those of `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **{"groups": 32, "width_per_group": 4, **options})


def resnext101_32x8d(**options: Any) -> ResNet:
    """ResNeXt-101 of 32 groups, 8 channels wide (arXiv:1611.05431); options are those of `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 23, 3), **{"groups": 32, "width_per_group": 8, **options})


def wide_resnet50_2(**options: Any) -> ResNet:
    """Wide ResNet-50-2 (arXiv:1605.07146); options are those of `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **{"width_per_group": 128, **options})


def wide_resnet101_2(**options: Any) -> ResNet:
    """Wide ResNet-101-2 (arXiv:1605.07146); options are those of `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 23, 3), **{"width_per_group": 128, **options})


__all__ = ["CifarResNet", "ResNet", "cifar_resnet", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
           "resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2"]
