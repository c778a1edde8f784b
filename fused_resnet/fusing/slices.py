"""Depth before breadth on the CPU: the first steps of a plan run a few images at a time.

The early maps of a ResNet are its largest: at batch 8 what layer1 hands from one convolution to the next (58 MB in
fp32) goes through memory, a few images of it stay in the last cache. The late layers have small maps and large weights,
which are better read once for the whole batch; so the plan is cut where everything that follows fits the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fused_resnet import native, tape, timing
from fused_resnet.fusing.steps import STEADY_FUNCTIONS, Call, Launch, Slot, fill_slots

# What these make of an image depends on that image alone.
MODULES = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Hardsigmoid, nn.MaxPool2d, nn.AvgPool2d,
           nn.BatchNorm2d)
FUNCTIONS = STEADY_FUNCTIONS - {torch.cat, F.adaptive_avg_pool2d}
SHARE = 0.5  # of the last cache: the rest is for weights, and for whoever else computes on the chip

Runner = Callable[[list, list], bool]


class Cut(NamedTuple):
    """The first `steps` of a plan take `images` at a time."""

    steps: int
    images: int


def key_of(args: tuple) -> tuple | None:
    """What a cut depends on; None where there is nothing to cut."""
    x = args[0]
    if len(args) != 1 or not x.is_cpu or x.dim() != 4 or x.shape[0] < 2:
        return None
    return x.shape, x.dtype, torch.get_num_threads()


class Ruler:
    """Learns from one whole run how large the values of each step are.

    Args:
        steps: of the plan.
        inputs: how many of the first values are inputs.
    """

    def __init__(self, steps: list, inputs: int):
        self._sizes: dict[int, int] = {}
        self._reach = _per_image(steps, inputs)
        self._most: list[int] = []

    def saw(self, step: Any, values: list) -> None:
        """Called after each step, before values are dropped."""
        if len(self._most) < self._reach:
            slots = {*_read(step), step.out}
            self._most.append(sum(_bytes(values[slot]) for slot in slots))

    def cut(self, batch: int) -> Cut | None:
        """Where to cut, or None where the whole batch fits the cache, or a single image does not."""
        room = timing.cache_bytes() * SHARE
        large = [i for i, size in enumerate(self._most) if size > room]
        threads = torch.get_num_threads()
        if not large:
            return None
        most = int(room * batch / max(self._most)) // threads * threads
        if not 0 < most < batch:
            return None
        parts = -(-batch // most)
        return Cut(large[-1] + 1, -(-batch // parts // threads) * threads)


def run(cut: Cut, steps: list, values: list, inputs: int, runner: Runner) -> bool:
    """Runs the first steps of a plan and puts what later ones read, of all images, into `values`.

    Args:
        cut: how far, and how many images at a time.
        steps: all steps of the plan.
        values: of the plan; the first `inputs` are set.
        inputs: how many.
        runner: runs steps over values; tells whether all results are known to be finite.

    Returns:
        Whether all results are known to be finite.
    """
    first = steps[:cut.steps]
    batch = values[0].shape[0]
    dropped = {slot for step in first for slot in step.frees}
    kept = [step.out for step in first if step.out not in dropped]
    finite = True
    for start in range(0, batch, cut.images):
        part = [*(x[start:start + cut.images] for x in values[:inputs]), *[None] * (len(values) - inputs)]
        finite = runner(first, part) and finite
        for slot in kept:
            if start == 0:
                values[slot] = _image(part[slot], batch)
            values[slot][start:start + cut.images] = part[slot]
    for slot in dropped:
        values[slot] = None
    return finite


def _image(like: torch.Tensor, batch: int) -> torch.Tensor:
    """Room for `batch` images: from memory that served before where the native library is, new pages cost as much."""
    size = batch, *like.shape[1:]
    if like.dtype in (torch.float32, torch.bfloat16, torch.uint8) and native.missing("cpu") is None:
        return tape.image(like, *size)
    return torch.empty(size, dtype=like.dtype, memory_format=torch.channels_last)


def _per_image(steps: list, inputs: int) -> int:
    """How many of the first steps treat every image by itself and hand on nothing but images."""
    known = set(range(inputs))
    for i, step in enumerate(steps):
        if not (isinstance(step, Launch) or isinstance(step, Call) and _each(step)) or not _read(step) <= known:
            return i
        known.add(step.out)
    return len(steps)


def _each(call: Call) -> bool:
    if call.kind == "call_module":
        return type(call.target) in MODULES and not call.opaque
    return call.kind == "call_function" and call.target in FUNCTIONS


def _read(step: Any) -> set[int]:
    """The values that a step reads."""
    if isinstance(step, Launch):
        return {step.x} | (set() if step.residual is None else {step.residual})
    slots: set[int] = set()

    def note(slot: Slot) -> None:
        slots.add(slot.at)

    fill_slots((step.args, step.kwargs), note)
    return slots


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0
