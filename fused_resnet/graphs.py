"""capture: a model as CUDA graphs over static buffers, one graph for each bucket of batch sizes.

A graph replays launches with the addresses and the arguments of their recording. What the host does in
between is not repeated: hooks, prints, choices, checks, packing. So everything that looks at values or
allocates for good (self-checks, tuning, compilation, folded weights) happens in the warm-up runs on a side
stream, the graph keeps alive whatever it reads, and after each replay, while the GPU works, the host compares
the model with the one that was recorded; where they differ, it records afresh and answers again.
"""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch._prims_common import suggest_memory_format
from torch.utils._pytree import tree_flatten, tree_unflatten

from fused_resnet import backends
from fused_resnet.kernels import packing

PLAIN_LEAVES = (torch.Tensor, bool, int, float, str, type(None))
_version = operator.attrgetter("_version")
_recording = threading.RLock()  # PyTorch records one graph at a time in a process


class Recorder(Protocol):
    """Turns calls into replays; a test puts one here that needs no GPU."""

    def record(self, call: Callable[[], Any], warmup: int) -> tuple[Any, Callable[[], None]]:
        """Warms `call` up and records it: (what it returned, a function that computes the same tensors again)."""

    def follow(self) -> None:
        """Orders the current stream behind the one that used the static buffers last."""

    def drain(self) -> None:
        """Waits until no replay is running."""


class CudaRecorder:
    """CUDA graphs that share one memory pool. They must not run at the same time.

    Args:
        device: where the recorded calls run.
        pool: a handle of `torch.cuda.graph_pool_handle()` or `CUDAGraph.pool()`, to share memory with other graphs.
    """

    def __init__(self, device: torch.device, pool: Any = None) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle() if pool is None else pool
        # One stream for all recordings: a block of the pool is used again only on the stream that it was made for.
        self._side = torch.cuda.Stream(device)
        self._last: torch.cuda.Stream | None = None

    def record(self, call: Callable[[], Any], warmup: int) -> tuple[Any, Callable[[], None]]:
        """Warm-up runs and the recording, both on the side stream."""
        with _recording, torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self._side.wait_stream(current)
            with torch.cuda.stream(self._side):
                for _ in range(warmup):
                    call()
            current.wait_stream(self._side)
            graph = torch.cuda.CUDAGraph()
            # Other threads may allocate meanwhile, which the default mode forbids.
            with torch.cuda.graph(graph, pool=self.pool, stream=self._side, capture_error_mode="thread_local"):
                result = call()
        return result, graph.replay

    def follow(self) -> None:
        current = torch.cuda.current_stream(self.device)
        if self._last is not None and self._last != current:
            current.wait_stream(self._last)
        self._last = current

    def drain(self) -> None:
        torch.cuda.synchronize(self.device)


