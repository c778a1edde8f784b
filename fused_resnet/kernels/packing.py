"""Packed and folded weights, kept only while they are provably those of the live tensors.

An entry lives as long as every source tensor keeps its identity, storage and version counter:
optimizer steps, `load_state_dict`, `copy_`, `.to()` and `.data =` all change one of them. An address
is not enough: `.data =` leaves the version as it is, and `.to()` and back often ends where it began. Writes
that PyTorch itself cannot see (`.data.copy_`, numpy views) do not; `fused_resnet.refresh` calls
`drop` for those. Tensors without a version counter (made under inference mode) are never cached,
nor is what is built while a CUDA graph is recorded: it lies in the graph's own memory and holds
nothing before the first replay.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import torch

_packs: dict[tuple, tuple[tuple, tuple, Any]] = {}


class _State(threading.local):
    held: Held | None = None


_state = _State()


class Held:
    """The packed values that this thread was handed within `holding`, kept alive with it."""

    def __init__(self) -> None:
        self._values: dict[tuple, Any] = {}

    def keep(self, key: tuple, value: Any) -> Any:
        self._values[key] = value
        return value

    def current(self) -> bool:
        """Whether none of them was dropped or built afresh since."""
        return all((entry := _packs.get(key)) is not None and entry[2] is value
                   for key, value in self._values.items())


class Watch:
    """Packed values, not kept alive, as long as the cache still has them.

    A value that was dropped may live on where another thread reads it, so to be alive is not enough.
    """

    def __init__(self, values: Iterable) -> None:
        keys = {id(entry[2]): key for key, entry in list(_packs.items())}
        self._known = [(keys.get(id(value), ()), weakref.ref(value)) for value in values]

    def values(self) -> list | None:
        """All of them; None where one was dropped or built afresh."""
        found = []
        for key, ref in self._known:
            entry = _packs.get(key)
            if entry is None or entry[2] is not ref():
                return None
            found.append(entry[2])
        return found


@contextlib.contextmanager
def holding() -> Iterator[Held]:
    """Collects what `packed` returns: a recorded graph goes on reading its memory."""
    before, _state.held = _state.held, Held()
    try:
        yield _state.held
    finally:
        _state.held = before


def packed(tag: Hashable, sources: tuple, build: Callable[[], Any]) -> Any:
    """`build()`, kept while no source changes.

    Args:
        tag: what is built from the sources: one entry per (tag, sources).
        sources: the tensors (or None) that `build` reads.
        build: makes the packed value; called without autograd by the kernels.
    """
    key = (tag, *map(id, sources))
    try:
        stamp = tuple([(s._version, s.data_ptr()) for s in sources if s is not None])
        if sources[0] is not None:  # `.data =` may give weights a transposed view of the same memory
            stamp += (sources[0].stride(),)
    except RuntimeError:  # an inference tensor has no version counter
        return build()
    entry = _packs.get(key)
    # An id is reused after its tensor dies; the entry's callback has then removed the entry.
    if entry is not None and entry[1] == stamp:
        return entry[2] if _state.held is None else _state.held.keep(key, entry[2])
    value = build()
    if any(s is not None and s.is_cuda for s in sources) and torch.cuda.is_current_stream_capturing():
        return value

    def forget(_: Any, key: tuple = key) -> None:
        _packs.pop(key, None)

    refs = tuple(weakref.ref(t, forget) for s in sources if s is not None for t in (s, s.untyped_storage()))
    _packs[key] = (refs, stamp, value)
    return value if _state.held is None else _state.held.keep(key, value)


def _place(t: torch.Tensor) -> int:
    try:
        return t.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a tensor without data
        return 0


def drop(tensors: Iterable) -> int:
    """Forgets every packed value built from any of `tensors`, or of a view of one; returns how many there were."""
    tensors = list(tensors)
    ids = {id(t) for t in tensors}
    places = {_place(t) for t in tensors if isinstance(t, torch.Tensor)} - {0}
    stale = [key for key, (refs, *_) in list(_packs.items()) if ids.intersection(key[1:])
             or any((storage := ref()) is not None and storage.data_ptr() in places for ref in refs[1::2])]
    for key in stale:
        _packs.pop(key, None)
    return len(stale)
