"""Convolution + norm + activation as one module, under torchvision's name for its arguments and keys."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fused_resnet.nn import executor


class ConvBNAct2d(nn.Sequential):
    """Convolution, norm and activation in one launch; stands in for torchvision.ops.Conv2dNormActivation.

    The children are those of torchvision in the same places ("0" the convolution, "1" the norm, "2"
    the activation), so checkpoints load both ways. Children may be replaced or appended: what is not
    understood is simply called.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: one int, or (rows, columns).
        stride: one int, or (rows, columns).
        padding: as torch.nn.Conv2d takes it; None keeps the size at stride 1 (odd kernels).
        groups: of the convolution.
        norm_layer: makes the norm from its number of channels; None leaves it out.
        activation_layer: makes the activation; None leaves it out.
        dilation: one int, or (rows, columns).
        inplace: passed to activation_layer, unless None.
        bias: of the convolution; None means only where there is no norm.

    Raises:
        ValueError: whatever torch.nn.Conv2d raises for these arguments.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int] = 3,
                 stride: int | tuple[int, int] = 1, padding: int | tuple[int, int] | str | None = None,
                 groups: int = 1, norm_layer: Callable[..., nn.Module] | None = nn.BatchNorm2d,
                 activation_layer: Callable[..., nn.Module] | None = nn.ReLU, dilation: int | tuple[int, int] = 1,
                 inplace: bool | None = True, bias: bool | None = None):
        if padding is None:
            kernels, dilations = ((v, v) if isinstance(v, int) else v for v in (kernel_size, dilation))
            padding = ((kernels[0] - 1) // 2 * dilations[0], (kernels[1] - 1) // 2 * dilations[1])
        bias = norm_layer is None if bias is None else bias
        layers: list[nn.Module] = [nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
                                             bias)]
        if norm_layer is not None:
            layers.append(norm_layer(out_channels))
        if activation_layer is not None:
            layers.append(activation_layer(**({} if inplace is None else {"inplace": inplace})))
        super().__init__(*layers)
        self.out_channels = out_channels

    @executor.planned
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, K, P, Q], with the strides that the stock modules give."""
        for module in self:
            x = module(x)
        return x

    def fused(self, x: torch.Tensor) -> torch.Tensor:
        """`forward` in one launch and whatever else has been appended."""
        conv, *rest = self
        norm = rest.pop(0) if rest and executor.is_norm(rest[0]) else None
        activation = rest.pop(0) if rest and type(rest[0]) in executor.ACTIVATIONS else None
        x = executor.run(x, conv, norm, activation)
        for module in rest:
            x = module(x)
        return x