class Bucket:
    """One recorded batch size, with the static buffers that it reads and writes.

    Args:
        call: takes the inputs. Whatever it reads besides must stay as it is.
        inputs: tensors [size, ...]; their copies are the static inputs, in their memory format.
        recorder: makes the graph.
        warmup: runs before the recording.

    Raises:
        ValueError: the call returns something other than tensors and plain values in tuples, lists and dicts.
    """

    def __init__(self, call: Callable[..., Any], inputs: Sequence[torch.Tensor], recorder: Recorder,
                 warmup: int = 3) -> None:
        self.size = inputs[0].shape[0]
        self._filled = self.size
        with torch.inference_mode(False), torch.no_grad(), _uncached_autocast(), packing.holding() as self._held:
            self.inputs = tuple([x.detach().clone() for x in inputs])
            result, self._replay = recorder.record(lambda: call(*self.inputs), warmup)
        self.outputs, self._tree = tree_flatten(result)
        for leaf in self.outputs:
            if not isinstance(leaf, PLAIN_LEAVES):
                raise ValueError(f"the model returns a {type(leaf).__name__}; capture() takes tensors in tuples, lists "
                                 f"and dicts")

    def packs_current(self) -> bool:
        """Whether all packed weights that the graph reads are still those that eager calls would read."""
        return self._held.current()

    def run(self, inputs: Sequence[torch.Tensor], copy: bool = True) -> Any:
        """Replays the graph for the first n <= size rows.

        Args:
            inputs: tensors [n, ...].
            copy: False gives views of the static outputs, which the next run overwrites.
        """
        n = inputs[0].shape[0]
        with torch.no_grad():
            for buffer, x in zip(self.inputs, inputs, strict=True):
                (buffer if n == self.size else buffer[:n]).copy_(x)
                if n < self._filled:  # nothing of an earlier, larger batch stays
                    buffer[n:self._filled].zero_()
            self._filled = n
            self._replay()
            return tree_unflatten([self._give(leaf, n, copy) for leaf in self.outputs], self._tree)

    def _give(self, leaf: Any, n: int, copy: bool) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        rows = leaf if n == self.size else leaf[:n]
        return rows.clone() if copy else rows

    @torch.no_grad()
    def whole_only(self) -> str:
        """Why this graph answers for whole batches only, or "": NaN in the last row must not reach another row."""
        tensors = [leaf for leaf in self.outputs if isinstance(leaf, torch.Tensor)]
        if any(t.dim() == 0 or t.shape[0] != self.size for t in tensors):
            return "the model returns a tensor whose first dimension is not the batch"
        floats = [t for t in tensors if t.is_floating_point()]
        self._replay()
        before = [t[:-1].isnan() for t in floats]
        for x in self.inputs:
            if x.is_floating_point():
                x[-1].fill_(float("nan"))
        self._replay()
        spread = any(bool((t[:-1].isnan() & ~was).any()) for t, was in zip(floats, before, strict=True))
        return "the model mixes the rows of a batch" if spread else ""


@contextlib.contextmanager
def _uncached_autocast() -> Iterator[None]:
    """Autocast keeps no casts: they would be freed at its end, and the graph reads them."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class _Snapshot:
    """The model and its surroundings when a graph was recorded. Keeps all memory alive that the graph reads."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        modules = list(model.modules())
        self._device = device.type
        self._children = [(m._modules, dict(m._modules)) for m in modules]
        self._tables: list[dict[str, Any]] = [table for m in modules for table in (m._parameters, m._buffers)]
        self._stamp = self._now()
        # `.to()` and `.data =` exchange the memory of a tensor: an alias keeps what it had.
        self._alive = [t.detach() for t in self._tensors()]

    def _tensors(self) -> list[torch.Tensor]:
        return [t for table in self._tables for t in table.values() if t is not None]

    def _now(self) -> tuple[Any, ...]:
        tensors = self._tensors()
        try:
            versions = list(map(_version, tensors))
        except RuntimeError:  # an inference tensor counts none, and nothing packed from it is kept either
            versions = [-1 if t.is_inference() else t._version for t in tensors]
        autocast = torch.is_autocast_enabled(self._device) and torch.get_autocast_dtype(self._device)
        return (list(map(id, tensors)), versions, list(map(torch.Tensor.data_ptr, tensors)), autocast,
                torch.backends.cudnn.allow_tf32, backends.forced())

    def current(self) -> bool:
        return all(now == then for now, then in self._children) and self._now() == self._stamp


