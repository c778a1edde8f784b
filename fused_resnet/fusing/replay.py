"""Replaying a plan: launches of the native library that follow one another are recorded once, then played by one call.

A recording is good for one kind of call, and as long as nothing is different that its launches were made from: the
numbers of the modules, their tensors by identity, place, version and looks, and what the choice of kernels depends on.
Where something is different the steps run one by one, as they do under a profiler, and are recorded anew.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from operator import is_, itemgetter
from typing import Any, NamedTuple

import torch

from fused_resnet import backends, tape
from fused_resnet.fusing.head import Head
from fused_resnet.fusing.steps import Launch
from fused_resnet.nn import executor
from fused_resnet.nn.memo import TensorGuards

MOST = 16  # kinds of calls that a plan remembers
LEAST = 2  # launches that are worth a tape
POOL = itemgetter("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
SHOWN = ("backend", "pooled", "solved")  # what a launch keeps of its last call, for `report`


class Look(NamedTuple):
    """What steps were made from at one time."""

    tensors: list[torch.Tensor | None]  # of the modules
    numbers: list[Any]  # every one that a launch takes from the modules
    stamps: list[tuple[int, int]]  # of the tensors


def _stamps(tensors: list[torch.Tensor | None]) -> list[tuple[int, int]]:
    """What a write in place, or other memory, changes. RuntimeError for a tensor that was made in inference mode."""
    return [(t._version, t.data_ptr()) for t in tensors if t is not None]


def _look(steps: list) -> tuple[list, list]:
    """Tensors and numbers of a `Look`."""
    tensors: list[torch.Tensor | None] = []
    numbers: list[Any] = []
    for step in steps:
        if isinstance(step, Launch):
            conv: Any = step.conv
            own = executor.vectors(step.norm)
            tensors += (conv._parameters["weight"], conv._parameters["bias"], *own[:4])
            numbers += (conv.stride, conv.padding, conv.dilation, conv.groups, type(step.norm), own[4], own[5])
        else:
            tensors += step.tensors()
            numbers.append(step.numbers())
    return tensors, numbers


def _is_result(y: torch.Tensor, value: Any, step: Any) -> bool:
    """Whether what a launch made is the value of a step: a head shows it as rows."""
    return value is y or isinstance(step, Head) and value.data_ptr() == y.data_ptr()


def _absent() -> Any:
    return _absent


def _guards(*tensors: torch.Tensor) -> TensorGuards:
    return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)


class Sight:
    """What launches took from their modules when nothing kept them from being fused: as long as it is the same, nothing
    does. It keeps no tensor alive.
    """

    def __init__(self, launches: list[Launch]):
        self._launches = launches
        tensors, self._numbers = self._seen()
        self._refs = [_absent if t is _absent else weakref.ref(t) for t in tensors]

    def same(self) -> bool:
        """Whether all of it is as it was."""
        try:
            tensors, numbers = self._seen()
        except (AttributeError, KeyError):
            return False
        return numbers == self._numbers and all(map(is_, tensors, [ref() for ref in self._refs]))

    def _seen(self) -> tuple[list, list]:
        """Tensors, or what stands where there is none, which differs from one that is gone; and numbers."""
        tensors, numbers = _look(self._launches)
        for step in self._launches:
            own: Any = step.conv.__dict__
            numbers += (type(step.conv), own["padding_mode"])
            if step.prologue is not None:
                before = executor.vectors(step.prologue[0])
                tensors += before[:4]
                numbers += (type(step.prologue[0]), *before[4:])
            if step.pool and step.stock[-1].kind == "call_module":
                numbers += (type(step.stock[-1].target), *POOL(step.stock[-1].target.__dict__))
        return [_absent if t is None else t for t in tensors], numbers


class Stretch:
    """Steps that follow one another and do nothing but what a tape can play."""

    def __init__(self) -> None:
        self.steps: list = []
        self.stale = False
        self._tape = tape.Tape()
        self._given: dict[int, TensorGuards] = {}  # slot -> what its tensor has to be like
        self._made: dict[int, int] = {}  # slot -> place on the tape
        self._look = Look([], [], [])
        self._sight: Sight | None = None  # under which it was found to be as it was

    @property
    def launches(self) -> int:
        """How many the tape holds."""
        return len(self._tape)

    def add(self, step: Any, look: Look, launched: list[tape.Entry | None], values: list) -> bool:
        """Takes a step that has just run, unless a tape cannot do all of it.

        Args:
            step: of the plan.
            look: of the step, from before the call.
            launched: what it launched.
            values: of the plan.
        """
        rows: list[tuple[tape.Entry, int, int]] = []
        given = dict(self._given)

        def place(t: torch.Tensor | None, slot: int | None) -> int | None:
            # `slot` is what the step reads in this role: at another call two slots that hold one tensor now may not
            if t is None:
                return -1
            for i, (entry, *_) in enumerate(rows):
                if entry.y is t:
                    return len(self._tape) + i
            if slot is None or values[slot] is not t:
                return None
            if slot in self._made:
                return self._made[slot]
            if slot not in given:
                given[slot] = _guards(t)
            return -2 - list(given).index(slot)

        for entry in launched:
            x = None if entry is None else place(entry.x, step.x)
            residual = None if entry is None else place(entry.residual, getattr(step, "residual", None))
            if entry is None or x is None or residual is None:
                return False
            rows.append((entry, x, residual))
        if not rows or not _is_result(rows[-1][0].y, values[step.out], step):
            return False
        for entry, x, residual in rows:
            self._made[step.out] = self._tape.add(entry, x, residual)
        self._given = given
        self.steps.append(step)
        self._look.tensors.extend(look.tensors)
        self._look.numbers.extend(look.numbers)
        self._look.stamps.extend(look.stamps)
        return True

    def close(self) -> None:
        """Makes it ready to be played as long as all is as it was before the call that was recorded."""
        freed = {slot for step in self.steps for slot in step.frees}
        self._results = [slot for slot in self._made if slot not in freed]
        self._frees = sorted(freed - set(self._made))
        self._slots, self._likes = list(self._given), list(self._given.values())
        self._packs = backends.watch(self._tape.close(len(self._slots), [self._made[s] for s in self._results]))
        self._shown = [(step, step.memo, {name: step.__dict__[name] for name in SHOWN if name in step.__dict__},
                        step.memo.known) for step in self.steps if isinstance(step, Launch)]
        tensors, self._numbers, self._stamps = self._look
        self._ids = list(map(id, tensors))
        self._refs = [weakref.ref(t) for t in tensors if t is not None]
        self._others = [step for step in self.steps if not isinstance(step, Launch)]  # no sight is of them
        self._of_others = [step.numbers() for step in self._others]
        self._flat = [step.out for step in self.steps if isinstance(step, Head) and step.out in self._results]
        # Steps may share modules, guards want distinct tensors.
        present = [t for t in tensors if t is not None]
        ids = list(map(id, present))
        self._distinct = [i for i, own in enumerate(ids) if ids.index(own) == i]
        self._guards = _guards(*(present[i] for i in self._distinct))
        del self._given, self._made, self._look

    def play(self, values: list, sight: Sight | None) -> bool:
        """Runs the steps over the values of a call; False, with nothing done, where something is different.

        Args:
            values: of the plan.
            sight: what this call has found to be the same; None where steps may have changed it since.
        """
        if (sight is not None and sight is self._sight
                and [step.numbers() for step in self._others] == self._of_others):
            tensors: list = [ref() for ref in self._refs]
        else:
            tensors, numbers = _look(self.steps)
            if numbers != self._numbers or list(map(id, tensors)) != self._ids:
                self.stale = True
                return False
            self._sight = sight
            tensors = [t for t in tensors if t is not None]
        if _stamps(tensors) == self._stamps and self._guards.check(*[tensors[i] for i in self._distinct]):
            given = [values[slot] for slot in self._slots]
            packs = self._packs.values()
            if packs is not None and all(like.check(t) for like, t in zip(self._likes, given, strict=True)):
                self._put(values, self._tape.play(given, packs))
                return True
        self.stale = True
        return False

    def _put(self, values: list, results: list[torch.Tensor]) -> None:
        for slot, result in zip(self._results, results, strict=True):
            values[slot] = result
        for slot in self._flat:
            values[slot] = values[slot].flatten(1)
        for slot in self._frees:
            values[slot] = None
        if self._shown and not self._showing():
            for step, memo, shown, known in self._shown:
                step.__dict__.update(shown)
                memo.known = known

    def _showing(self) -> bool:
        """Whether launches still show what this showed: no other call took the first, so none took the plan."""
        step, memo, shown, known = self._shown[0]
        return memo.known is known and shown.items() <= step.__dict__.items()


class Recorder:
    """Sees the steps of a call, and makes stretches of them where it can.

    What the steps are made from is looked at before the first of them runs: another thread may load weights while they
    run, and then what they packed may be older than what is seen behind them.
    """

    def __init__(self, steps: list) -> None:
        self.items: list[Any] = []
        self.whole = True  # no launch was one that will be different at the next call
        self._stretch = Stretch()
        self._looks = {id(step): found for step in steps if (found := _look_before(step)) is not None}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Steps run inside."""
        with tape.recording() as self._launched:
            yield
        self._close()

    def saw(self, step: Any, values: list) -> None:
        """Called after each step, before values are dropped."""
        launched, look = list(self._launched), self._looks.get(id(step))
        self._launched.clear()
        self.whole = self.whole and None not in launched
        if look is not None and self._stretch.add(step, look, launched, values):
            return
        self._close()
        if look is None or not self._stretch.add(step, look, launched, values):
            self.items.append(step)

    def _close(self) -> None:
        done, self._stretch = self._stretch, Stretch()
        if done.launches < LEAST:
            self.items += done.steps
            return
        done.close()
        self.items.append(done)


