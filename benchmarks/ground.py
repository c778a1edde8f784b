"""Ground measurements: what the machine can do and what each way to convolve makes of it. `python -m benchmarks.ground`

Probes: device copies, products of matrices, reads from L2, launches in a CUDA graph, a barrier across the grid.
Layers (bf16, batch 256): cuDNN on each shape of ResNet-50 with `torch.backends.cudnn.benchmark`, plain, with the
norm folded and its fused ReLU or add + ReLU, and as the stock convolution + norm + ReLU; and every kind of tile of
ours on the shapes that decide between them.

All is timed in replayed CUDA graphs on random data, medians; layers by `fused_resnet.tuner`, which compares each
output with fp64 first and rotates through copies of the input that together exceed the L2 cache: a launch finds
its input in memory, as the floor assumes, where in a network the input of a small layer may still be in L2.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.layers import Rows, family, key, network, operands, rated, searched
from benchmarks.sheet import Job
from benchmarks.ways import PYTORCHS, compiled, kind_of, promising, proven
from fused_resnet import timing, tuner
from fused_resnet.problem import ConvProblem
from fused_resnet.testing.cases import conv

BATCH = 256
SECONDS = {"probe": 1.5, "cudnn": 1.8, "kinds": 6.0}  # expected, of one job
BUDGET = {"cudnn": 0.8, "kinds": 5.0}  # given to the tuner
COPY_BYTES = (1 << 31, 1 << 28)
L2_MEGABYTES = (20, 30, 40)
PASSES = 50
LAUNCHES = (100, 600)  # of the two graphs whose difference gives one launch
ROUNDS = (10, 210)  # likewise for barriers
TILES = 3  # of each kind
# The four windows of ResNet-50, the widest output with a residual, and 64 channels for swapped operands.
DECISIVE = [conv(64, 64, 56, n=BATCH), conv(128, 128, 28, n=BATCH), conv(256, 256, 14, n=BATCH),
            conv(512, 512, 7, n=BATCH), conv(64, 256, 56, 1, n=BATCH, residual=True)]


def replayed(call: Callable[[], object], count: int) -> Callable[[object], object]:
    """`count` calls as one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    return lambda _: graph.replay()


def medians(calls: dict[Any, Callable[[object], object]]) -> dict[Any, float]:
    """Milliseconds of each call, all in the same rounds."""
    samples = timing.measure(calls, {name: [None] for name in calls}, device="cuda", budget=0.5)
    return {name: timing.percentiles(times)[1] for name, times in samples.items()}


def row(name: str, ms: float, **figures: Any) -> dict[str, Any]:
    """A probe's row."""
    return {"provider": name, "status": "ok", "ms_p50": ms, **figures}


def wrong(name: str, detail: str) -> dict[str, Any]:
    return {"provider": name, "status": "wrong", "detail": detail}


def probe_copy() -> Rows:
    """Bytes read and written by device copies of different sizes."""
    for size in COPY_BYTES:
        source = torch.randint(-99, 99, (size,), dtype=torch.int8, device="cuda")
        target = torch.empty_like(source)
        call = replayed(functools.partial(target.copy_, source), 4)
        ms = medians({"": call})[""] / 4
        name = f"copy of {size >> 20} MiB"
        yield row(name, ms, rate=2 * size / ms / 1e9, unit="TB/s") if torch.equal(source, target) else wrong(
            name, "the copy differs")


