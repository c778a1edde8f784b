"""What the host spends on one fused convolution without its kernel: plan, executor, operator, choice.

A null kernel that returns a tensor made beforehand stands in for the real one, so whatever is timed is overhead.
Stock conv + bn + relu modules cost 37 us on the 2-core AVX-512 machine on which the budget was set. For the native
library the null stands in for the raw operator: what is timed goes from the module's call to the call of the operator.
"""

import statistics
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fused_resnet import backends, fusing, native
from fused_resnet.bench.results import cpu_model
from fused_resnet.kernels.cuda import conv_bn_act

DEPTH = 20
BUDGET_US = 10.0
# With norms in 16 bits, whose widened copies are looked up: 2 us more.
NATIVE_BUDGET_US = {"fp32": 8.0, "bf16": 10.0}
REPEATS = 200


def chain():
    """Twenty convolutions with norm and ReLU on a tensor so small that only overhead is left."""
    layers = [layer for _ in range(DEPTH) for layer in (nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())]
    return nn.Sequential(*layers).eval().to(memory_format=torch.channels_last)


@pytest.fixture
def run_by(monkeypatch):
    """`run_by(forward)`: every problem is given to this kernel."""
    def choose(forward):
        backends.reset()
        monkeypatch.setattr(backends, "_choose", lambda family, problem: backends.Choice("null", forward))

    yield choose
    monkeypatch.undo()
    backends.reset()


@pytest.fixture
def null_kernel(run_by):
    """A kernel that computes nothing."""
    made = {}

    def forward(problem, operands):
        if problem not in made:
            made[problem] = torch.zeros(problem.output_shape).contiguous(memory_format=torch.channels_last)
        return made[problem]

    run_by(forward)


@pytest.fixture
def null_operator(monkeypatch, run_by):
    """The native library's kernel with a tile, whose operator computes nothing."""
    made = {}

    def operator(x, *rest):
        found = made.get(x.dtype)
        if found is None:
            found = made[x.dtype] = torch.zeros_like(x)
        return found

    monkeypatch.setattr(torch.ops.fused_resnet, "_conv_bn_act", SimpleNamespace(default=operator), raising=False)
    run_by(conv_bn_act.with_tile(vars(conv_bn_act.Tile.named(native.CONV_TILES[0]))))


def microseconds(call):
    """(least, median) of many runs, for one convolution: what a busy neighbour adds is not ours."""
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        found.append((time.perf_counter() - start) / DEPTH * 1e6)
    return min(found), statistics.median(found)


def fused_chain(dtype):
    """The fused chain and its input, past the comparison with stock that a first call makes: zeros would fail it."""
    model, x = chain().to(dtype), torch.rand(1, 8, 2, 2).to(dtype, memory_format=torch.channels_last)
    fused = fusing.fuse(model)
    for plan in fusing.plans(fused).values():
        plan.checked.add(plan.kind((x,)))
    fused(x)
    assert {row.status for row in fusing.report(fused)} == {"fused"}
    return model, fused, x


@pytest.mark.benchmark(group="host cost of 20 convolutions", max_time=0.5, warmup=True)
def test_host_cost_of_a_fused_convolution(benchmark, null_kernel, capsys):
    with torch.no_grad():
        model, fused, x = fused_chain(torch.float32)
        benchmark(lambda: fused(x))
        (spent, median), (stock, _) = microseconds(lambda: fused(x)), microseconds(lambda: model(x))
    with capsys.disabled():
        print(f"\nhost cost of one fused convolution: {spent:.1f} us, median {median:.1f} (budget {BUDGET_US:g}), "
              f"stock modules with their kernels: {stock:.1f} us, on {cpu_model()}")
    assert spent <= BUDGET_US


@pytest.mark.benchmark(group="host cost of 20 convolutions", max_time=0.5, warmup=True)
@pytest.mark.parametrize("vectors", ["fp32", "bf16"])
def test_host_cost_of_a_call_of_the_native_library(benchmark, null_operator, capsys, vectors):
    """bf16 models with norms in fp32, which the operator reads as they are, and in bf16, which are widened and kept."""
    with torch.no_grad():
        _, fused, x = fused_chain(torch.bfloat16)
        if vectors == "fp32":
            for module in fused.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.float()
            fused(x)
        assert {row.status for row in fusing.report(fused)} == {"fused"} and backends.last() == "null"
        benchmark(lambda: fused(x))
        spent, median = microseconds(lambda: fused(x))
    with capsys.disabled():
        print(f"\nhost cost of one call of the native library, {vectors} norms: {spent:.1f} us, median {median:.1f} "
              f"(budget {NATIVE_BUDGET_US[vectors]:g}), on {cpu_model()}")
    assert spent <= NATIVE_BUDGET_US[vectors]


@pytest.mark.benchmark(group="host cost of 20 convolutions", max_time=0.5, warmup=True)
def test_host_cost_of_stock_modules(benchmark):
    model, x = chain(), torch.rand(1, 8, 2, 2).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        benchmark(lambda: model(x))
