"""Measures every way to run a problem here, and keeps the fastest for the chooser.

Each candidate is judged against fp64 before it is timed: a kernel that is wrong, or does not compile, is out. Times
are taken in rounds of random order on inputs that rotate past the cache: on a CPU call by call, on CUDA as a replayed
graph with one launch for each input, because a small layer runs shorter than its launch takes on the host. Stock is
always among the candidates, and what is slower than it by more than noise never wins.

cuDNN and stock run with `torch.backends.cudnn.benchmark` as the user has set it, because that is how they will run
afterwards; the row keeps the setting. Change it, and tune again.

    with torch.no_grad(), tuner.tuning():   # measures what this machine has no row for, at its first use
        model(x)
    rows = tuner.tune(family, problem, operands, budget=20)
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fused_resnet import backends, timing
from fused_resnet.judge import Judge
from fused_resnet.problem import ConvProblem

SECONDS = 2.0  # for one problem at its first use; compiling may overrun it by one kernel
PREPARING = 0.6  # share of the budget after which no further candidate is compiled
NOISE = 1.02  # how many times faster than what is simpler a candidate must be: 2 % is what quiet machines repeat to
MIN_ROUNDS = 5
MOST_INPUTS = 10
# Ties go to the first: on CUDA to what PyTorch itself runs, then to what is compiled already, because it spares the
# host most. On a CPU to oneDNN, because plans look through what stock returns for NaN before the next kernel, and that
# pass is not in stock's time.
ORDER = {"cuda": ("reference", "cudnn", "cuda", "triton"), "cpu": ("cpu", "reference")}
# Rows that nobody needs to measure again.
SETTLED = ("tuned", "shipped")

UNCHANGED = contextlib.nullcontext()

log = logging.getLogger("fused_resnet")
_one_at_a_time = threading.Lock()
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Candidate:
    """One way to run a problem."""

    backend: str
    tile: dict[str, Any] | None
    forward: Callable[[Any, Any], Any]
    folded: bool = False


def candidates(family: str, problem: ConvProblem) -> list[Candidate]:
    """Every way to run `problem` on this machine: stock, then backend by backend, the shipped tile first.

    Triton's interpreter is none of them: it runs on a CPU to be right, not to be fast.
    """
    found = [Candidate("reference", None, backends.reference(family))]
    kernels = backends.kernels(family, problem)
    for name in ORDER.get(problem.device, ()):
        kernel = kernels.get(name)
        if kernel is None:
            continue
        if hasattr(kernel, "candidates"):
            found += [Candidate(name, tile and asdict(tile), kernel.with_tile(asdict(tile)) if tile else kernel.forward,
                                kernel.FOLDED) for tile in backends.tiles(kernel, problem)]
        else:
            found.append(Candidate(name, None, kernel.forward, kernel.FOLDED))
    return found


def measure(family: str, problem: ConvProblem, operands: Any, budget: float = SECONDS,
            on_progress: Progress | None = None, ways: Sequence[Candidate] | None = None) -> list[dict[str, Any]]:
    """Judges and times every candidate.

    Args:
        family: the kernel family.
        problem: what is run.
        operands: finite tensors, laid out as the family wants them. They are not written to.
        budget: seconds. When `PREPARING` of it is used the candidates that are left are not prepared and have no
            row; stock and one kernel of each backend always have.
        on_progress: receives the share of the work that is done.
        ways: what to measure, stock first; by default all `candidates`.

    Returns:
        A row for each candidate: backend; tile (dict or None); status "ok", "wrong" or "failed"; detail, why it is not
        ok; rel_error against fp64; and where it is ok ms_p20, ms_p50, ms_p80 of one launch, vs_stock (above 1 is
        faster) and winner, which is True in one row.

    Raises:
        ValueError: the result is not finite, which leaves nothing to judge by.
        RuntimeError: stock itself fails, as for want of memory.
    """
    end, tell = time.perf_counter() + budget, on_progress or (lambda share: None)
    cuda = problem.device == "cuda"
    here = torch.cuda.device(next(t.device for t in operands if isinstance(t, torch.Tensor))) if cuda else UNCHANGED
    with torch.no_grad(), here:
        pool, ways = _inputs(problem, operands), ways or candidates(family, problem)
        operands = operands._replace(reuse=False)  # as copied, those that are timed keep the flag
        judge = Judge(backends.reference(family), problem, operands)
        if not judge.finite:
            raise ValueError("the result is not finite, nothing can be judged by it")
        rows: list[dict[str, Any]] = []
        calls: dict[int, timing.Call] = {}
        memory = torch.cuda.graph_pool_handle() if cuda else None
        for done, way in enumerate(ways):
            late = time.perf_counter() > end - (1 - PREPARING) * budget
            if late and any(row["backend"] == way.backend for row in rows):
                continue
            rows.append(_judged(way, judge, operands))
            if rows[-1]["status"] == "ok":
                try:
                    calls[len(rows) - 1] = _call(way, problem, pool, memory)
                except RuntimeError as error:
                    rows[-1].update(status="failed", detail=_line(error))
            tell(PREPARING * (done + 1) / len(ways))
        del judge
        names = {str(i): i for i in calls}
        samples = timing.measure(
            {name: calls[i] for name, i in names.items()}, dict.fromkeys(names, pool),
            device="cuda" if cuda else "cpu", budget=end - time.perf_counter(), min_rounds=MIN_ROUNDS,
            on_round=lambda share: tell(PREPARING + (1 - PREPARING) * share))
    launches = len(pool) if cuda else 1
    _rank(rows, {names[name]: [ms / launches for ms in times] for name, times in samples.items()},
          ORDER.get(problem.device, ("reference",)))
    return rows


def tune(family: str, problem: ConvProblem, operands: Any, budget: float = SECONDS,
         on_progress: Progress | None = None) -> list[dict[str, Any]]:
    """`measure`, and the winner is what this user's processes run on this device from now on.

    The arguments, the rows and the errors are those of `measure`.
    """
    rows = measure(family, problem, operands, budget, on_progress)
    best = next(row for row in rows if row["winner"])
    backends.adopt(family, problem, {
        **{name: best[name] for name in ("backend", "tile", "ms_p50", "vs_stock")}, "measured": len(rows),
        "cudnn_benchmark": torch.backends.cudnn.benchmark})
    return rows


@contextlib.contextmanager
def tuning(seconds: float = SECONDS) -> Iterator[None]:
    """Tunes each problem that has neither a row in the user's cache nor a shipped one, when it first runs inside.

    Does nothing where it is entered with gradients enabled; and nothing while a CUDA graph is captured, under
    `backends.use` or FUSED_RESNET_BACKEND, nor with operands that are not finite. A problem that could not be
    measured is not tried again in this process. One line a problem goes to the logger "fused_resnet", level INFO.

    Args:
        seconds: for each problem.
    """
    if torch.is_grad_enabled():
        yield
        return
    with backends.visited(lambda family, problem, operands: _first_use(family, problem, operands, seconds), once=True):
        yield


@contextlib.contextmanager
def recorded() -> Iterator[dict[tuple[str, ConvProblem], int]]:
    """Yields a dict that counts, for every (family, problem), how often it ran inside."""
    counts: dict[tuple[str, ConvProblem], int] = {}

    def count(family: str, problem: ConvProblem, _: Any) -> None:
        counts[family, problem] = counts.get((family, problem), 0) + 1

    with backends.visited(count):
        yield counts


def _first_use(family: str, problem: ConvProblem, operands: Any, seconds: float) -> None:
    if backends.forced() or problem.device == "cuda" and torch.cuda.is_current_stream_capturing():
        return
    choice = backends.choose(family, problem)
    if choice.tried or choice.label in SETTLED:
        return
    with _one_at_a_time:  # a neighbour that computes would be measured, too
        choice = backends.choose(family, problem)
        if choice.tried or choice.label in SETTLED:
            return
        choice.tried = True
        if len(candidates(family, problem)) == 1:
            return
        started = time.perf_counter()
        try:
            rows = tune(family, problem, operands, seconds)
        except (ValueError, RuntimeError) as error:
            log.info("could not tune %s %s: %s", family, problem.id, _line(error))
            return
        log.info("tuned %s %s: %s, in %.1f s", family, problem.id, describe(rows), time.perf_counter() - started)


def describe(rows: list[dict[str, Any]]) -> str:
    """The winner, its time, its speed-up over stock and how many candidates there were, in one line."""
    best = next(row for row in rows if row["winner"])
    lost = {status: sum(row["status"] == status for row in rows) for status in ("wrong", "failed")}
    faults = "".join(f", {count} {status}" for status, count in lost.items() if count)
    return (f"{name_of(best)} {best['ms_p50']:.4g} ms, {best['vs_stock']:.2f} x stock, best of {len(rows)} "
            f"candidates{faults}")


def name_of(row: Mapping[str, Any]) -> str:
    """A candidate's backend, with its tile where it has one."""
    tile = {name: value for name, value in (row["tile"] or {}).items() if name not in ("kernel", "label")}
    sizes = " ".join(f"{name}={value}" for name, value in tile.items() if value not in (False, None))
    return " ".join(filter(None, (row["backend"], (row["tile"] or {}).get("kernel"), sizes)))


