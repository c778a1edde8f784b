"""The native library's `_bn_act_grad`: dx and the shortcut's gradient in one pass."""

from fused_resnet.kernels.cpu.native import FOLDED, needs_finite, refuse
from fused_resnet.kernels.raw import bn_act_grad as forward

__all__ = ["FOLDED", "forward", "needs_finite", "refuse"]
