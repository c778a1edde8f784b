"""Runs jobs within a time budget: build, compare with fp64, count launches, time in random order, make rows.

What a job's mode decides, a forward or a training step, stands in `Inference` here and in `training.Training`.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fused_resnet import graphs, numerics, timing
from fused_resnet.bench import launches, pictures
from fused_resnet.bench.providers import Call, Provider, forget_compiled
from fused_resnet.bench.results import EAGER, Row
from fused_resnet.bench.stock import plain

ROUNDS_WANTED = 5
GRAPH_TREE_CALLS = 3  # torch.compile runs, then records, then replays: only then its output is that of the graph
TIMING_CAP = 15.0  # seconds of timing after which a job's medians no longer move


@dataclass(frozen=True)
class Job:
    """One group of rows: a model at a batch and dtype on a device."""

    model: str
    batch: int
    dtype: str
    device: str
    mode: str = "inference"

    @property
    def autocast(self) -> bool:
        """Training keeps its parameters in fp32; inference has them in the row's dtype."""
        return self.mode == "training" and self.dtype in ("bf16", "fp16")

    def __str__(self) -> str:
        return f"{self.model} {self.dtype}{' autocast' * self.autocast} batch {self.batch} {self.device}" + (
            "" if self.mode == "inference" else f" {self.mode}")


@dataclass
class Entry:
    """A provider within a job, with or without a CUDA graph, from its build to its row."""

    provider: Provider
    row: Row
    call: Call | None = None
    inputs: list[Any] = field(default_factory=list)
    launches: Counter[str] | None = None
    warm_ms: float = 0.0


@dataclass
class Group:
    """What a job gives: its rows with the launch counts, and what was left out and why."""

    job: Job
    entries: list[Entry]
    left_out: dict[str, str]
    rounds: int = 0

    @property
    def rows(self) -> list[Row]:
        return [entry.row for entry in self.entries]


Tell = Callable[[str, float], None]  # (what is being done, share of the job that is done)


def jobs(models: Sequence[str], batches: Sequence[int], dtypes: Sequence[str], devices: Sequence[str],
         modes: Sequence[str] = ("inference",)) -> list[Job]:
    """All combinations, most valuable first: the largest batch and the first dtype of every model lead.

    Training leaves out fp16, which needs a gradient scaler, and one picture, which has no batch to normalise over.
    """
    large_first = sorted(set(batches), reverse=True)
    rank = {Job(m, b, d, dev, mode): (large_first.index(b) + list(dtypes).index(d), list(devices).index(dev))
            for b in large_first for d in dtypes for dev in devices for mode in modes for m in models
            if mode == "inference" or d not in ("fp16", "int8") and b > 1}
    return sorted(rank, key=lambda job: rank[job])


class Inference:
    """What an inference job runs: its batches, how a provider becomes a callable, and what its results are judged by.

    Args:
        job: what to run.
        model: stock, in eval mode, fp32, on the CPU.
        images: [n, 3, H, W] fp32.
    """

    graphs = True  # providers are recorded as CUDA graphs, for rows of their own

    def __init__(self, job: Job, model: nn.Module, images: torch.Tensor) -> None:
        self.job = job
        self.model = copy.deepcopy(model).to(job.device, numerics.DTYPES[job.dtype]).eval()
        image_bytes = images[0].numel() * numerics.DTYPES[job.dtype].itemsize
        count = timing.pool_size(job.batch * image_bytes, job.device)
        self.pool = [b.to(job.device, numerics.DTYPES[job.dtype]) for b in
                     pictures.batches(images, job.batch, count)]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The setting that everything of this job runs in."""
        with torch.no_grad(), precision(self.job.dtype):
            yield

    def reference(self) -> int:
        """Runs the first batch through the stock model, in fp64 and in the row's precision; returns the FLOPs."""
        self.exact = logits(copy.deepcopy(self.model).double()(self.pool[0].double()))
        with FlopCounterMode(display=False) as counter:
            self.stock = logits(self.model(self.pool[0]))
        return counter.get_total_flops()

    def build(self, provider: Provider) -> tuple[Call, list[Any]]:
        """The provider's callable, and the batches in the form that it wants."""
        return provider.build(self.model, self.pool[0]), [provider.prepare(batch) for batch in self.pool]

    def judge(self, call: Call, batch: Any) -> numerics.Bound:
        """Compares what the callable makes of the first batch with the reference."""
        return numerics.check_network(logits(call(batch)).to(self.exact.device), self.stock, self.exact,
                                      dtype=self.job.dtype)

    def saved(self, provider: Provider, call: Call, batch: Any) -> float | None:
        """Megabytes kept for a backward: there is none."""
        return None


