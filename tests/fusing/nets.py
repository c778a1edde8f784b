"""A network with everything that a guard may watch, and what it is called with."""

import torch
from torch import nn

X = torch.randn(2, 8, 12, 12, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """A block with everything that a guard may watch."""

    def __init__(self, channels=8, project=False):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.relu, self.drop, self.tail = nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Identity()
        self.downsample = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)) if project else None
        self.scale = 1.0
        self.use_drop = True

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = out + (x if self.downsample is None else self.downsample(x))
        out = self.relu(out) * self.scale
        return self.tail(self.drop(out) if self.use_drop else out)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.layer1, self.layer2 = Block(), nn.Sequential(Block(project=True), Block())
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.layer2(self.layer1(self.stem(x)))
        return self.head(x.mean((2, 3)))