def probe_matmul() -> Rows:
    """bf16 products of 8192 x 8192 random numbers: the median, where `timing.matmul_peak` takes the best."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    ms = medians({"": replayed(lambda: a @ b, 4)})[""] / 4
    yield row("matmul 8192 bf16", ms, rate=2 * 8192**3 / ms / 1e9, unit="TFLOP/s")


def probe_l2() -> Rows:
    """Reads past L1 of a working set that stays in L2."""
    from fused_resnet.kernels.triton import probes

    for megabytes in L2_MEGABYTES:
        name = f"L2 reads of {megabytes} MB"
        elements = megabytes * 1_000_000 // 4 // probes.READ_BLOCK * probes.READ_BLOCK
        x = torch.randint(-9, 10, (elements,), dtype=torch.int32, device="cuda")
        once = 1  # a launch of one pass pays for the launch and for the first reads
        ms = medians({passes: replayed(functools.partial(probes.read, x, passes), 2) for passes in (once, PASSES)})
        if int(probes.read(x, 3).sum()) != 3 * int(x.sum()):
            yield wrong(name, "the sum differs: not everything was read")
            continue
        rate = (PASSES - once) * 4 * elements / ((ms[PASSES] - ms[once]) / 2) / 1e9
        yield row(name, ms[PASSES] / 2, rate=rate, unit="TB/s")


def probe_launch() -> Rows:
    """What one more launch of one warp adds to a CUDA graph, each waiting for the one before."""
    from fused_resnet.kernels.triton import probes

    for name, pdl in (("launch in a graph", False), ("launch in a graph, programmatic", True)):
        x = torch.zeros(1, dtype=torch.int32, device="cuda")
        few, many = LAUNCHES
        calls = {n: replayed(functools.partial(probes.count, x, pdl), n) for n in LAUNCHES}
        x.zero_()
        calls[many](None)
        if int(x) != many:
            yield wrong(name, f"{int(x)} of {many} launches counted")
            continue
        ms = medians(calls)
        yield row(name, ms[many] / many, rate=1e3 * (ms[many] - ms[few]) / (many - few), unit="us")


def probe_barrier() -> Rows:
    """What one more barrier across one program on each multiprocessor takes."""
    from fused_resnet.kernels.triton import probes

    counter = torch.zeros(1, dtype=torch.int32, device="cuda")

    def run(rounds: int) -> Callable[[object], object]:
        return replayed(lambda: probes.barriers(counter.zero_(), rounds), 4)

    name = "barrier across the grid"
    yield {"provider": name, "status": "started"}
    few, many = ROUNDS
    ms = medians({rounds: run(rounds) for rounds in ROUNDS})
    programs = torch.cuda.get_device_properties(0).multi_processor_count
    expected = programs * many
    probes.barriers(counter.zero_(), many)
    yield row(name, ms[many] / 4, rate=1e3 * (ms[many] - ms[few]) / 4 / (many - few), unit="us",
              detail=f"{programs} programs") if int(counter) == expected else wrong(name, f"{int(counter)} arrivals")


PROBES = (probe_copy, probe_matmul, probe_l2, probe_launch, probe_barrier)


def measured(problem: ConvProblem, ways: Sequence[tuner.Candidate], budget: float) -> list[dict[str, Any]]:
    """The tuner's rows for `ways`, with the share of the roofline; "winner" is for the rows of a layer's tuning."""
    rows = tuner.measure(family(problem), problem, operands(problem), budget, ways=ways)
    return [{**rated(problem, found), "winner": False} for found in rows]


def cudnn_one(problem: ConvProblem) -> Rows:
    """cuDNN on one shape: as stock runs it, folded, and the convolution alone."""
    with searched():
        ways = [way for way in tuner.candidates(family(problem), problem) if way.backend in PYTORCHS]
        for found in measured(problem, ways, BUDGET["cudnn"]):
            fused = "cudnn add_relu" if problem.residual else "cudnn relu"
            yield {**found, "provider": fused if found["backend"] == "cudnn" else "stock conv + norm + act"}
        bare = ConvProblem(*problem)._replace(norm=False, residual=False, activation="identity")
        alone = tuner.candidates("conv_bn_act", bare)[:1]
        for found in measured(bare, alone, BUDGET["cudnn"]):
            yield {**found, "provider": "cudnn conv alone", "vs_stock": None}


def kinds_one(problem: ConvProblem, tiles: Sequence[Any], avoid: Sequence[dict[str, Any]] = ()) -> Rows:
    """Every kind of tile on one shape, beside stock and cuDNN."""
    wanted = [asdict(tile) for tile in tiles]
    with searched(), torch.no_grad():
        given, ways = operands(problem), list[tuner.Candidate]()
        every = [w for w in tuner.candidates(family(problem), problem) if w.tile is None or w.tile in wanted]
        for way in sorted(every, key=lambda w: wanted.index(w.tile) if w.tile else -1):
            if (yield from proven(way, problem, given, avoid)):
                ways.append(way)
        for found in measured(problem, ways, BUDGET["kinds"]):
            yield {**found, "provider": kind_of(found["tile"]) if found["tile"] else found["backend"]}


def jobs(arch: int) -> list[Job]:
    """All measurements; nothing else in a stage is worth as much, because the rest is decided by them."""
    from fused_resnet.kernels.triton import tiles as triton_tiles

    found = [Job({"level": "ground", "model": probe.__name__.removeprefix("probe_")}, probe, 110 - i,
                 SECONDS["probe"]) for i, probe in enumerate(PROBES)]
    for i, problem in enumerate(DECISIVE):
        problem = problem._replace(device="cuda", dtype="bf16")
        chosen = promising(problem, triton_tiles.candidates(problem, arch), each=TILES)
        every = [*compiled(problem, arch), *chosen]
        found.append(Job({**key(problem, "kinds"), "level": "ground"}, functools.partial(kinds_one, problem, every),
                         102 - 0.1 * i, SECONDS["kinds"], tuple((problem, tile) for tile in chosen), resumable=True))
    for i, (problem, _) in enumerate(network("resnet50")):
        problem = problem._replace(device="cuda", dtype="bf16", N=BATCH)
        found.append(Job({**key(problem, "cudnn"), "level": "ground"}, functools.partial(cudnn_one, problem),
                         104 - 0.01 * i, SECONDS["cudnn"]))
    return found


def report(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines: the probes; each shape's ways with their share of the roofline; who wins and by how much."""
    rows = [r for r in rows if r.get("level") == "ground"]
    lines = [f"{r['model']:8} {r['provider']:34} {r['rate']:8.3g} {r['unit']}" for r in rows if r.get("unit")]
    timed = [r for r in rows if r.get("floor_ms") and r["status"] == "ok"]
    for model, title in (("cudnn", "cuDNN on ResNet-50's shapes"), ("kinds", "kinds of tiles")):
        lines.append(f"{title}, bf16, batch {BATCH}: ms and share of the roofline")
        for problem in dict.fromkeys(r["problem"] for r in timed if r["model"] == model):
            best: dict[str, dict[str, Any]] = {}
            for r in timed:
                known = best.get(r["provider"])
                if (r["model"], r["problem"]) == (model, problem) and (not known or r["ms_p50"] < known["ms_p50"]):
                    best[r["provider"]] = r
            order = sorted((r for r in best.values() if r["provider"] != "cudnn conv alone"), key=lambda r: r["ms_p50"])
            cells = [f"{name} {r['ms_p50']:.4f} ({r['roofline_share']:.0%})" for name, r in best.items()]
            lead = order[1]["ms_p50"] / order[0]["ms_p50"] if len(order) > 1 else 1.0
            lines.append(f"{problem}: floor {order[0]['floor_ms']:.4f}; " + ", ".join(cells)
                         + f" -> {order[0]['provider']} by {lead - 1:.0%}")
    return lines + [f"{r['status']}: {r.get('provider') or ''} {r.get('problem') or r['model']} {r.get('detail')}"
                    for r in rows if r["status"] in ("wrong", "failed")]


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m benchmarks.gpu --stage ground` with the arguments that are given."""
    from benchmarks import gpu

    return gpu.main(["--stage", "ground", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
