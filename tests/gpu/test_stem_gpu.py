"""The family `stem` on a CUDA GPU: every case and dtype, and inside a CUDA graph."""

import pytest
import torch

from fused_resnet.kernels.triton import stem
from fused_resnet.testing import inputs
from fused_resnet.testing.cases import STEMS
from tests.kernels.judge import guarded_run
from tests.kernels.test_triton_stem import RESNET, agree

DTYPES = ("bf16", "fp16", "tf32", "fp32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", [*(p for p in STEMS if p.N), RESNET._replace(N=8, H=224, W=224)],
                         ids=lambda p: p.id)
def test_the_cases(problem, dtype):
    problem = problem._replace(device="cuda", dtype=dtype)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    try:
        operands = inputs.make(problem)
        result = guarded_run(stem.forward, problem, operands)
        agree(problem, operands, result)
        assert torch.equal(result, stem.forward(problem, operands))
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_inside_a_cuda_graph():
    problem = RESNET._replace(device="cuda", dtype="bf16", N=4)
    operands = inputs.make(problem)
    expected = stem.forward(problem, operands)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = stem.forward(problem, operands)
    result.zero_()
    graph.replay()
    assert torch.equal(result, expected)
