"""Our blocks beside the stock blocks that they stand in for, with equal weights."""

import torch.nn as nn
import torch.nn.functional as F
import torchvision.models.resnet as tv
from torchvision.ops.misc import Conv2dNormActivation, FrozenBatchNorm2d

import fused_resnet.nn as ours
from tests import seeds
from tests.nets import randomize


class PreActBlock(nn.Module):
    """kuangliu/pytorch-cifar."""

    def __init__(self, in_planes, planes, stride=1):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, stride=1, padding=1, bias=False)
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, kernel_size=1, stride=stride, bias=False))

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out


def projection(planes, stride=2, norm=nn.BatchNorm2d):
    return nn.Sequential(nn.Conv2d(16, planes, 1, stride, bias=False), norm(planes))


def averaged(planes):
    """The shortcut of ResNet-D."""
    return nn.Sequential(nn.AvgPool2d(2, 2), *projection(planes, 1))


def _both(ours_class, stock_class, *args, **kwargs):
    return lambda which: (ours_class, stock_class)[which](*(a() if callable(a) else a for a in args), **kwargs)


def _conv(*args, **kwargs):
    return _both(ours.ConvBNAct2d, Conv2dNormActivation, *args, **kwargs)


# name -> (makes ours for 0, stock for 1; both take 16 channels), and the launches of one fused forward
BLOCKS = {
    "basic": (_both(ours.BasicBlock, tv.BasicBlock, 16, 16), 2),
    "basic_projected": (_both(ours.BasicBlock, tv.BasicBlock, 16, 32, 2, lambda: projection(32)), 3),
    "basic_averaged": (_both(ours.BasicBlock, tv.BasicBlock, 16, 32, 2, lambda: averaged(32)), 3),
    "bottleneck": (_both(ours.Bottleneck, tv.Bottleneck, 16, 4), 3),
    "bottleneck_projected": (_both(ours.Bottleneck, tv.Bottleneck, 16, 8, 2, lambda: projection(32)), 4),
    "bottleneck_groups": (_both(ours.Bottleneck, tv.Bottleneck, 16, 4, groups=4, base_width=64), 3),
    "bottleneck_dilated": (_both(ours.Bottleneck, tv.Bottleneck, 16, 4, dilation=2), 3),
    "bottleneck_frozen": (_both(ours.Bottleneck, tv.Bottleneck, 16, 8, 2, lambda: projection(
        32, norm=FrozenBatchNorm2d), norm_layer=FrozenBatchNorm2d), 4),
    "residual": (_both(ours.ResidualBlock, seeds.ShortcutBlock, 16, 16), 2),
    "residual_projected": (_both(ours.ResidualBlock, seeds.ShortcutBlock, 16, 32, 2), 3),
    "residual_downsample": (_both(ours.ResidualBlock, seeds.DownsampleBlock, 16, 32, 2, lambda: projection(32)), 3),
    "preact": (_both(ours.PreActBlock, PreActBlock, 16, 16), 2),
    "preact_projected": (_both(ours.PreActBlock, PreActBlock, 16, 32, 2), 2),
    "conv": (_conv(16, 24), 1),
    "conv_bare": (_conv(16, 24, 1, norm_layer=None, activation_layer=None), 1),
    "conv_stride_kernel": (_conv(16, 24, (5, 3), (2, 1)), 1),
    "conv_dilated": (_conv(16, 24, 3, dilation=2), 1),
    "conv_depthwise": (_conv(16, 32, 3, groups=16, bias=True), 1),
    "conv_relu6": (_conv(16, 24, activation_layer=nn.ReLU6), 1),
    "conv_silu": (_conv(16, 24, activation_layer=nn.SiLU), 1),
    "conv_hardswish": (_conv(16, 24, activation_layer=nn.Hardswish), 1),
    "conv_identity": (_conv(16, 24, activation_layer=None), 1),
    "conv_frozen": (_conv(16, 24, norm_layer=FrozenBatchNorm2d), 1),
}
# What is not understood keeps its own forward: groups of convolutions launch, the rest is called.
PARTLY = {
    "conv_group_norm": (_conv(16, 24, norm_layer=lambda c: nn.GroupNorm(4, c)), 1),
    "conv_leaky": (_conv(16, 24, activation_layer=nn.LeakyReLU), 1),
    "conv_batch_statistics": (_conv(16, 24, norm_layer=lambda c: nn.BatchNorm2d(c, track_running_stats=False)), 0),
    "conv_same": (_conv(16, 24, 4, padding="same"), 0),
    "basic_group_norm": (_both(ours.BasicBlock, tv.BasicBlock, 16, 16, norm_layer=lambda c: nn.GroupNorm(4, c)), 0),
}


def pair(name):
    """(ours, stock) in eval mode with equal, random weights."""
    mine, stock = map({**BLOCKS, **PARTLY}[name][0], (0, 1))
    randomize(stock)
    mine.load_state_dict(stock.state_dict(), strict=True)
    return mine.eval(), stock.eval()
