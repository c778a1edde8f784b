"""The models of `fused_resnet.models` in plain torch.nn: the baseline, with nothing of ours in its forward.

Our blocks fuse themselves at inference. The baseline, the compilers and the exporters must see what a user
without this package has, so the classes are exchanged for ones with torchvision's own forwards; modules,
parameters and keys stay.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from fused_resnet import models
from fused_resnet import nn as ours


class BasicBlock(ours.BasicBlock):
    """torchvision's forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(ours.Bottleneck):
    """torchvision's forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(models.ResNet):
    """torchvision's forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class CifarResNet(models.CifarResNet):
    """The same without max-pooling and with three stages."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    ours.BasicBlock: BasicBlock, ours.Bottleneck: Bottleneck, models.ResNet: ResNet, models.CifarResNet: CifarResNet}
OWN = {twin: own for own, twin in PLAIN.items()}


def in_memory_format(model: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    """`model.to(memory_format=...)`, in place; torch's annotations do not know that keyword on its own."""
    return model.to(memory_format=memory_format)  # type: ignore[call-overload]


def plain(model: nn.Module) -> nn.Module:
    """A copy of `model` whose residual blocks and networks run torchvision's forwards.

    Raises:
        ValueError: the model holds a block of ours that has no plain twin here.
    """
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if type(module) in PLAIN:
            module.__class__ = PLAIN[type(module)]
        elif type(module).__module__.startswith(("fused_resnet.nn", "fused_resnet.models")):
            raise ValueError(f"no plain twin for {name or 'the model'}, a {type(module).__name__}")
    return model


def restored(model: nn.Module) -> nn.Module | None:
    """A copy in which the classes that `plain` exchanged are ours again, or None where there is none."""
    model = copy.deepcopy(model)
    exchanged = [module for module in model.modules() if type(module) in OWN]
    for module in exchanged:
        module.__class__ = OWN[type(module)]
    return model if exchanged else None