def _judged(way: Candidate, judge: Judge, operands: Any) -> dict[str, Any]:
    """The row of a candidate, before it is timed."""
    row: dict[str, Any] = {"backend": way.backend, "tile": way.tile, "status": "ok", "detail": "", "winner": False}
    row |= dict.fromkeys(("rel_error", "ms_p20", "ms_p50", "ms_p80", "vs_stock"))
    try:
        result = judge.stock if way.backend == "reference" else way.forward(judge.problem, operands)
        if result is NotImplemented:
            return {**row, "status": "failed", "detail": "declined at the launch"}
        bounds = judge(result, way.folded)
    except Exception as error:  # whatever a compiler raises
        return {**row, "status": "failed", "detail": _line(error)}
    row["rel_error"] = max(bound.error.rel for bound in bounds)
    wrong = [str(bound) for bound in bounds if not bound.ok]
    return {**row, "status": "wrong", "detail": "; ".join(wrong)} if wrong else row


def _inputs(problem: ConvProblem, operands: Any) -> list[Any]:
    """Copies of the operands, as many as exceed the cache: their images differ in memory, weights are shared."""
    images = {name: t for name, t in operands._asdict().items()
              if isinstance(t, torch.Tensor) and t.dim() == 4 and name != "weight"}
    size = sum(t.numel() * t.element_size() for t in images.values())
    count = timing.pool_size(size, problem.device, MOST_INPUTS)
    return [operands._replace(**{name: t.clone() for name, t in images.items()}) for _ in range(count)]


