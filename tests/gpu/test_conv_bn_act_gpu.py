"""conv_bn_act on a CUDA GPU: every case and dtype, two streams at once, more than 2^31 elements, guard bands."""

import pytest
import torch

from benchmarks import check, layers
from fused_resnet import numerics
from fused_resnet.testing import cases, inputs

BACKENDS = layers.KERNELS
DTYPES = layers.DTYPES
LAYERS = [problem for problem, _ in cases.LAYERS["resnet50"]]


def on_gpu(problem, dtype="fp16", **sizes):
    return problem._replace(device="cuda", dtype=dtype, **sizes)


def launch(backend, problem, operands):
    reason = layers.kernel(backend).refuse(problem)
    if reason:
        pytest.skip(f"{backend}: {reason}")
    with torch.no_grad():
        return layers.kernel(backend).forward(problem, operands)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", cases.CATALOGUE, ids=lambda p: p.id)
def test_the_catalogue(problem, dtype, backend):
    """Error against fp64, NaN-poisoned outputs, guard bands, the same bits twice."""
    for row in check.check_one(on_gpu(problem, dtype), backend):
        assert row["status"] in ("ok", "refused"), row["detail"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_streams_at_once(backend):
    problems = [on_gpu(LAYERS[1], N=8), on_gpu(LAYERS[2], N=8)]
    operands = [inputs.make(p, seed=i) for i, p in enumerate(problems)]
    alone = [launch(backend, p, o) for p, o in zip(problems, operands, strict=True)]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    together = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                together[i].append(launch(backend, problems[i], operands[i]))
    torch.cuda.synchronize()
    for expected, results in zip(alone, together, strict=True):
        assert all(torch.equal(expected, result) for result in results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_2_to_the_31_elements(backend):
    """The last image lies beyond what 32 bits can index; it must equal the same image computed alone."""
    if torch.cuda.get_device_properties(0).total_memory < 32 << 30:
        pytest.skip("needs a GPU with 32 GiB of memory")
    problem = on_gpu(cases.conv(64, 64, 512, residual=True), N=129)
    assert problem.N * problem.K * problem.P * problem.Q > 2**31
    small = inputs.make(problem._replace(N=1))
    large = small._replace(x=torch.zeros(129, 64, 512, 512, dtype=torch.float16, device="cuda").contiguous(
        memory_format=torch.channels_last))
    large.x[-1:] = small.x
    large = large._replace(residual=torch.zeros_like(large.x))
    large.residual[-1:] = small.residual
    result = launch(backend, problem, large)[-1:]
    one = problem._replace(N=1)
    bound = numerics.check(result, inputs.stock(one, small), inputs.stock(one, small, torch.float64),
                           dtype=problem.dtype, depth=problem.depth, folded=layers.kernel(backend).FOLDED)
    assert bound.ok, bound


@pytest.mark.parametrize("backend", BACKENDS)
def test_inside_a_cuda_graph(backend):
    problem = on_gpu(LAYERS[1], N=4)
    operands = inputs.make(problem)
    expected = launch(backend, problem, operands)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = launch(backend, problem, operands)
    result.zero_()
    graph.replay()
    assert torch.equal(result, expected)
