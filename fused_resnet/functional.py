"""The functional interface: one function a kernel family."""

from fused_resnet.ops.conv_bn_act import Prologue, conv_bn_act
from fused_resnet.ops.stem import stem

__all__ = ["Prologue", "conv_bn_act", "stem"]
