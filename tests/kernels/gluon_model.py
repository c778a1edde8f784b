"""A Gluon kernel as plain Python over a model of what runs beside it: copies, products, mbarriers, warps.

Nothing can interpret Gluon, but its functions are Python. `Multiprocessor.warp_specialize` gives every group of warps
a thread of its own; which of them, or which copy or product in flight, makes the next step is drawn at random. It
fails when a step reads what has not arrived, writes what is still read, or when no step is possible. One group of
warps stands for each that loads, `GROUPS` for those that multiply, which share the rows of the sums and the channels
of the stores between them: only the first one arrives at barriers, as one thread does it for all on a GPU.
"""

import random
import re
import threading
import types
from pathlib import Path

import numpy as np

GROUPS = 2


class Values(np.ndarray):
    """An array that the kernels can cast: everything is computed in one precision."""

    def to(self, dtype):
        return self


def values(array):
    return np.asarray(array, dtype=np.float64).view(Values)


class Vector:
    """A pointer to a vector in global memory."""

    def __init__(self, data, index=0):
        self.data, self.index = data, index

    def __add__(self, index):
        return Vector(self.data, self.index + index)


def load(pointer, mask, other):
    inside = pointer.index < len(pointer.data)
    assert np.all(inside | ~mask), "a vector is read beyond its end"
    return values(np.where(mask, pointer.data[np.where(mask, pointer.index, 0)], other))


class Descriptor:
    """A tensor descriptor over flat memory: reads zeros outside of `shape` and drops what is stored there."""

    dtype = types.SimpleNamespace(primitive_bitwidth=64)
    layout = "data"

    def __init__(self, data, shape, strides, block):
        self.data, self.shape, self.strides = data, shape, strides
        self.block_type = types.SimpleNamespace(shape=list(block), nbytes=8 * int(np.prod(block)))

    def _locate(self, at, shape):
        axes = np.ix_(*(start + np.arange(size) for start, size in zip(at, shape, strict=True)))
        inside, offset = np.ones(shape, dtype=bool), np.zeros(shape, dtype=np.int64)
        for axis, size, stride in zip(axes, self.shape, self.strides, strict=True):
            inside &= (axis >= 0) & (axis < size)
            offset += axis * stride
        return inside, offset

    def read(self, at):
        inside, offset = self._locate(at, self.block_type.shape)
        return np.where(inside, self.data[np.where(inside, offset, 0)], 0.0)

    def write(self, at, block):
        inside, offset = self._locate(at, block.shape)
        self.data[offset[inside]] = block[inside]


class Buffer:
    """One buffer of a ring in shared memory; a view of it transforms what is read."""

    def __init__(self, machine, shape):
        self.machine, self.data = machine, np.full(shape, np.nan)
        self.readers, self.loading, self.unfenced = 0, False, set()

    def readable(self):
        assert not self.loading, "a buffer is read before its bytes have arrived"

    def writable(self):
        assert not self.readers, "a buffer is overwritten while it is being read"
        assert not self.loading, "a buffer is overwritten while it is being filled"


class View:
    def __init__(self, buffer, array):
        self.buffer, self.array = buffer, array

    def reshape(self, shape):
        return View(self.buffer, self.array.reshape(shape))

    def permute(self, order):
        return View(self.buffer, self.array.transpose(order))

    def _rows(self):
        """The rows of the accumulator that the running group of warps holds."""
        share = self.array.shape[0] // GROUPS
        return slice(self.buffer.machine.group() * share, (self.buffer.machine.group() + 1) * share)

    def load(self, layout):
        self.buffer.machine.pause()
        self.buffer.readable()
        return values(self.array.copy())

    def store(self, value):
        self.buffer.machine.pause()
        self.buffer.writable()
        self.array[self._rows()] = value[self._rows()]
        self.buffer.unfenced.add(self.buffer.machine.group())


class Ring:
    def __init__(self, machine, slots, shape):
        self.buffers = [Buffer(machine, shape) for _ in range(slots)]

    def index(self, slot):
        assert slot < len(self.buffers), "a ring has no such buffer"
        return View(self.buffers[slot], self.buffers[slot].data)


