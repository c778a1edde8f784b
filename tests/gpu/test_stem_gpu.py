"""The family `stem` on a CUDA GPU: every case, dtype and backend of ours, two streams, and inside a CUDA graph."""

import pytest
import torch

from benchmarks.layers import kernel
from fused_resnet.testing import inputs
from fused_resnet.testing.cases import STEMS
from tests.kernels.judge import guarded_run
from tests.kernels.test_triton_stem import RESNET, agree

DTYPES = ("bf16", "fp16", "tf32", "fp32")


@pytest.fixture(params=["triton", "cuda"])
def stem(request):
    """A kernel of the family that runs ResNet's stem here."""
    module = kernel(request.param, RESNET)
    if reason := module.refuse(RESNET._replace(device="cuda", dtype="bf16")):
        pytest.skip(f"{request.param}: {reason}")
    return module


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", [*(p for p in STEMS if p.N), RESNET._replace(N=8, H=224, W=224)],
                         ids=lambda p: p.id)
def test_the_cases(stem, problem, dtype):
    problem = problem._replace(device="cuda", dtype=dtype)
    if reason := stem.refuse(problem):
        pytest.skip(reason)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    try:
        operands = inputs.make(problem)
        result = guarded_run(stem.forward, problem, operands)
        agree(problem, operands, result)
        assert torch.equal(result, stem.forward(problem, operands))
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_two_streams_at_once(stem):
    problems = [RESNET._replace(device="cuda", dtype="bf16", N=n) for n in (4, 7)]
    operands = [inputs.make(p, seed=i) for i, p in enumerate(problems)]
    alone = [stem.forward(p, o) for p, o in zip(problems, operands, strict=True)]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    together = []
    for _ in range(20):
        for p, o, expected, stream in zip(problems, operands, alone, streams, strict=True):
            with torch.cuda.stream(stream):
                together.append((expected, stem.forward(p, o)))
    torch.cuda.synchronize()
    assert all(torch.equal(expected, result) for expected, result in together)


def test_inside_a_cuda_graph(stem):
    problem = RESNET._replace(device="cuda", dtype="bf16", N=4)
    operands = inputs.make(problem)
    expected = stem.forward(problem, operands)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = stem.forward(problem, operands)
    result.zero_()
    graph.replay()
    assert torch.equal(result, expected)
