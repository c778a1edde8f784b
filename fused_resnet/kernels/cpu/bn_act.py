"""The native library's `_bn_act`: y and its mask in one pass over x and the shortcut."""

from fused_resnet.kernels.cpu.native import FOLDED, needs_finite, refuse
from fused_resnet.kernels.raw import bn_act as forward

__all__ = ["FOLDED", "forward", "needs_finite", "refuse"]
