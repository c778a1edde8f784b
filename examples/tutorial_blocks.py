"""A residual network as tutorials write it, fused without a change to its code.

    python examples/tutorial_blocks.py [--classes 10] [--size 64]

Shows what `fuse` finds in hand-written blocks, that results and state dict stay, and the other way to the same
launches: a block of `fr.nn` in the place of the hand-written one, with the same parameters.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet as fr


class Block(nn.Module):
    """Two 3x3 convolutions; ReLU as a function, `+=`, a shortcut that is empty where the shapes agree."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class SmallResNet(nn.Module):
    """A stem, three stages of `block`, a classifier."""

    def __init__(self, num_classes: int = 10, block: type[nn.Module] = Block):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = nn.Sequential(block(32, 32), block(32, 32))
        self.layer2 = nn.Sequential(block(32, 64, 2), block(64, 64))
        self.layer3 = nn.Sequential(block(64, 128, 2), block(128, 128))
        self.fc = nn.Linear(128, num_classes)

    def forward(self, x):
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=10, help="width of the classifier")
    parser.add_argument("--size", type=int, default=64, help="edge of the input in pixels")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = SmallResNet(options.classes).eval()
    images = torch.randn(4, 3, options.size, options.size)

    fused = fr.fuse(model)
    with torch.no_grad():
        fused(images)
    print(fr.report(fused))
    print("\nagainst float64:", fr.verify(model, fused, images))
    print("same state dict:", list(fused.state_dict()) == list(model.state_dict()))

    # The same network from our blocks: they are fused from the start.
    ours = SmallResNet(options.classes, fr.nn.ResidualBlock).eval()
    ours.load_state_dict(model.state_dict())
    with torch.no_grad():
        apart = (ours(images) - model(images)).abs().max()
    print(f"fr.nn.ResidualBlock with the same parameters: off by at most {apart:.1e}")


if __name__ == "__main__":
    main()
