"""Modules that run fused where every guard holds and as stock modules elsewhere."""

from fused_resnet.nn.blocks import BasicBlock, Bottleneck, PreActBlock, ResidualBlock
from fused_resnet.nn.layers import ConvBNAct2d

__all__ = ["BasicBlock", "Bottleneck", "ConvBNAct2d", "PreActBlock", "ResidualBlock"]
