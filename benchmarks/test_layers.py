"""Each distinct convolution of ResNet-50 and ResNet-18 at batch 8: stock operators beside the fused launch.

`pytest benchmarks/ --benchmark-only` prints one group a problem.
"""

import pytest
import torch

from fused_resnet import numerics
from fused_resnet.ops import conv_bn_act as family
from fused_resnet.testing import cases, inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROBLEMS = list(dict.fromkeys(problem._replace(N=8, device=DEVICE) for network in ("resnet50", "resnet18")
                              for problem, _ in cases.LAYERS[network]))


def synchronised(call):
    """`call`, waiting for the GPU where there is one."""
    if DEVICE == "cpu":
        return call

    def wait():
        call()
        torch.cuda.synchronize()

    return wait


@pytest.mark.benchmark(max_time=0.2, min_rounds=5, warmup=True, warmup_iterations=2)
@pytest.mark.parametrize("provider", ["eager_channels_last", "fused"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.id.removesuffix(f"-fp32-{DEVICE}"))
def test_layer(benchmark, problem, dtype, provider):
    problem = problem._replace(dtype=dtype)
    operands = inputs.make(problem)
    operands = operands._replace(weight=operands.weight.contiguous(memory_format=torch.channels_last))
    with torch.no_grad():
        stock, exact = inputs.stock(problem, operands), inputs.stock(problem, operands, torch.float64)
        result = family.execute(problem, operands, True)
        bound = numerics.check(result, stock, exact, dtype=dtype, depth=problem.depth, folded=dtype != "fp32")
        assert bound.ok, bound
        call = {"fused": lambda: family.execute(problem, operands, True),
                "eager_channels_last": lambda: inputs.stock(problem, operands)}[provider]
        benchmark.group = problem.id
        benchmark.extra_info.update(level="layer", problem=problem.id, dtype=dtype, batch=problem.N, device=DEVICE,
                                    provider=provider, rel_error=bound.error.rel if provider == "fused" else
                                    bound.stock.rel)
        benchmark(synchronised(call))
    if benchmark.stats:
        benchmark.extra_info["gflops"] = problem.flops / benchmark.stats["median"] / 1e9