def _look_before(step: Any) -> Look | None:
    """None for what is no launch, or whose tensors have no versions."""
    if not getattr(type(step), "taped", False):
        return None
    try:
        tensors, numbers = _look([step])
        return Look(tensors, numbers, _stamps(tensors))
    except RuntimeError:
        return None


class Replays:
    """What a plan has recorded. Copies and pickles start empty."""

    def __init__(self) -> None:
        self._known: dict[tuple, tuple[list, list]] = {}
        self.sight: Sight | None = None  # of the plan's launches

    def __reduce__(self) -> tuple:
        return Replays, ()

    def find(self, kind: tuple) -> list | None:
        """What stands for the steps of a plan in a call of this kind: themselves and stretches; None before it was
        recorded, or where something was different.
        """
        _, items = self._known.get(kind, ((), None))
        stale = items is not None and any(type(item) is Stretch and item.stale for item in items)
        return None if stale else items

    def keep(self, kind: tuple, steps: list, items: list) -> None:
        """Remembers what `find` will say."""
        if kind not in self._known and len(self._known) >= MOST:
            self._known.clear()
        self._known[kind] = list(steps), items  # the steps live on, so that their ids stay theirs


def kind_of(steps: list, inputs: list) -> tuple | None:
    """What tells kinds of calls apart; None where nothing is replayed: off the CPU, and while launches are watched."""
    regime = backends.regime()
    if not inputs[0].is_cpu or regime is None or torch.is_autocast_enabled("cpu"):
        return None
    modes = torch.get_num_threads(), torch.is_inference_mode_enabled(), regime
    return (*modes, *((x.shape, x.dtype) for x in inputs), *map(id, steps))


def covers(items: list, steps: int) -> bool:
    """Whether one call plays the first so many steps of those that were recorded."""
    return bool(items) and type(items[0]) is Stretch and len(items[0].steps) >= steps
