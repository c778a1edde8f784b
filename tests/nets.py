"""What tests of whole modules share: norms that do something, and the verdict over an output."""

import copy

import torch
from torch import nn

from fused_resnet import numerics


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random norm parameters and statistics (gamma of both signs), in place; weights keep their scale."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor, low, high):
        values = torch.rand(tensor.shape, generator=generator) * (high - low) + low
        tensor.data.copy_(values.to(tensor.dtype))

    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            if module.weight is not None:
                uniform(module.weight, 0.5, 1.5)
                module.weight.data[::4] *= -1
                uniform(module.bias, -0.5, 0.5)
            uniform(module.running_mean, -0.5, 0.5)
            uniform(module.running_var, 0.5, 2.0)
    return model


def depth(model: nn.Module) -> int:
    """The longest dot product of any convolution in `model`."""
    return max(m.weight[0].numel() for m in model.modules() if isinstance(m, nn.Conv2d))


def judge(result: torch.Tensor, model: nn.Module, x: torch.Tensor) -> numerics.Bound:
    """Compares `result` with the stock `model` in eval mode on x, against an fp64 run of it."""
    with torch.no_grad():
        stock = model(x)
        exact = copy.deepcopy(model).double()(x.double())
    assert result.dtype is stock.dtype
    name = numerics.NAMES[x.dtype]
    return numerics.check(result, stock, exact, dtype=name, depth=depth(model), folded=name != "fp32")
