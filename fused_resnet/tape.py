"""The launches of the native library on the CPU, and tapes of them, which one call plays.

Between two launches the interpreter has to be read back into the caches that a launch has filled: 50 us, where a hot
loop shows 10. At batch 1 that is a fifth of a ResNet-50. A tape holds what consecutive launches were given; played,
they follow one another without Python. Whoever plays one has made sure that nothing has changed which it depends on.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from fused_resnet import native
from fused_resnet.problem import ACTIVATIONS

Pair = Sequence[int]
ONES = (1, 1)
CONV, CONV_INT8, MAX_POOL, QUANTIZE, MEAN_POOL = range(5)  # as in csrc/cpu/tape.cpp


class Entry(NamedTuple):
    """One launch: what it read and made, and the words that stand for it on a tape."""

    kind: int
    x: torch.Tensor
    residual: torch.Tensor | None
    pack: torch.Tensor | None
    y: torch.Tensor
    filters: tuple[int, int, int] = (0, 0, 0)
    stride: Pair = ONES
    padding: Pair = (0, 0)
    dilation: Pair = ONES
    groups: int = 1
    activation: int = 0
    reuse: bool = False
    zeros: tuple[int, int] = (0, 0)  # of the residual and of the result
    narrow: bool = False
    numbers: tuple[float, float, float] = (0.0, 0.0, 0.0)


class _State(threading.local):
    entries: list[Entry | None] | None = None


_state = _State()


@contextlib.contextmanager
def recording() -> Iterator[list[Entry | None]]:
    """Collects this thread's launches; None stands for work that no tape can do."""
    before, _state.entries = _state.entries, []
    try:
        yield _state.entries
    finally:
        _state.entries = before


def spoil() -> None:
    """Says that what runs now is no launch of a tape."""
    if _state.entries is not None:
        _state.entries.append(None)


def image(x: torch.Tensor, *size: int) -> torch.Tensor:
    """Uninitialised [N, C, H, W] in channels_last memory that has served before; dtype and device are those of x."""
    return torch.ops.fused_resnet._image.default(x, size)


def all_finite(*tensors: torch.Tensor | None) -> bool:
    """Whether no tensor holds NaN or Inf, at the price of reading each once."""
    return all(t is None or _is_finite(t) for t in tensors)


def _is_finite(t: torch.Tensor) -> bool:
    dense = t.is_cpu and (t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last))
    if dense and native.missing("cpu") is None:
        return torch.ops.fused_resnet._is_finite.default(t)
    return math.isfinite(t.sum(dtype=torch.float32).item())


def conv(x: torch.Tensor, pack: torch.Tensor, residual: torch.Tensor | None, reuse: bool, out: Sequence[int],
         kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, groups: int, activation: str, method: str
         ) -> torch.Tensor:
    """`_conv_packed` into the residual, if that may be written over, else into a new image of size `out`."""
    y = residual if reuse and residual is not None else image(x, *out)
    torch.ops.fused_resnet._conv_packed.default(y, x, pack, residual, kernel, stride, padding, dilation, groups,
                                                activation, method)
    if _state.entries is not None:
        _state.entries.append(Entry(CONV, x, residual, pack, y, (out[1], kernel[0], kernel[1]), stride, padding,
                                    dilation, groups, ACTIVATIONS.index(activation), reuse))
    return y


def conv_int8(x: torch.Tensor, pack: torch.Tensor, residual: torch.Tensor | None, filters: tuple[int, int, int],
              stride: Pair, padding: Pair, dilation: Pair, scale: float, zeros: tuple[int, int],
              limits: tuple[float, float], narrow: bool) -> torch.Tensor:
    """`_conv_int8`; `scale` is the residual's, `zeros` are its own and the result's."""
    y = torch.ops.fused_resnet._conv_int8.default(x, pack, residual, filters, stride, padding, dilation, scale, *zeros,
                                                  *limits, narrow)
    if _state.entries is not None:
        _state.entries.append(Entry(CONV_INT8, x, residual, pack, y, filters, stride, padding, dilation, zeros=zeros,
                                    narrow=narrow, numbers=(scale, *limits)))
    return y


def max_pool(x: torch.Tensor, kernel: tuple[int, int], stride: Pair, padding: Pair) -> torch.Tensor:
    """The max-pool of x, uint8, fp32 or bf16, without the indices that only a gradient needs."""
    y = torch.ops.fused_resnet._max_pool.default(x, kernel, stride, padding)
    if _state.entries is not None:
        _state.entries.append(Entry(MAX_POOL, x, None, None, y, (0, *kernel), stride, padding))
    return y


def mean_pool(x: torch.Tensor) -> torch.Tensor:
    """The mean of each channel of x, fp32 or bf16, as [N, C, 1, 1]."""
    y = torch.ops.fused_resnet._mean_pool.default(x)
    if _state.entries is not None:
        _state.entries.append(Entry(MEAN_POOL, x, None, None, y))
    return y


def quantize(x: torch.Tensor, inverse: float, zero: int) -> torch.Tensor:
    """clamp(round(x * inverse) + zero, 0, 255) as uint8."""
    y = torch.ops.fused_resnet._quantize.default(x, inverse, zero)
    if _state.entries is not None:
        _state.entries.append(Entry(QUANTIZE, x, None, None, y, zeros=(0, zero), numbers=(inverse, 0.0, 0.0)))
    return y


class Tape:
    """Launches that one call plays, as they are added."""

    def __init__(self) -> None:
        self._rows: list[list[int]] = []
        self._numbers: list[tuple[float, float, float]] = []
        self._packs: list[torch.Tensor] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, entry: Entry, x: int, residual: int) -> int:
        """Puts a launch at the end.

        Args:
            entry: the launch.
            x, residual: places of what it reads: that of a launch, or -2 - i for the i-th tensor that is given; -1
                where there is none.

        Returns:
            The place of its result.
        """
        pack = -1
        if entry.pack is not None:
            pack = next((i for i, own in enumerate(self._packs) if own is entry.pack), len(self._packs))
            if pack == len(self._packs):
                self._packs.append(entry.pack)
        self._rows.append([entry.kind, x, residual, pack, *entry.filters, *entry.stride, *entry.padding,
                           *entry.dilation, entry.groups, entry.activation, int(entry.reuse), *entry.zeros,
                           int(entry.narrow)])
        self._numbers.append(entry.numbers)
        return len(self._rows) - 1

    def close(self, given: int, results: Sequence[int]) -> list[torch.Tensor]:
        """Makes it ready to be played.

        Args:
            given: how many tensors are given.
            results: places of the results that others read.

        Returns:
            The packed weights that `play` takes. The tape lets go of them: only their cache keeps them.
        """
        for row in self._rows:
            row[1:3] = [place + given if place >= 0 else -2 - place if place < -1 else -1 for place in row[1:3]]
        self._entries = torch.tensor(self._rows, dtype=torch.int64)
        self._floats = torch.tensor(self._numbers, dtype=torch.float64)
        self._results = [given + place for place in results]
        packs, self._packs = self._packs, []
        return packs

    def play(self, given: list[torch.Tensor], packs: list[torch.Tensor]) -> list[torch.Tensor]:
        """The results for tensors like those that were given, and the weights that `close` returned."""
        return torch.ops.fused_resnet._play.default(given, packs, self._entries, self._floats, self._results)
