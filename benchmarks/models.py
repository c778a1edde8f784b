"""The stock models and the pictures that the stages run."""

from __future__ import annotations

import copy
import functools

import torch

from fused_resnet import models
from fused_resnet.bench import pictures
from fused_resnet.bench.stock import plain


@functools.cache
def photographs(count: int) -> torch.Tensor:
    """The pictures that every model runs on."""
    return pictures.load(count)


@functools.cache
def _calibrated(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return pictures.calibrate(plain(getattr(models, name)()).eval(), photographs(16))


def stock_model(name: str) -> torch.nn.Module:
    """A copy of the stock model with random weights, its batch norms calibrated on the pictures; on the CPU, fp32."""
    return copy.deepcopy(_calibrated(name))