def work_of(job: Job, model: nn.Module, images: torch.Tensor) -> Any:
    """What the job's mode runs."""
    from fused_resnet.bench.training import Training  # which needs `Job`

    return (Training if job.mode == "training" else Inference)(job, model, images)


class Session:
    """Runs jobs one after the other and shares the budget between them.

    Args:
        models: name -> model in eval mode, fp32, on the CPU, calibrated. Of a model of ours its plain twin is run.
        images: [n, 3, H, W] fp32 pictures that every job's batches come from.
        providers: in order of value, of every mode; those whose build no longer fits a job's share are left out and
            named.
        budget: seconds for all jobs together. Every job gets its eager and fused rows whatever the budget.
        tell: receives progress.
    """

    def __init__(self, models: dict[str, nn.Module], images: torch.Tensor, providers: Sequence[Provider],
                 budget: float, tell: Tell = lambda what, share: None) -> None:
        self.models = {name: plain(model) for name, model in models.items()}
        self.images, self.providers, self.tell = images, providers, tell
        self.deadline = time.perf_counter() + budget
        self.costs = {p: p.cost for p in providers}
        self.peaks: dict[tuple[str, str], float] = {}

    def run(self, todo: Sequence[Job]) -> Iterator[Group]:
        """Yields each job's group as soon as it is complete, so that the caller can write it down."""
        weights = [2 + math.log2(job.batch) for job in todo]  # compiling costs the same at every batch, running more
        for index, job in enumerate(todo):
            left = max(0.0, self.deadline - time.perf_counter())
            yield self._run(job, left * weights[index] / sum(weights[index:]))

    def _run(self, job: Job, share: float) -> Group:
        forget_compiled()
        end = time.perf_counter() + share
        self.tell(f"{job}: fp64 reference", 0.0)
        work = work_of(job, self.models[job.model], self.images)
        group = Group(job, [], {})
        providers = [p for p in self.providers if p.mode == job.mode and p.takes(job.dtype)]
        with work.running():
            flops = work.reference()
            for index, provider in enumerate(providers):
                reason = provider.reason(job.device, job.dtype) or self._too_late(group, provider, end)
                if reason is not None:
                    group.left_out[provider.name] = reason
                    continue
                self.tell(f"{job}: {provider.name}", 0.7 * index / len(providers))
                started = time.perf_counter()
                entry = _prepare(job, provider, work)
                group.entries.append(entry)
                recorder = recorder_for(job.device)
                if entry.call is not None and provider.capturable and work.graphs and recorder is not None:
                    group.entries.append(_graphed(job, entry, work, recorder))
                self.costs[provider] = 0.5 * self.costs[provider] + 0.5 * (time.perf_counter() - started)
            self._time(group, end)
        _fill(group, flops, self._peak(job))
        return group

    def _too_late(self, group: Group, provider: Provider, end: float) -> str | None:
        if provider.name in EAGER or provider.ours:
            return None
        rounds = ROUNDS_WANTED * sum(timing.PAUSE + 2e-3 * e.warm_ms for e in group.entries)
        late = time.perf_counter() + self.costs[provider] + rounds > end
        return "the time budget is spent" if late else None

    def _time(self, group: Group, end: float) -> None:
        running = {e.row.label: e for e in group.entries if e.row.status == "ok" and e.call is not None}
        if not running:
            return
        self.tell(f"{group.job}: timing {len(running)} providers", 0.7)
        calls = {name: e.call for name, e in running.items() if e.call is not None}
        samples = timing.measure(
            calls, {name: e.inputs for name, e in running.items()}, device=group.job.device,
            budget=min(TIMING_CAP, end - time.perf_counter()),
            on_round=lambda share: self.tell(f"{group.job}: timing {len(running)} providers", 0.7 + 0.3 * share))
        group.rounds = len(next(iter(samples.values())))
        for name, entry in running.items():
            # Like with like: a graph's gain at small batches is not the provider's own.
            eager = [label for label, e in running.items()
                     if e.provider.name in EAGER and e.row.graph == entry.row.graph]
            best = min(eager, key=lambda label: timing.percentiles(samples[label])[1], default=None)
            p20, p50, p80 = timing.percentiles(samples[name])
            entry.row = replace(entry.row, ms_p20=p20, ms_p50=p50, ms_p80=p80, samples=samples[name],
                                images_per_s=group.job.batch / p50 * 1e3,
                                vs_stock=timing.paired_ratio(samples[best], samples[name]) if best else None)
        for entry in running.values():
            entry.call = None

    def _peak(self, job: Job) -> float:
        key = (job.dtype, job.device)
        if key not in self.peaks:
            with precision(job.dtype):
                self.peaks[key] = timing.matmul_peak(numerics.DTYPES[job.dtype], job.device)
        return self.peaks[key]


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Allows TF32 for a tf32 row and forbids it for every other."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def recorder_for(device: str) -> graphs.Recorder | None:
    """What records CUDA graphs on `device`; None where there are none."""
    return graphs.CudaRecorder(torch.device("cuda", torch.cuda.current_device())) if device == "cuda" else None