class Barrier:
    """An mbarrier: its phase ends when all have arrived and all bytes that were announced have."""

    def __init__(self):
        self.count = self.missing = self.bytes = self.phase = 0

    def settle(self):
        if self.missing == 0 and self.bytes == 0:
            self.phase, self.missing = self.phase ^ 1, self.count

    def arrive(self):
        assert self.missing > 0, "more arrive at a barrier than it counts"
        self.missing -= 1
        self.settle()


class Barriers:
    def __init__(self, slots):
        self.barriers = [Barrier() for _ in range(slots)]

    def index(self, slot):
        assert slot < len(self.barriers), "a ring has no such barrier"
        return self.barriers[slot]


class Sums:
    """An accumulator: no value while a product runs."""

    def __init__(self, value):
        self.value, self.running = value, []

    def __mul__(self, scale):
        assert not self.running, "sums are used while a product runs"
        return self.value * scale


class Halted(BaseException):
    """Ends the threads of a launch that has failed."""


class Actor(threading.Thread):
    def __init__(self, machine, function, arguments, group, weight):
        super().__init__(daemon=True)
        self.machine, self.function, self.arguments, self.group = machine, function, arguments, group
        self.weight, self.turn, self.error, self.over = weight, threading.Semaphore(0), None, False
        self.ready = lambda: True

    def run(self):
        self.turn.acquire()
        try:
            if not self.machine.halted:
                self.function(*self.arguments)
        except Halted:
            pass
        except BaseException as error:
            self.error = error
        self.over = True
        self.machine.back.release()


