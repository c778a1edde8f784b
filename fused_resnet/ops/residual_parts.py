"""What a residual branch is made of: constants, the tensors that it is given and those that it keeps for backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

ACTIVATIONS = ("identity", "relu", "relu6")  # those whose gradient the output tells


class Stage(NamedTuple):
    """What is constant of one convolution and its norm."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    eps: float
    batch: bool  # the norm takes the statistics of the batch; else the running ones, which are constants
    momentum: float  # weight of the batch in the running statistics
    activation: str


class Branch(NamedTuple):
    """What is constant of a block."""

    stages: tuple[Stage, ...]
    projection: Stage | None = None  # of the shortcut
    recompute: bool = False
    launches: bool = False  # as launches of our own families, x in channels_last; else of ATen's operators
    group: Any = None  # process group over which the statistics are taken: `launches` only


class Parts(NamedTuple):
    """Tensors of one stage, as they are given."""

    weight: torch.Tensor  # [K, C / groups, R, S], dtype of x
    bias: torch.Tensor | None  # [K]
    gamma: torch.Tensor | None  # [K], as are those below; fp32 beside 16-bit data, or x's dtype
    beta: torch.Tensor | None
    running_mean: torch.Tensor | None  # written where `batch`
    running_var: torch.Tensor | None


class Kept(NamedTuple):
    """Tensors of one stage that backward needs; None where it makes them again."""

    u: torch.Tensor | None  # [N, K, P, Q], output of the convolution
    a: torch.Tensor | None  # its normalised and activated form; None also at the last stage
    mean: torch.Tensor | None  # of the batch
    var: torch.Tensor | None = None
    invstd: torch.Tensor | None = None
    reserve: torch.Tensor | None = None  # cuDNN's
    kernel: torch.Tensor | None = None  # int64 scalar on the CPU: which of ATen's implementations normalised
