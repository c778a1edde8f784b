"""The plan: what `fuse` attaches to a module, and how it runs.

A plan is the captured forward as a list of steps over numbered values. It holds the live
submodules, so deep copies, pickles, moved and reloaded parameters need no care. Every call first
asks the guards; when one fails, the class's own forward runs. The first call of each kind also runs
the stock forward and compares values and strides: a plan that disagrees is dropped. Where gradients
are recorded or norms look at the batch, a route (`fusing.route`) takes the steps' place.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fused_resnet import backends, numerics, tuner
from fused_resnet.fusing import replay, slices, trial
from fused_resnet.fusing.guards import Guards
from fused_resnet.fusing.route import NO_ROUTE, Route
from fused_resnet.fusing.steps import Launch, Slot, fill_slots
from fused_resnet.nn import executor, training

# How far a plan may be from stock before it is taken for wrong: rounding of a deep network stays far
# below, a dropped or misplaced operation lands near 1.
PLAN_TOLERANCE = {"fp64": 1e-6, "fp32": 1e-2, "bf16": 0.2, "fp16": 0.2}
STRIDES = "strides"  # how a difference begins that is none of values
ODD = "stock gives results other strides: inside it mixes memory formats"
MIXED = "inputs or weights are in different memory formats"
UNTUNED = contextlib.nullcontext()


class Plan:
    """Callable in the place of `module.forward`."""

    tune: float = 0.0  # seconds for each problem at its first use
    recompute: bool | None = None  # save little for backward; see `nn.training.run`

    def __init__(self, module: nn.Module, arity: int, given: set[int], steps: list, size: int, output: Any, keep: bool,
                 inlined: list[nn.Module], called: list[nn.Module], names: set[str]):
        self.module, self.arity, self.steps, self.size, self.output = module, arity, steps, size, output
        self.given = given  # inputs that only stems read: their launch takes any layout
        self.keep = keep  # leave results in channels_last
        self.inlined, self.called, self.names = inlined, called, names
        self.launches = [s for s in steps if isinstance(s, Launch)]
        self.opaque = [s.target for s in steps if s.opaque]
        self.convs = [m for m in (*called, *inlined) if isinstance(m, nn.Conv2d)]
        self.routes: dict[bool, Route | str] = {}  # for each mode a route, or why there is none
        self.checked: set[tuple] = set()
        self.odd: set[tuple] = set()  # kinds of calls for which stock mixes memory formats inside
        self.broken: str | None = None
        self.fallbacks: dict[str, int] = {}
        self.replays = replay.Replays()
        self.cuts: dict[tuple | None, slices.Cut | None] = {}  # by shape, which steps take a few images at a time

    def attach(self) -> None:
        """Puts the plan in the place of its module's forward."""
        self.module.__dict__.update(forward=self, _replicate_for_data_parallel=self.replicate)

    def arm(self) -> None:
        """Takes the guards, once every plan of the model is attached."""
        self.guards = Guards(self.module, self.inlined, self.called, self.names)
        for route in {id(r): r for r in self.routes.values()}.values():
            if isinstance(route, Route):
                route.arm()

    def replicate(self) -> nn.Module:
        """A replica for DataParallel: stock, because the plan's modules hold the original's tensors."""
        return detach(type(self.module)._replicate_for_data_parallel(self.module))

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.module).forward.__get__(self.module))

    @property
    def __code__(self) -> Any:  # torch.export asks where forward stands
        return inspect.unwrap(type(self.module).forward).__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = type(self.module).forward
        if torch.compiler.is_compiling() or executor.state.stock:
            return forward(self.module, *args, **kwargs)
        reason = self.refusal(args, kwargs)
        if reason in (executor.GRAD, executor.TRAINING):
            route, reason = self.route(args, kwargs)
            if route is not None:
                return trial.run(self, route, args)
        plain = None if reason is not None else self.contiguous(args)
        if plain is None:
            self._note(reason or MIXED)
            return forward(self.module, *args, **kwargs)
        key = self.kind(args, plain)
        if key in self.odd:
            self._note(ODD)
            return forward(self.module, *args)
        with tuner.tuning(self.tune) if self.tune else UNTUNED:
            return self._run(args, key[0]) if key in self.checked else self._check(key, args)

    def route(self, args: tuple, kwargs: dict) -> tuple[Route | None, str | None]:
        """The steps of a call that trains, or why there are none."""
        route = self.routes.get(self.module.training, NO_ROUTE)
        if isinstance(route, str):
            return None, route
        if args and training.stock_wins(args[0], self.recompute):
            return None, training.STOCK_WINS
        reason = route.refusal(args, kwargs) or (MIXED if self.contiguous(args) is None else None)
        return (route, None) if reason is None else (None, reason)

    def kind(self, args: tuple, plain: bool | None) -> tuple:
        """What kind of call this is, first of all what `contiguous` says of it: each is checked once."""
        device = args[0].device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return plain, device, args[0].dtype, autocast

    def refusal(self, args: tuple, kwargs: dict) -> str | None:
        """Why the plan cannot answer this call, or None: the guards."""
        if self.broken is not None:
            return self.broken
        if kwargs or len(args) != self.arity:
            return "called with other arguments than the plan was made for"
        reason = executor.ambient(args, self.module.parameters) or self.guards.changed()
        if reason is not None:
            return reason
        if self.replays.sight is None or not self.replays.sight.same():
            for launch in self.launches:
                reason = launch.blocked()
                if reason is not None:
                    return f"{launch.name}: {reason}"
            self.replays.sight = replay.Sight(self.launches)
        for x in args:
            if not x.is_floating_point() or x.is_cpu and not backends.all_finite(x):
                return "the input is not finite floating point"
            if not x.numel() or not x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last):
                return "the input is empty or has gaps"
        return None

    def contiguous(self, args: tuple) -> bool | None:
        """Whether stock would compute in contiguous memory here, so that results must be put back into it; None where
        inputs or weights differ, so that it cannot be said.
        """
        images = {executor.suggests_channels_last(x) for x in args if x.dim() == 4}
        if True in images:
            return None if len(images) > 1 else False
        # one value a filter says nothing
        weights = (conv._parameters.get("weight") for conv in self.convs)
        layouts = {executor.suggests_channels_last(w) for w in weights if w is not None and w.numel() != w.shape[0]}
        return None if images and len(layouts) > 1 else True not in layouts

    def chosen(self, args: tuple) -> list:
        """The steps for a call."""
        return self.steps

    def differs(self, result: Any, expected: Any, args: tuple) -> str | None:
        """What is wrong with the first result of a kind of calls, or None."""
        return difference(result, expected, args)

    def _run(self, args: tuple, convert: bool, answers: dict[int, list] | None = None, steps: list | None = None
             ) -> Any:
        # What only stems read is left to them, unless it is known that theirs are kernels for channels_last.
        plain = args[0].is_cpu and all(step.backend and not step.pooled for step in self.launches if step.pool)
        inner = tuple(x.contiguous(memory_format=torch.channels_last)
                      if x.dim() == 4 and (plain if i in self.given else convert or self.keep) else x
                      for i, x in enumerate(args))
        values = [*(inner if self.keep else args), *inner, *[None] * (self.size - 2 * len(args))]
        tidy = convert and not self.keep
        steps = self.chosen(args) if steps is None else steps
        key = slices.key_of(args) if answers is None and steps is self.steps else None
        cut, ruler, finite = self.cuts.get(key), None, True

        def run(some: list, over: list) -> bool:
            if answers is not None or ruler is not None or torch.autograd._profiler_enabled():
                return self._walk(some, over, tidy, finite, answers, ruler)
            images = [x if own is None else own for x, own in zip(args, over, strict=False)]  # those of a slice
            return self._replayed(some, over, images, tidy, finite)

        if cut is not None:
            finite = slices.run(cut, steps, values, 2 * len(args), run)
        elif key is not None and key not in self.cuts:
            kind = replay.kind_of(steps, list(args))
            recorded = [] if kind is None else self.replays.find(kind)
            if recorded is not None:  # what is played goes depth-first by itself
                ruler = slices.Ruler(steps, 2 * len(args))
        run(steps[cut.steps:] if cut else steps, values)
        if ruler is not None:
            cut = ruler.cut(args[0].shape[0])
            self.cuts[key] = None if cut and replay.covers(recorded or [], cut.steps) else cut

        def give(slot: Slot) -> Any:
            if tidy and slot.loose:
                values[slot.at] = executor.restore(values[slot.at])
            return values[slot.at] if tidy or not slot.loose else executor.settle(values[slot.at])

        return fill_slots(self.output, give)

    def _replayed(self, steps: list, values: list, inputs: list, tidy: bool, finite: bool) -> bool:
        """`_walk`, by what was recorded at an earlier call of this kind."""
        kind = replay.kind_of(steps, inputs)
        if kind is None:
            return self._walk(steps, values, tidy, finite)
        items = self.replays.find(kind)
        if items is not None:
            return self._walk(items, values, tidy, finite)
        recorder = replay.Recorder(steps)
        with recorder.listening():
            finite = self._walk(steps, values, tidy, finite, None, recorder)
        if recorder.whole:
            self.replays.keep(kind, steps, recorder.items)
        return finite

    def _walk(self, steps: list, values: list, tidy: bool, finite: bool, answers: dict[int, list] | None = None,
              watcher: slices.Ruler | replay.Recorder | None = None) -> bool:
        """Runs steps over values; returns whether no kernel has to look for NaN and Inf in what they made."""
        profiled = torch.autograd._profiler_enabled()
        for step in steps:
            if type(step) is replay.Stretch:
                if not (finite and step.play(values, None if self.opaque else self.replays.sight)):
                    finite = self._walk(step.steps, values, tidy, finite)
                continue
            if answers and step.opaque:
                value = answers[id(step.target)].pop(0)
            elif profiled and type(step) is Launch:
                with torch.profiler.record_function(f"fused_resnet::{step.name}"):
                    value = step.run(values, tidy, finite)
            else:
                value = step.run(values, tidy, finite)
            finite = finite and (step.steady or not step.heeded or _finite(value))
            values[step.out] = value
            if watcher is not None:
                watcher.saw(step, values)
            for slot in step.frees:
                values[slot] = None
        return finite

    def _check(self, key: tuple, args: tuple) -> Any:
        """The first call of its kind: the stock forward's answer counts unless the plan agrees with it."""
        if args[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return self._run(args, key[0])
        given = args
        if self.keep:
            given = tuple(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in args)
        chance = torch.get_rng_state()
        with self.listening() as answers:
            expected = type(self.module).forward(self.module, *given)
        after = torch.get_rng_state()
        torch.set_rng_state(chance)  # the plan draws the numbers that stock drew
        try:
            result = self._run(args, key[0], answers)
            problem = self.differs(result, expected, args)
        except torch.OutOfMemoryError:
            return expected  # not judged; tried again at the next call
        except (RuntimeError, TypeError, AttributeError, IndexError) as error:
            problem = f"it raised {type(error).__name__}: {error}"
        finally:
            torch.set_rng_state(after)
        if problem is None:
            self.checked.add(key)
            return result
        if problem.startswith(STRIDES):
            self.odd.add(key)
            self._note(ODD)
            return expected
        self.broken = f"the plan disagreed with the stock forward: {problem}"
        warnings.warn(f"fused_resnet leaves a {type(self.module).__name__} stock: {self.broken}. Please report this "
                      f"line with the source of its forward.", stacklevel=4)
        return expected

    @contextlib.contextmanager
    def listening(self, opaque: list | None = None) -> Iterator[dict[int, list]]:
        """Planned forwards step aside; what opaque modules answer is kept, so that they are called only once."""
        opaque = self.opaque if opaque is None else opaque
        answers: dict[int, list] = {id(m): [] for m in opaque}
        me = threading.get_ident()

        def keep(module: nn.Module, _: Any, answer: Any) -> None:
            if threading.get_ident() == me:
                answers[id(module)].append(answer)

        handles = [m.register_forward_hook(keep) for m in {id(m): m for m in opaque}.values()]
        try:
            with executor.as_stock():
                yield answers
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, reason: str) -> None:
        self.fallbacks[reason] = self.fallbacks.get(reason, 0) + 1


