"""One row for each distinct launch of a fused model: its time, and what the hardware allows at best.

    floor = max(flops / matmul peak, bytes / copy bandwidth)        roofline_share = floor / time

Both ceilings are measured on the same machine in the same dtype. `flops` and `bytes` are the problem's own: every
input read once, the output written once. A share above 1 means that part of the data came from a cache.

Source: Williams, Waterman, Patterson, "Roofline", Communications of the ACM 52(4), 2009.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fused_resnet import backends, numerics, timing, tuner
from fused_resnet.bench.results import Row
from fused_resnet.bench.session import Job, precision, recorder_for
from fused_resnet.bench.stock import plain
from fused_resnet.fusing import fuse

MOST_INPUTS = 10
STOCK = "eager_channels_last"  # the provider of a launch's stock operators
Key = tuple[str, Any]  # (family, problem)
Tell = Callable[[str, float], None]


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches in one dtype: GFLOP/s of a dense product, GB/s of a large copy."""

    gflops: float
    gbytes: float

    @classmethod
    def measure(cls, dtype: str, device: str) -> Ceilings:
        with precision(dtype):
            return cls(timing.matmul_peak(numerics.DTYPES[dtype], device), timing.copy_bandwidth(device))

    def floor(self, flops: int, moved: int) -> tuple[float, str]:
        """(fewest milliseconds, "compute" or "memory": which of the two sets them)."""
        compute, memory = flops / self.gflops / 1e6, moved / self.gbytes / 1e6
        return max(compute, memory), "compute" if compute >= memory else "memory"


@dataclass(frozen=True)
class Layer:
    """A distinct launch of a model."""

    row: Row
    count: int  # how often one forward runs it
    tile: str
    floor_ms: float
    bound: str
    problem: Any  # what it solves: its FLOPs and bytes
    rivals: tuple[Row, ...] = ()  # on a GPU, the other backends that can run it, and stock

    @property
    def by_backend(self) -> dict[str, float]:
        """Backend -> median milliseconds of the launch, the chosen one first."""
        return {str(row.backend): row.ms_p50 for row in (self.row, *self.rivals) if row.ms_p50 is not None}


def measure(job: Job, model: nn.Module, images: torch.Tensor, ceilings: Ceilings, budget: float,
            tell: Tell = lambda what, share: None) -> list[Layer]:
    """Times each distinct launch of the fused model by itself, on the operands that it met in the model.

    On CUDA a replayed graph of launches over several inputs is timed, for a small layer runs shorter than the host
    takes to launch it. There the other backends are timed in the same rounds, each with its own tile, or the tuned one
    where it won.

    Args:
        job: which batch, dtype and device.
        model: the stock model in eval mode.
        images: [n, 3, H, W] fp32, n >= batch.
        ceilings: of the job's dtype and device.
        budget: seconds; each launch is timed three times at least.
        tell: receives what is being done and the share that is done.

    Returns:
        In the order of the first run. What runs stock is not among them.
    """
    fused, x = fused_of(job, model, images)
    end, found = time.perf_counter() + budget, []
    with torch.no_grad(), precision(job.dtype):
        counts, operands = _met(fused, x)
        for done, (key, count) in enumerate(counts.items()):
            tell(f"{job}: {key[1].id}", done / len(counts))
            share = (end - time.perf_counter()) / (len(counts) - done)
            times = _times(key, operands.pop(key), job.device, share)
            found.append(_layer(job, key, count, times, ceilings))
    return found


def fused_of(job: Job, model: nn.Module, images: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
    """The fused model and the batch that `measure` runs, for the same arguments."""
    dtype = numerics.DTYPES[job.dtype]
    fused = fuse(plain(copy.deepcopy(model)).to(job.device, dtype).eval(), memory_format=torch.channels_last)
    return fused, images[:job.batch].to(job.device, dtype, memory_format=torch.channels_last)


def _met(fused: nn.Module, x: torch.Tensor) -> tuple[dict[Key, int], dict[Key, Any]]:
    """How often each problem runs in one forward, and the operands of its first run."""
    for _ in range(2):  # the first run checks the kernels, the second packs what is left
        fused(x)
    operands: dict[Key, Any] = {}
    with backends.visited(lambda family, problem, given: operands.setdefault((family, problem), given)):
        fused(x)
    with tuner.recorded() as counts:
        fused(x)
    return counts, operands


def _rivals(family: str, problem: Any) -> list[str]:
    """The backends beside the chosen one; on a CPU none, where there is little to choose from."""
    if problem.device != "cuda":
        return []
    chosen = backends.choose(family, problem).name
    return [name for name in (*backends.kernels(family, problem), "reference") if name != chosen]


def _times(key: Key, operands: Any, device: str, budget: float) -> dict[str, list[float]]:
    """Milliseconds of single launches by backend, "" being the choice; one that fails is left out.

    The inputs exceed the cache where `MOST_INPUTS` of them do.
    """
    family, problem = key
    moved = {name: t for name, t in operands._asdict().items()
             if isinstance(t, torch.Tensor) and t.dim() == 4 and name != "weight"}
    size = sum(t.numel() * t.element_size() for t in moved.values())
    pool: list[Any] = [operands._replace(**{name: t.clone() for name, t in moved.items()})
                       for _ in range(timing.pool_size(size, device, MOST_INPUTS))]

    def launch(given: Any) -> Any:
        return backends.run(family, problem, given, True)

    recorder = recorder_for(device)
    if recorder is None:
        return timing.measure({"": launch}, {"": pool}, device=device, budget=budget)
    calls: dict[str, Callable[[Any], Any]] = {}
    for name in ("", *_rivals(family, problem)):
        try:
            with backends.use(name) if name else contextlib.nullcontext():
                _, replay = recorder.record(lambda: [launch(given) for given in pool], 1)
        except (RuntimeError, ValueError):  # of the choice itself it is the caller's to know
            if not name:
                raise
            continue
        calls[name] = functools.partial(_replayed, replay)
    samples = timing.measure(calls, dict.fromkeys(calls, pool), device=device, budget=budget)
    return {name: [ms / len(pool) for ms in times] for name, times in samples.items()}


def _replayed(replay: Callable[[], Any], given: Any) -> Any:
    return replay()


def _layer(job: Job, key: Key, count: int, times: dict[str, list[float]], ceilings: Ceilings) -> Layer:
    family, problem = key
    choice = backends.choose(family, problem)
    floor, bound = ceilings.floor(problem.flops, problem.bytes)
    stock = times[""] if choice.name == "reference" else times.get("reference")

    def row(provider: str, backend: str, found: list[float]) -> Row:
        low, half, high = timing.percentiles(found)
        return Row("layer", job.model, job.batch, job.dtype, job.device, provider, problem=problem.id,
                   graph=job.device == "cuda", backend=backend, ms_p20=low, ms_p50=half, ms_p80=high,
                   images_per_s=job.batch / half * 1e3, roofline_share=floor / half, samples=found,
                   vs_stock=None if stock is None else timing.paired_ratio(stock, found))

    rivals = tuple(row(STOCK if name == "reference" else f"fused_{name}", name, found)
                   for name, found in times.items() if name)
    tile = tuner.name_of({"backend": choice.name, "tile": choice.tile}) if choice.tile else choice.name
    return Layer(row("fused", choice.name, times[""]), count, f"{tile} ({choice.label})", floor, bound, problem, rivals)
