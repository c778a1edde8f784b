"""Replaying a plan: launches of the native library that follow one another are recorded once, then played by one call.

A recording is good for one kind of call, and as long as nothing is different that its launches were made from: the
numbers of the modules, their tensors by identity, place, version and looks, and what the choice of kernels depends on.
Where something is different the steps run one by one, as they do under a profiler, and are recorded anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from fused_resnet import backends, tape
from fused_resnet.fusing.steps import Launch
from fused_resnet.nn import executor
from fused_resnet.nn.memo import TensorGuards

MOST = 16  # kinds of calls that a plan remembers
LEAST = 2  # launches that are worth a tape


class Stretch:
    """Steps that follow one another and do nothing but what a tape can play."""

    def __init__(self) -> None:
        self.steps: list = []
        self.stale = False
        self._tape = tape.Tape()
        self._given: dict[int, torch.Tensor] = {}  # by slot; forgotten in the end
        self._made: dict[int, int] = {}  # slot -> place on the tape

    @property
    def launches(self) -> int:
        """How many the tape holds."""
        return len(self._tape)

    def add(self, step: Any, launched: list[tape.Entry | None], values: list) -> bool:
        """Takes a step that has just run, unless a tape cannot do all of it.

        Args:
            step: of the plan.
            launched: what it launched.
            values: of the plan.
        """
        slots = [slot for slot in (getattr(step, "x", None), getattr(step, "residual", None)) if slot is not None]
        rows: list[tuple[tape.Entry, int, int]] = []
        given = dict(self._given)

        def place(t: torch.Tensor | None) -> int | None:
            if t is None:
                return -1
            for i, (entry, *_) in enumerate(rows):
                if entry.y is t:
                    return len(self._tape) + i
            for slot in slots:
                if values[slot] is t and slot in self._made:
                    return self._made[slot]
                if values[slot] is t:
                    given.setdefault(slot, t)
                    return -2 - list(given).index(slot)
            return None

        for entry in launched:
            x, residual = (None, None) if entry is None else (place(entry.x), place(entry.residual))
            if entry is None or x is None or residual is None:
                return False
            rows.append((entry, x, residual))
        if not rows or rows[-1][0].y is not values[step.out]:
            return False
        for entry, x, residual in rows:
            self._made[step.out] = self._tape.add(entry, x, residual)
        self._given = given
        self.steps.append(step)
        return True

    def close(self) -> None:
        """Takes stock of all that the launches were made from."""
        freed = {slot for step in self.steps for slot in step.frees}
        self._results = [slot for slot in self._made if slot not in freed]
        self._frees = sorted(freed - set(self._made))
        self._slots = list(self._given)
        self._tape.close(len(self._slots), [self._made[slot] for slot in self._results])
        self._ran = [(step, step.backend, step.pooled) for step in self.steps if isinstance(step, Launch)]
        tensors, self._numbers = self._look()
        present = [t for t in tensors if t is not None]
        self._ids, self._stamps = list(map(id, tensors)), _stamps(present)
        self._guards = TensorGuards(*present, *self._given.values(), dynamic_dims_sizes=None,
                                    dynamic_dims_strides=None)
        del self._given, self._made

    def play(self, values: list) -> bool:
        """Runs the steps over the values of a call; False, with nothing done, where something is different."""
        tensors, numbers = self._look()
        if numbers == self._numbers and list(map(id, tensors)) == self._ids:
            present = [t for t in tensors if t is not None]
            given = [values[slot] for slot in self._slots]
            if _stamps(present) == self._stamps and self._guards.check(*present, *given):
                results = self._tape.play(given)
                if results is not None:
                    self._put(values, results)
                    return True
        self.stale = True
        return False

    def _put(self, values: list, results: list[torch.Tensor]) -> None:
        for slot, result in zip(self._results, results, strict=True):
            values[slot] = result
        for slot in self._frees:
            values[slot] = None
        for step, backend, pooled in self._ran:
            step.backend, step.pooled = backend, pooled

    def _look(self) -> tuple[list, list]:
        """The tensors of the modules, and every number that a launch takes from them."""
        tensors: list[torch.Tensor | None] = []
        numbers: list[Any] = []
        for step in self.steps:
            if isinstance(step, Launch):
                conv: Any = step.conv
                own = executor.vectors(step.norm)
                tensors += (conv._parameters["weight"], conv._parameters["bias"], *own[:4])
                numbers += (conv.stride, conv.padding, conv.dilation, conv.groups, type(step.norm), own[4], own[5])
            else:
                numbers += (step.target.kernel_size, step.target.stride, step.target.padding)
        return tensors, numbers


def _stamps(tensors: list[torch.Tensor]) -> tuple[list[int], list[int]]:
    return [t._version for t in tensors], [t.data_ptr() for t in tensors]


class Recorder:
    """Sees the steps of a call, and makes stretches of them where it can."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self._stretch = Stretch()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Steps run inside."""
        with tape.recording() as self._launched:
            yield
        self._close()

    def saw(self, step: Any, values: list) -> None:
        """Called after each step, before values are dropped."""
        launched = list(self._launched)
        self._launched.clear()
        if self._stretch.add(step, launched, values):
            return
        self._close()
        if not self._stretch.add(step, launched, values):
            self.items.append(step)

    def _close(self) -> None:
        done, self._stretch = self._stretch, Stretch()
        if done.launches < LEAST:
            self.items += done.steps
            return
        try:
            done.close()
        except RuntimeError:  # a tensor that was made under inference mode has no version
            self.items += done.steps
        else:
            self.items.append(done)


class Replays:
    """What a plan has recorded. Copies and pickles start empty."""

    def __init__(self) -> None:
        self._known: dict[tuple, tuple[list, list]] = {}

    def __reduce__(self) -> tuple:
        return Replays, ()

    def find(self, steps: list, inputs: list) -> list | None:
        """What stands for the steps of a plan in a call of this kind: themselves and stretches; None before it was
        recorded, or where something was different.
        """
        _, items = self._known.get(self._key(steps, inputs), ((), None))
        stale = items is not None and any(type(item) is Stretch and item.stale for item in items)
        return None if stale else items

    def keep(self, steps: list, inputs: list, items: list) -> None:
        """Remembers what `find` will say."""
        if len(self._known) >= MOST:
            self._known.clear()
        self._known[self._key(steps, inputs)] = list(steps), items  # the steps live on, so that their ids stay theirs

    @staticmethod
    def _key(steps: list, inputs: list) -> tuple:
        modes = torch.get_num_threads(), torch.is_inference_mode_enabled(), backends.regime()
        return (*modes, *((x.shape, x.dtype) for x in inputs), *map(id, steps))


def possible(inputs: list) -> bool:
    """Whether calls with such inputs are replayed: on the CPU, while nobody watches launches."""
    return inputs[0].is_cpu and backends.regime() is not None and not torch.is_autocast_enabled("cpu")
