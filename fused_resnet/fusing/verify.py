"""verify: the fused model's error beside the stock model's own, both against fp64."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fused_resnet import numerics
from fused_resnet.fusing.apply import unfuse
from fused_resnet.fusing.int8_steps import quantised


@dataclass(frozen=True)
class Verification:
    """Errors of both models against an fp64 run of the stock model; true when the fused one is as good.

    A quantised model, whose dtype is int8, is as good as 8 bits allow: see `numerics.check_network`.
    """

    dtype: str
    fused: numerics.Error
    stock: numerics.Error
    bound: numerics.Bound
    agreement: float | None = None  # share of samples whose largest logit is that of fp64, of outputs [N, classes]
    stock_agreement: float | None = None

    def __bool__(self) -> bool:
        return self.bound.ok

    def __str__(self) -> str:
        same = "" if self.agreement is None or self.stock_agreement is None else (
            f"; first class as in fp64: {self.agreement:.2%} fused, {self.stock_agreement:.2%} stock")
        return (f"{'ok' if self else 'WRONG'}: relative rms error {self.fused.rel:.2e} fused, {self.stock.rel:.2e} "
                f"stock ({self.dtype}, against fp64); {self.bound}{same}")


def verify(model: nn.Module, fused: nn.Module, sample: Any) -> Verification:
    """Runs stock, fused and fp64 stock on `sample` and compares.

    Args:
        model: the stock model, in eval mode.
        fused: what `fuse` made of it.
        sample: the input tensor, or a tuple of inputs, in the dtype that the models take.

    Raises:
        ValueError: the models are in training mode, or their outputs hold no floating-point tensor.
    """
    if model.training or fused.training:
        raise ValueError("verify() compares inference: call .eval() on both models first")
    inputs = sample if isinstance(sample, tuple) else (sample,)
    with torch.no_grad():
        exact = unfuse(copy.deepcopy(model)).double()
        wide = tuple(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)
        # a model may work in place on its inputs
        outputs = [m(*copy.deepcopy(given)) for m, given in ((exact, wide), (model, inputs), (fused, inputs))]
    dtype = "int8" if quantised(fused) else numerics.NAMES[_floats(outputs[1])[0].dtype]
    reference, stock, result = (torch.cat([t.flatten().double() for t in _floats(output)]) for output in outputs)
    bound = numerics.check_network(result, stock, reference, dtype=dtype)
    first = _floats(outputs[0])[0]
    if first.dim() != 2 or not first.shape[0]:
        return Verification(dtype, bound.error, bound.stock, bound)
    same = [numerics.agreement(_floats(output)[0], first) for output in (outputs[2], outputs[1])]
    return Verification(dtype, bound.error, bound.stock, bound, *same)


def _floats(output: Any) -> list[torch.Tensor]:
    leaves = [t for t in torch.utils._pytree.tree_leaves(output)
              if isinstance(t, torch.Tensor) and t.is_floating_point()]
    if not leaves:
        raise ValueError(f"the model returns no floating-point tensor but {type(output).__name__}")
    return leaves