def _finite(value: Any) -> bool:
    """Whether no kernel could meet NaN or Inf in `value`; on a GPU they all take it as it comes."""
    return all(not t.is_cpu or not t.is_floating_point() or backends.all_finite(t)
               for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor))


def detach(module: nn.Module) -> nn.Module:
    """Takes the plan off `module`, if it has one."""
    if isinstance(module.__dict__.get("forward"), Plan):
        del module.__dict__["forward"], module.__dict__["_replicate_for_data_parallel"]
    return module


def difference(result: Any, expected: Any, inputs: tuple, tolerance: float | None = None) -> str | None:
    """What is wrong with `result`, or None; `tolerance` in the place of that of the dtype."""
    mine, shape = torch.utils._pytree.tree_flatten(result)
    theirs, wanted = torch.utils._pytree.tree_flatten(expected)
    if shape != wanted or type(result) is not type(expected):
        return f"{type(result).__name__} of {len(mine)} values in place of {type(expected).__name__} of {len(theirs)}"
    if _shared(mine, inputs) != _shared(theirs, inputs):
        return "its results share memory with each other or with the inputs in another way"
    for a, b in zip(mine, theirs, strict=True):
        if not isinstance(b, torch.Tensor):
            if a != b:
                return f"{a!r} in place of {b!r}"
            continue
        if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
            return f"shape {tuple(a.shape)}, {a.dtype} in place of {tuple(b.shape)}, {b.dtype}"
        if b.numel() and b.is_floating_point() and not b.is_meta:
            error = numerics.measure(a, b)
            if error.rel > (tolerance or PLAN_TOLERANCE.get(numerics.NAMES.get(b.dtype, ""), 0.2)):
                return f"relative rms error {error.rel:.2g}"
    odd = [(a.stride(), b.stride()) for a, b in zip(mine, theirs, strict=True)
           if isinstance(b, torch.Tensor) and a.stride() != b.stride()]
    return f"{STRIDES} {odd[0][0]} in place of {odd[0][1]}" if odd else None


def _shared(results: list, inputs: tuple) -> list[int]:
    """For every result the number of the first tensor, inputs first, that lies in the same memory."""
    owners: dict[int, int] = {}
    tensors = [t for t in (*inputs, *results) if isinstance(t, torch.Tensor) and not t.is_meta]
    return [owners.setdefault(t.untyped_storage().data_ptr(), i) for i, t in enumerate(tensors)]
