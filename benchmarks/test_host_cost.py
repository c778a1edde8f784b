"""What the host spends on one fused convolution without its kernel: plan, executor, operator, choice.

A null kernel that returns a tensor made beforehand stands in for the real one, so whatever is timed is overhead.
Stock conv + bn + relu modules cost 37 us on the 2-core AVX-512 machine on which the budget was set.
"""

import time

import pytest
import torch
from torch import nn

from fused_resnet import backends, fusing
from fused_resnet.bench.results import cpu_model

DEPTH = 20
BUDGET_US = 10.0
REPEATS = 200


def chain():
    """Twenty convolutions with norm and ReLU on a tensor so small that only overhead is left."""
    layers = [layer for _ in range(DEPTH) for layer in (nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())]
    return nn.Sequential(*layers).eval().to(memory_format=torch.channels_last)


@pytest.fixture
def null_kernel(monkeypatch):
    """Every problem is given to a kernel that computes nothing."""
    made = {}

    def forward(problem, operands):
        if problem not in made:
            made[problem] = torch.zeros(problem.output_shape).contiguous(memory_format=torch.channels_last)
        return made[problem]

    backends.reset()
    monkeypatch.setattr(backends, "_choose", lambda family, problem: backends.Choice("null", forward))
    yield
    backends.reset()


def microseconds(call):
    """The least of many runs, for one convolution: what a busy neighbour adds is not ours."""
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best / DEPTH * 1e6


@pytest.mark.benchmark(group="host cost of 20 convolutions", max_time=0.5, warmup=True)
def test_host_cost_of_a_fused_convolution(benchmark, null_kernel, capsys):
    model, x = chain(), torch.rand(1, 8, 2, 2).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        fused = fusing.fuse(model)
        # The null kernel's zeros would fail the comparison with stock that a plan's first call makes.
        for plan in fusing.plans(fused).values():
            plan.checked.add(plan.kind((x,)))
        fused(x)
        assert {row.status for row in fusing.report(fused)} == {"fused"}
        benchmark(lambda: fused(x))
        spent, stock = microseconds(lambda: fused(x)), microseconds(lambda: model(x))
    with capsys.disabled():
        print(f"\nhost cost of one fused convolution: {spent:.1f} us (budget {BUDGET_US:g}), stock modules with their "
              f"kernels: {stock:.1f} us, on {cpu_model()}")
    assert spent <= BUDGET_US


@pytest.mark.benchmark(group="host cost of 20 convolutions", max_time=0.5, warmup=True)
def test_host_cost_of_stock_modules(benchmark):
    model, x = chain(), torch.rand(1, 8, 2, 2).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        benchmark(lambda: model(x))
