"""What a training step keeps: the bytes that autograd saves for backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def saved_bytes(forward: Callable[[], object], besides: nn.Module | None = None) -> int:
    """Bytes that the graph of `forward()` keeps for backward; a storage that is kept twice counts once.

    Args:
        besides: its parameters and buffers are not counted: they are there anyway.
    """
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        held = forward()  # its graph holds the storages, so that none is given out twice
    own = [] if besides is None else [*besides.parameters(), *besides.buffers()]
    for t in own:
        kept.pop(t.untyped_storage().data_ptr(), None)
    del held
    return sum(kept.values())