class Captured:
    """What `capture` returns. Called like the model, from any thread and on any stream.

    `batches` are the sizes of the buckets, `buckets` the graphs recorded so far by size. `close()` (or leaving a
    `with` block) frees the graphs and their memory.
    """

    def __init__(self, model: nn.Module, sample: torch.Tensor | tuple[torch.Tensor, ...],
                 batches: Sequence[int] | None, warmup: int, recorder: Recorder | None) -> None:
        self.model, self._warmup, self._recorder = model, warmup, recorder
        inputs = sample if isinstance(sample, tuple) else (sample,)
        self._like = [(tuple(x.shape[1:]), x.dtype, x.device) for x in inputs]
        self._layouts = [suggest_memory_format(x) for x in inputs]  # of every bucket, whatever input it is made for
        self._modules = list(model.modules())
        self._lock = threading.RLock()
        self._closed = False
        self._recorded: dict[int, tuple[Bucket, _Snapshot, str]] = {}
        n = self._rows(inputs)
        self.batches = _sizes(n) if batches is None else tuple(sorted(set(batches)))
        if recorder is not None:
            recorder.follow()
            for size in self.batches[-1:] if batches is None else reversed(self.batches):
                self._record(size, inputs)  # the largest first: the others find room in the memory that it frees

    @property
    def buckets(self) -> dict[int, Bucket]:
        """The graphs recorded so far, by batch size; none on a CPU."""
        return {size: bucket for size, (bucket, _, _) in sorted(self._recorded.items())}

    def __call__(self, *inputs: torch.Tensor, copy: bool = True) -> Any:
        """The model's answer, without gradients.

        Args:
            inputs: as the sample was: same dtype, device and sizes but for the batch, any strides, any batch.
            copy: False saves the copy of the results where one graph holds the whole batch: they are views of
                static memory, valid until the next call.

        Raises:
            ValueError: another number of inputs, or one of another size, dtype or device, or that requires a
                gradient; the model is in training mode; the object is closed; a batch that needs padding or
                cutting, for a model that mixes the rows of a batch.
        """
        n = self._rows(inputs)
        if self._recorder is None or not n or inputs[0].is_cuda and torch.cuda.is_current_stream_capturing():
            with torch.no_grad():  # inside of another recording the model becomes part of that one
                return self.model(*inputs)
        with self._lock:
            self._recorder.follow()
            largest = self.batches[-1]
            if n <= largest:
                return self._run(inputs, copy, False)
            return _joined([self._run([x[at:at + largest] for x in inputs], True, True)
                            for at in range(0, n, largest)])

    def _rows(self, inputs: Sequence[Any]) -> int:
        """The batch of checked inputs."""
        if self._closed:
            raise ValueError("the captured model is closed")
        if any(m.training for m in self._modules):
            raise ValueError("the model is in training mode: capture() runs inference, call .eval() first")
        if len(inputs) != len(self._like):
            raise ValueError(f"the model was captured with {len(self._like)} inputs, got {len(inputs)}")
        for x, (sizes, dtype, device) in zip(inputs, self._like, strict=True):
            if not isinstance(x, torch.Tensor):
                raise ValueError(f"expected a tensor, got a {type(x).__name__}")
            if x.dim() != len(sizes) + 1 or x.shape[1:] != sizes or x.shape[0] != inputs[0].shape[0]:
                raise ValueError(f"expected inputs of {('N', *sizes)} with one N, got {tuple(x.shape)}")
            if x.dtype != dtype or x.device != device:
                raise ValueError(f"expected {dtype} on {device}, got {x.dtype} on {x.device}")
            if x.requires_grad and torch.is_grad_enabled():
                raise ValueError("an input requires a gradient, which a graph does not give")
        return inputs[0].shape[0]

    def _run(self, inputs: Sequence[torch.Tensor], copy: bool, part: bool) -> Any:
        n = inputs[0].shape[0]
        size = next(size for size in self.batches if size >= n)
        while True:
            fresh = size not in self._recorded
            if fresh:
                self._record(size, inputs)
            bucket, snapshot, whole_only = self._recorded[size]
            if whole_only and (part or n != size):
                raise ValueError(f"a batch of {n} cannot run as a part of {size}: {whole_only}; capture it with "
                                 f"batches=({n},)")
            result = bucket.run(inputs, copy)
            # Asked after the launch: it takes the host as long as many kernels take. What is stale is only wasted.
            if fresh or snapshot.current() and bucket.packs_current():
                return result
            del bucket, snapshot, result
            self._drop(size)

    def _record(self, size: int, inputs: Sequence[torch.Tensor]) -> None:
        assert self._recorder is not None
        self._modules = list(self.model.modules())
        self._rows(inputs)
        n = inputs[0].shape[0]
        full = [(x if n == size else x[torch.arange(size, device=x.device) % n]).contiguous(memory_format=layout)
                for x, layout in zip(inputs, self._layouts, strict=True)]
        bucket = Bucket(self.model, full, self._recorder, self._warmup)
        self._recorded[size] = bucket, _Snapshot(self.model, inputs[0].device), bucket.whole_only()

    def _drop(self, size: int) -> None:
        assert self._recorder is not None
        self._recorder.drain()  # a replay may still read what is freed now
        del self._recorded[size]

    def close(self) -> None:
        """Frees the graphs and their memory; the model stays as it is. Further calls raise."""
        with self._lock:
            self._closed = True
            for size in list(self._recorded):
                self._drop(size)

    def __enter__(self) -> Captured:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        takes = ", ".join(f"{dtype} {('N', *sizes)} on {device}" for sizes, dtype, device in self._like)
        state = "closed" if self._closed else f"recorded={tuple(self.buckets)}" if self._recorder else "without graphs"
        return f"Captured({type(self.model).__name__}, {takes}, batches={self.batches}, {state})"


