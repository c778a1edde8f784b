"""Times callables against each other, so that their ratio means something on a machine that drifts.

One round runs every provider once, in random order; ratios are paired within a round and their
median is reported. On a CPU a 50 ms pause lets the thread pools of other providers stop spinning and
one untimed call refills the caches, then one call is timed. On CUDA, events bracket the call. Each
call takes the next batch of a pool that exceeds the last-level cache.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

PAUSE = 0.05
MIN_ROUNDS = 3
MAX_ROUNDS = 40
FALLBACK_CACHE = 64 << 20

Call = Callable[[object], object]


def measure(calls: Mapping[str, Call], inputs: Mapping[str, Sequence[object]], *, device: str = "cpu",
            budget: float = 10.0, min_rounds: int = MIN_ROUNDS, max_rounds: int = MAX_ROUNDS, seed: int = 0,
            on_round: Callable[[float], None] | None = None) -> dict[str, list[float]]:
    """Times every call in rounds of random order until the budget is spent.

    Args:
        calls: provider -> callable that takes one batch.
        inputs: provider -> batches in the form that it wants; the rounds rotate through them.
        device: "cpu" or "cuda".
        budget: seconds; at least `min_rounds` rounds run whatever it says.
        seed: of the order.
        on_round: called after each round with the share of the budget that is spent.

    Returns:
        provider -> milliseconds, one figure a round, in the order of the rounds.
    """
    one = _time_cuda if device == "cuda" else _time_cpu
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle, start = list(calls), random.Random(seed), time.perf_counter()
    for done in range(max_rounds):
        spent = time.perf_counter() - start
        if done >= min_rounds and spent * (done + 1) / done > budget:
            break
        shuffle.shuffle(order)
        for name in order:
            pool = inputs[name]
            samples[name].append(one(calls[name], pool[2 * done % len(pool)], pool[(2 * done + 1) % len(pool)]))
        if on_round is not None:
            spent = time.perf_counter() - start
            on_round(min(1.0, max(spent / budget if budget > 0 else 1.0, (done + 1) / max_rounds)))
    return samples


def _time_cpu(call: Call, warm: object, batch: object) -> float:
    time.sleep(PAUSE)
    call(warm)
    start = time.perf_counter()
    call(batch)
    return (time.perf_counter() - start) * 1e3


def _time_cuda(call: Call, warm: object, batch: object) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    call(warm)
    torch.cuda.synchronize()
    start.record()
    call(batch)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile, interpolated."""
    ordered = sorted(samples)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return at(0.2), at(0.5), at(0.8)


def paired_ratio(baseline: Sequence[float], samples: Sequence[float]) -> float:
    """How many times faster `samples` is than `baseline`: the median of the ratios within each round."""
    return statistics.median(b / s for b, s in zip(baseline, samples, strict=True))


def cache_bytes(device: str = "cpu") -> int:
    """Size of the last-level cache (the sum over its instances on a CPU), 64 MiB where it cannot be read."""
    if device == "cuda":
        return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", FALLBACK_CACHE))
    sizes = {}
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index3"):
        try:
            shared, size = (index / "shared_cpu_list").read_text(), (index / "size").read_text().strip()
            sizes[shared] = int(size[:-1]) << {"K": 10, "M": 20, "G": 30}[size[-1]]
        except (OSError, ValueError, KeyError, IndexError):
            continue
    return sum(sizes.values()) or FALLBACK_CACHE


def pool_size(batch_bytes: int, device: str = "cpu", most: int = 64) -> int:
    """How many batches exceed the cache together, at least two and at most `most`."""
    return min(most, max(2, -(-cache_bytes(device) // max(1, batch_bytes)) + 1))


def matmul_peak(dtype: torch.dtype, device: str = "cpu") -> float:
    """Measured GFLOP/s of dense multiplication, the best of many runs: the ceiling for `roofline_share`.

    CUDA: a square matmul of 8192. CPU: the better of a square matmul of 1024 and a 3x3 convolution of 256 channels,
    because torch's fp32 matmul is MKL's, which was measured at 201 GFLOP/s where oneDNN reaches 491 (two AMD cores).
    """
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    peak = _best_rate(lambda _: a @ b, 2 * size**3, device)
    if device == "cuda":
        return peak
    x = torch.randn(8, 256, 28, 28).to(dtype, memory_format=torch.channels_last)
    w = torch.randn(256, 256, 3, 3).to(dtype, memory_format=torch.channels_last)
    return max(peak, _best_rate(lambda _: torch.conv2d(x, w, padding=1), 2 * 8 * 28 * 28 * 256 * 256 * 9, device))


def copy_bandwidth(device: str = "cpu") -> float:
    """Measured GB/s of a copy that exceeds every cache, bytes read and bytes written, the best of many runs."""
    size = max(1 << 30 if device == "cuda" else 1 << 27, 4 * cache_bytes(device))
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return _best_rate(lambda _: target.copy_(source), 2 * size, device)


def _best_rate(call: Call, work: int, device: str) -> float:
    """Billions a second, of whatever `work` counts, in the fastest of sixteen calls."""
    def once() -> float:
        if device == "cuda":
            return _time_cuda(call, None, None)
        start = time.perf_counter()
        call(None)
        return (time.perf_counter() - start) * 1e3

    return work / min(once() for _ in range(16)) / 1e6


class PeakMemory:
    """Peak memory of the calls inside the `with` block, beyond what was held when it began.

    On CUDA: the allocator's peak. On a Linux CPU: the growth of the process's peak resident set, which
    the kernel resets on request; `mb` stays None where it cannot be reset.
    """

    mb: float | None = None

    def __init__(self, device: str) -> None:
        self.device = device

    def __enter__(self) -> PeakMemory:
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = float(torch.cuda.memory_allocated())
            return self
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _status("VmRSS")
        except (OSError, KeyError):
            self._before = -1.0
        return self

    def __exit__(self, *_: object) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.mb = (torch.cuda.max_memory_allocated() - self._before) / 2**20
        elif self._before >= 0:
            self.mb = max(0.0, _status("VmHWM") - self._before) / 2**20


def _status(key: str) -> float:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return float(fields[key].split()[0]) * 1024