def _call(way: Candidate, problem: ConvProblem, pool: list[Any], memory: Any) -> timing.Call:
    """What is timed: one launch on the operands that it is given, or on CUDA a graph of one launch for each.

    Args:
        memory: the pool that all graphs allocate from, since no two of them run at once.
    """
    if memory is None:
        return lambda operands: way.forward(problem, operands)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        way.forward(problem, pool[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as a loader's, go on using CUDA.
    with torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
        for operands in pool:
            way.forward(problem, operands)
    return lambda _: graph.replay()


def _rank(rows: list[dict[str, Any]], samples: Mapping[int, list[float]], order: tuple[str, ...]) -> None:
    """Fills in the times and names the winner: the fastest, unless one before it in `ORDER` is within noise."""
    stock, backend = samples[0], {i: rows[i]["backend"] for i in samples}
    for i, times in samples.items():
        low, half, high = timing.percentiles(times)
        rows[i].update(ms_p20=low, ms_p50=half, ms_p80=high, vs_stock=timing.paired_ratio(stock, times))
    fastest = [min((i for i in samples if backend[i] == name), key=lambda i: rows[i]["ms_p50"])
               for name in order if name in backend.values()]
    best = fastest[0]
    for i in fastest[1:]:
        if timing.paired_ratio(samples[best], samples[i]) > NOISE:
            best = i
    rows[best]["winner"] = True


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