def _sizes(largest: int) -> tuple[int, ...]:
    """The powers of two below `largest`, and `largest`."""
    return (*[1 << i for i in range(largest.bit_length()) if 1 << i < largest], largest)


def _joined(results: list[Any]) -> Any:
    """Results of consecutive rows as one."""
    leaves, trees = zip(*map(tree_flatten, results), strict=True)
    return tree_unflatten([torch.cat(parts) if isinstance(parts[0], torch.Tensor) else parts[0]
                           for parts in zip(*leaves, strict=True)], trees[0])


def capture(model: nn.Module, sample: torch.Tensor | tuple[torch.Tensor, ...], *, batches: Sequence[int] | None = None,
            warmup: int = 3, pool: Any = None) -> Captured:
    """The model as a callable that replays CUDA graphs: one launch from the host for the whole network.

    A batch of n runs in the smallest bucket that holds it, its rows copied into the static input and zeros behind
    them; larger batches than the largest bucket run piece by piece. This asks for rows that do not depend on each
    other, as those of a CNN in eval mode; it is checked with a row of NaN, and a model that fails (or returns
    a tensor without the batch in front) runs in batches of exactly a bucket's size only. Results are copies.

    The graph holds what surrounded the recording. A call after parameters, buffers or submodules were changed or
    moved (optimizer step, `load_state_dict`, `.to()`, training, `fused_resnet.refresh`), or under another autocast,
    TF32 switch or `backends.use`, records afresh. Not noticed, as by any CUDA graph: tensors that are no parameters
    or buffers, hooks and other Python code of the forward, which run while recording only. Graphs keep the memory of
    the parameters that they were recorded with until then, or until `close()`.

    On any other device than CUDA the model itself runs, under the same checks: code stays portable.

    Args:
        model: any module in eval mode, fused or stock, which takes tensors [N, ...] and returns tensors, or tuples,
            lists and dicts of them.
        sample: an input, or a tuple of inputs, on the model's device; its values warm the model up.
        batches: sizes of the buckets, all recorded now. Default: the powers of two up to the sample's batch and that
            batch itself; its graph is recorded now, the others when they are first needed.
        warmup: runs before each recording; self-checks, tuning and compilation happen there.
        pool: a CUDA graph memory pool to share.

    Returns:
        A `Captured`.

    Raises:
        ValueError: the model is no module or in training mode; the sample holds something else than tensors, or no
            rows, or requires a gradient; a batch size or `warmup` is not positive.

    Source: torch.cuda.make_graphed_callables for warm-up and autocast.
    """
    inputs = sample if isinstance(sample, tuple) else (sample,)
    if not isinstance(model, nn.Module):
        raise ValueError(f"capture() takes an nn.Module, got {type(model).__name__}")
    for x in inputs or (None,):
        if not isinstance(x, torch.Tensor) or x.dim() == 0 or x.shape[0] == 0:
            raise ValueError(f"the sample must be tensors with rows, got "
                             f"{tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__}")
    if batches is not None and (not batches or any(type(n) is not int or n < 1 for n in batches)):
        raise ValueError(f"batches must be positive whole numbers, got {batches!r}")
    if type(warmup) is not int or warmup < 1:
        raise ValueError(f"warmup must be a positive whole number, got {warmup!r}")
    recorder = CudaRecorder(inputs[0].device, pool) if inputs[0].is_cuda else None
    return Captured(model, sample, batches, warmup, recorder)