def _prepare(job: Job, provider: Provider, work: Any) -> Entry:
    """Builds one provider, compares its output, counts its launches and peak memory."""
    row = Row("model", job.model, job.batch, job.dtype, job.device, provider.name, job.mode, autocast=job.autocast,
              graph=provider.own_graphs and job.device == "cuda")
    entry = Entry(provider, row)
    try:
        call, entry.inputs = work.build(provider)
        for _ in range(GRAPH_TREE_CALLS if row.graph else 0):
            call(entry.inputs[0])
        _examine(job, entry, call, work)
        entry.row = replace(entry.row, backend=provider.backend(call))
    except Exception as error:  # a peer's failure is its row's business, the others go on
        entry.row = replace(row, status="failed", reason=one_line(error))
    return entry


def _graphed(job: Job, plain: Entry, work: Any, recorder: graphs.Recorder) -> Entry:
    """The same callable as one CUDA graph: what a step costs includes the copy into its static input."""
    row = replace(plain.row, graph=True)
    entry = Entry(plain.provider, row, inputs=plain.inputs)
    try:
        # A replay allocates nothing: the peak is that of the recording, whose memory the graph keeps.
        with timing.PeakMemory(job.device) as peak:
            bucket = graphs.Bucket(plain.call, plain.inputs[-1:], recorder)  # type: ignore[arg-type]
        _examine(job, entry, lambda batch: bucket.run((batch,), copy=False), work)
        entry.row = replace(entry.row, peak_mem_mb=peak.mb)
    except Exception as error:
        entry.row = replace(row, status="failed", reason=one_line(error), rel_error=None, launches=None,
                            peak_mem_mb=None)
    return entry


def _examine(job: Job, entry: Entry, call: Call, work: Any) -> None:
    """Compares a callable's output with fp64. Only where it is right are launches counted and may it be timed."""
    bound = work.judge(call, entry.inputs[0])
    row = replace(entry.row, rel_error=bound.error.rel)
    if not bound.ok:
        entry.row = replace(row, status="wrong", reason=str(bound), launches=None, peak_mem_mb=None)
        return
    saved = work.saved(entry.provider, call, entry.inputs[0])
    if job.mode == "training":
        call(entry.inputs[0])  # the first step makes the optimizer's buffers
    with timing.PeakMemory(job.device) as peak:
        started = time.perf_counter()
        call(entry.inputs[-1])
    entry.warm_ms = (time.perf_counter() - started) * 1e3
    if entry.provider.counted or job.device == "cuda":
        entry.launches = launches.count(lambda: call(entry.inputs[0]), device=job.device)
    counted = None if entry.launches is None else sum(entry.launches.values())
    entry.row = replace(row, peak_mem_mb=peak.mb, saved_mb=saved, launches=counted)
    entry.call = call


def logits(output: Any) -> torch.Tensor:
    """The logits of a plain network or of one that returns a Hugging Face output or a tuple."""
    if isinstance(output, torch.Tensor):
        return output
    return output.logits if hasattr(output, "logits") else logits(output[0])


def one_line(error: BaseException) -> str:
    """An exception as one short line."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:200]


def _fill(group: Group, flops: int, peak: float) -> None:
    for entry in group.entries:
        if entry.row.ms_p50 and entry.row.dtype != "int8":  # whose peak no operator of PyTorch's reaches
            entry.row = replace(entry.row, roofline_share=flops / entry.row.ms_p50 / 1e6 / peak)