class Multiprocessor:
    """Runs one program; `seed` draws the order of all steps and how fast each side tends to be."""

    def __init__(self, pid, programs, seed):
        self.pid, self.programs, self.random = pid, programs, random.Random(seed)
        self.back, self.halted, self.actors = threading.Semaphore(0), False, []
        self.events, self.stores = [], [[] for _ in range(GROUPS)]
        self.buffers, self.meeting = [], set()
        self.weights = {kind: self.draw() for kind in ("load", "store", "product")}

    def draw(self):
        """How likely one side's steps are: sometimes all sides keep pace, sometimes one crawls."""
        return self.random.random() ** 4 + 0.001

    def group(self):
        actor = threading.current_thread()
        return actor.group if isinstance(actor, Actor) else 0

    def pause(self, ready=lambda: True):
        """Lets others go first, until `ready()` holds."""
        actor = threading.current_thread()
        if isinstance(actor, Actor):
            actor.ready = ready
            self.back.release()
            actor.turn.acquire()
            if self.halted:
                raise Halted
        else:
            assert ready(), "the setting-up waits"

    def later(self, kind, event):
        event.weight = self.weights[kind]
        self.events.append(event)

    def warp_specialize(self, parts, warps, registers):
        (multiply, given), *loaders = parts
        assert len(loaders) == len(warps) == len(registers)
        starts = [(multiply, given, group) for group in range(GROUPS)] + [(*loader, 0) for loader in loaders]
        self.actors = [Actor(self, *start, self.draw()) for start in starts]
        for actor in self.actors:
            actor.start()
        try:
            while any(not actor.over for actor in self.actors):
                self.step()
            assert not self.events, "the program ends before its copies and products do"
        finally:
            self.halted = True
            for actor in self.actors:
                actor.turn.release()

    def step(self):
        able = [actor for actor in self.actors if not actor.over and actor.ready()]
        choices = able + self.events[:]
        assert choices, "nothing can go on: the warps wait for each other"
        choice = self.random.choices(choices, [choice.weight for choice in choices])[0]
        if isinstance(choice, Actor):
            choice.turn.release()
            self.back.acquire()
            if choice.error:
                raise choice.error
        else:
            self.events.remove(choice)
            choice()

    # What the kernels call, by its name there.

    def wait(self, barrier, phase):
        self.pause(lambda: barrier.phase != phase)

    def init(self, barrier, count):
        barrier.count = barrier.missing = count

    def arrive(self, barrier, pred=True):
        self.pause()
        if pred and self.group() == 0:
            barrier.arrive()

    def expect(self, barrier, bytes):
        self.pause()
        barrier.bytes += bytes
        barrier.arrive()

    def async_copy_global_to_shared(self, descriptor, at, barrier, result):
        self.pause()
        result.buffer.writable()
        result.buffer.loading = True
        result.array[...] = np.nan

        def arrives():
            result.array[...] = descriptor.read(at)
            result.buffer.loading = False
            barrier.bytes -= descriptor.block_type.nbytes
            barrier.settle()

        self.later("load", arrives)

    def async_copy_shared_to_global(self, descriptor, at, block):
        self.pause()
        block.buffer.readable()
        assert not block.buffer.unfenced, "a block leaves before the warps that wrote it have fenced it"
        block.buffer.readers += 1
        stores, share = self.stores[self.group()], block.array.shape[-1] // GROUPS
        first = self.group() * share

        def leaves():
            descriptor.write([*at[:-1], at[-1] + first], block.array[..., first:first + share])
            block.buffer.readers -= 1

        stores.append(leaves)
        self.later("store", leaves)

    def store_wait(self, pendings):
        stores = self.stores[self.group()]
        awaited = stores[:len(stores) - pendings]  # all but the last ones, which may end before them
        self.pause(lambda: not any(store in self.events for store in awaited))

    def fence_async_shared(self):
        self.pause()
        for buffer in self.buffers:
            buffer.unfenced.discard(self.group())

    def thread_barrier(self):
        """All groups that multiply meet; the last one to come lets the others go."""
        group = self.group()
        self.pause()
        self.meeting.add(group)
        if len(self.meeting) == GROUPS:
            self.meeting = set()
        else:
            mine = self.meeting
            self.pause(lambda: self.meeting is not mine)

    def warpgroup_mma(self, a, b, acc, is_async):
        self.pause()
        for operand in (a, b):
            operand.buffer.readable()
            operand.buffer.readers += 1

        def completes():
            acc.value += a.array @ b.array
            acc.running.remove(completes)
            for operand in (a, b):
                operand.buffer.readers -= 1
            if acc.running:
                self.later("product", acc.running[0])

        acc.running.append(completes)
        if len(acc.running) == 1:  # products end in the order in which they began
            self.later("product", completes)
        return acc

    def warpgroup_mma_wait(self, num_outstanding, deps):
        acc, = deps
        self.pause(lambda: len(acc.running) <= num_outstanding)
        return acc

    def allocate_shared_memory(self, dtype, shape, layout):
        if layout == "barriers":
            return Barriers(shape[0])
        ring = Ring(self, shape[0], shape[1:])
        self.buffers += ring.buffers
        return ring

    def names(self):
        """Stand-ins for what a kernel's file imports."""
        space = types.SimpleNamespace
        language = space(
            program_id=lambda axis: self.pid, num_programs=lambda axis: self.programs, num_warps=lambda: 4 * GROUPS,
            static_range=range, arange=lambda start, end, layout: np.arange(start, end), expand_dims=np.expand_dims,
            zeros=lambda shape, dtype, layout: Sums(values(np.zeros(shape))), float32=float, int64=int,
            SliceLayout=lambda axis, layout: None, NVMMADistributedLayout=lambda *shape: None,
            allocate_shared_memory=self.allocate_shared_memory, thread_barrier=self.thread_barrier,
            warp_specialize=self.warp_specialize)
        barrier = space(wait=self.wait, init=self.init, arrive=self.arrive, expect=self.expect,
                        MBarrierLayout=lambda: "barriers")
        copies = space(store_wait=self.store_wait, async_copy_global_to_shared=self.async_copy_global_to_shared,
                       async_copy_shared_to_global=self.async_copy_shared_to_global)
        return {"gl": language, "mbarrier": barrier, "tma": copies, "fence_async_shared": self.fence_async_shared,
                "warpgroup_mma": self.warpgroup_mma, "warpgroup_mma_wait": self.warpgroup_mma_wait}


TRITON = types.SimpleNamespace(
    load=load, where=lambda *args: values(np.where(*args)) if np.ndim(args[0]) else args[1] if args[0] else args[2],
    multiple_of=lambda value, factor: value, exp=np.exp, div_rn=np.divide, sqrt_rn=np.sqrt, float32=float)


def plain(module, names, old="", new=""):
    """The functions of a file of kernels as Python functions that find `names`; in its text, `old` reads `new`."""
    text = Path(module.__file__).read_text()
    assert old in text, f"{module.__name__} no longer reads {old!r}: bring this fault up to date"
    text = re.sub(r"^@(gluon|triton)\.jit.*\n", "", text.replace(old, new) if old else text, flags=re.MULTILINE)
    found = {"__name__": module.__name__}
    exec(compile(text, module.__file__, "exec"), found)
    found.update(names)
    return found
