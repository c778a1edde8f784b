"""conv_dgrad and conv_wgrad on a CUDA GPU: every case and dtype, candidates, large tensors, CUDA graphs."""

import pytest
import torch

from fused_resnet.kernels.triton import conv_dgrad, conv_wgrad
from fused_resnet.testing.cases import conv
from tests.kernels.grads import PROBLEMS, agree_dgrad, agree_wgrad, forms, make
from tests.kernels.training import run

DTYPES = ("bf16", "fp16", "tf32", "fp32")
KERNELS = {conv_dgrad: agree_dgrad, conv_wgrad: agree_wgrad}
LAYERS = [conv(64, 64, 56, n=8, prologue="relu"), conv(128, 128, 28, n=8, stride=2, prologue="relu"),
          conv(64, 256, 56, 1, n=8, prologue="relu"), conv(256, 512, 28, 1, n=8, stride=2),
          conv(256, 256, 14, n=8, groups=32, prologue="relu"), conv(3, 64, 112, 7, n=8, stride=2)]


@pytest.fixture(params=KERNELS, ids=lambda kernel: kernel.__name__.rpartition(".")[2])
def kernel(request):
    return request.param


@pytest.fixture(params=DTYPES)
def dtype(request):
    """A type of the problems, with stock's convolutions allowed TF32 where the problem is."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = request.param == "tf32"
    yield request.param
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)
def test_the_cases(problem, kernel, dtype):
    """Error against fp64, NaN-poisoned outputs, guard bands, the same bits twice."""
    for form, operands in forms(problem._replace(device="cuda", dtype=dtype), PROBLEMS.index(problem)):
        result = run(kernel.forward, form, operands)
        KERNELS[kernel](form, operands, result)
        again = kernel.forward(form, operands)
        for a, b in zip(result, again, strict=True) if kernel is conv_dgrad else [(result, again)]:
            assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("problem", LAYERS, ids=lambda p: p.id)
def test_every_candidate_of_a_layer(problem, kernel, dtype):
    problem = problem._replace(device="cuda", dtype=dtype)
    operands = make(problem, through=bool(problem.prologue))
    for tile in kernel.candidates(problem):
        KERNELS[kernel](problem, operands, run(kernel.with_tile(vars(tile)), problem, operands))


def test_more_than_2_to_the_31_elements(kernel):
    """The last image lies beyond what 32 bits can index; the others are zero, and add nothing to dw."""
    if torch.cuda.get_device_properties(0).total_memory < 32 << 30:
        pytest.skip("needs a GPU with 32 GiB of memory")
    problem = conv(64, 64, 512)._replace(device="cuda", dtype="fp16", N=129)
    assert problem.N * problem.C * problem.H * problem.W > 2**31
    one = problem._replace(N=1)
    small = make(one)
    large = {}
    for name in ("x", "dy"):
        large[name] = torch.zeros(129, 64, 512, 512, dtype=torch.float16, device="cuda").contiguous(
            memory_format=torch.channels_last)
        large[name][-1:] = getattr(small, name)
    result = kernel.forward(problem, small._replace(**large))
    KERNELS[kernel](one, small, (result[0][-1:], None) if kernel is conv_dgrad else result)


def test_inside_a_cuda_graph(kernel):
    problem = LAYERS[0]._replace(device="cuda", dtype="bf16")
    operands = make(problem, through=True)

    def launch():
        result = kernel.forward(problem, operands)
        return result if kernel is conv_dgrad else (result,)

    expected = launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = launch()
    for tensor in result:
        tensor.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
