"""Memory that shows what a kernel forgot to write, and what it should not have touched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

BAND = 4096  # elements before and after each guarded tensor; a multiple of every vector width
SENTINEL = 113.0  # exact in every float type


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, every uninitialised tensor that PyTorch hands out is full of NaN, on any device.

    This is what PyTorch does itself in deterministic mode; operators without a deterministic
    variant still run.
    """
    deterministic: Any = torch.utils.deterministic
    mode, fill = torch.get_deterministic_debug_mode(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        deterministic.fill_uninitialized_memory = fill


class Guards:
    """The bands around the tensors that were made inside `guarded`."""

    def __init__(self) -> None:
        self._bands: list[torch.Tensor] = []

    def empty(self, like: torch.Tensor) -> torch.Tensor:
        """A tensor of NaN with the sizes, strides and type of `like` (dense), between two bands."""
        numel = like.numel()
        buffer = like.new_full((numel + 2 * BAND,), SENTINEL)
        self._bands += [buffer[:BAND], buffer[BAND + numel:]]
        inside = buffer[BAND:BAND + numel].fill_(float("nan"))
        return inside.as_strided(like.shape, like.stride(), BAND)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of `tensor` (dense, any strides) between two bands."""
        return self.empty(tensor).copy_(tensor)

    def touched(self) -> int:
        """How many elements of the bands no longer hold what was put there."""
        return sum(int((band != SENTINEL).sum()) for band in self._bands)


@contextlib.contextmanager
def guarded() -> Iterator[Guards]:
    """Inside, floating-point tensors from `torch.empty` and `torch.empty_like` stand between guard bands.

    `Guards.touched()` is 0 as long as nothing wrote outside of them; `Guards.copy` puts inputs
    between bands, too. Only calls made from Python are seen.
    """
    guards, originals = Guards(), (torch.empty, torch.empty_like)

    def wrap(original):
        def make(*args, **kwargs):
            tensor = original(*args, **kwargs)
            return guards.empty(tensor) if tensor.is_floating_point() and tensor.layout is torch.strided else tensor
        return make

    torch.empty, torch.empty_like = map(wrap, originals)
    try:
        yield guards
    finally:
        torch.empty, torch.empty_like = originals
