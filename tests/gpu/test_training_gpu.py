"""The training kernels on a CUDA GPU: every case and dtype, sizes of a network, a residual branch, a CUDA graph."""

import pytest
import torch

from fused_resnet import backends, numerics
from fused_resnet.kernels.triton import bn_act, bn_act_grad, bn_act_sums, conv_bn_stats
from fused_resnet.kernels.triton.launch import arch_of
from fused_resnet.ops import residual_branch
from fused_resnet.ops.residual_parts import Branch
from fused_resnet.testing.cases import conv
from tests.kernels.test_triton_bn_act import PROBLEMS as NORMS
from tests.kernels.test_triton_conv_bn_stats import PROBLEMS as CONVS
from tests.kernels.test_triton_residual import copies, step
from tests.kernels.training import (
    agree_forward,
    agree_grad,
    agree_stats,
    agree_sums,
    norm,
    norm_operands,
    run,
    stats_operands,
    stats_problem,
)
from tests.ops.test_residual_branch import blocks, given, stock

DTYPES = ("bf16", "fp16", "tf32", "fp32")
KERNELS = {"bn_act": (bn_act, agree_forward), "bn_act_sums": (bn_act_sums, agree_sums),
           "bn_act_grad": (bn_act_grad, agree_grad)}
LARGE = [norm(64, 56, n=64, shortcut="norm"), norm(256, 56, n=16, shortcut="tensor", activation="relu6"),
         norm(2048, 7, n=32), norm(20, 33, n=9, shortcut="tensor")]
LAYERS = [conv(64, 64, 56, n=16, prologue="relu"), conv(64, 256, 56, 1, n=16, prologue="relu"),
          conv(256, 64, 56, 1, n=16), conv(128, 128, 56, n=8, stride=2, prologue="relu"), conv(512, 512, 7, n=8),
          conv(128, 128, 28, n=8, groups=32, prologue="relu"), conv(3, 64, 64, 7, n=8, stride=2)]


@pytest.fixture
def precision(request):
    """Stock computes in TF32 where the problem does."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = request.getfixturevalue("dtype") == "tf32"
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def equal(first, second):
    """Whether two runs returned the same bits."""
    if isinstance(first, torch.Tensor):
        first, second = (first,), (second,)
    return all(a is b is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("family", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", [*dict.fromkeys(NORMS), *LARGE], ids=lambda p: p.id)
def test_norms(problem, dtype, family, precision):
    kernel, agree = KERNELS[family]
    problem = problem._replace(device="cuda", dtype=dtype)
    operands = norm_operands(problem)
    result = run(kernel.forward, problem, operands)
    agree(problem, operands, result)
    assert equal(result, kernel.forward(problem, operands))


@pytest.mark.parametrize("family", KERNELS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_every_candidate_of_a_norm(family, dtype):
    kernel, agree = KERNELS[family]
    problem = norm(256, 14, n=32, shortcut="norm", dtype=dtype, device="cuda")
    operands = norm_operands(problem)
    for tile in kernel.candidates(problem):
        agree(problem, operands, kernel.with_tile(vars(tile))(problem, operands))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", [*CONVS, *map(stats_problem, LAYERS)], ids=lambda p: p.id)
def test_convolutions_with_statistics(problem, dtype, precision):
    problem = problem._replace(device="cuda", dtype=dtype)
    operands = stats_operands(problem)
    result = run(conv_bn_stats.forward, problem, operands)
    agree_stats(problem, operands, result)
    assert equal(result, conv_bn_stats.forward(problem, operands))


@pytest.mark.parametrize("dtype", ["bf16"])
@pytest.mark.parametrize("problem", map(stats_problem, LAYERS[:4]), ids=lambda p: p.id)
def test_every_candidate_of_a_convolution(problem, dtype):
    problem = problem._replace(device="cuda", dtype=dtype)
    operands = stats_operands(problem)
    for tile in conv_bn_stats.candidates(problem, arch_of(operands.x.device)):
        agree_stats(problem, operands, conv_bn_stats.with_tile(vars(tile))(problem, operands))


@pytest.mark.parametrize("dtype", ["fp32"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", blocks())
def test_a_residual_branch(name, recompute, dtype, precision, monkeypatch):
    monkeypatch.setenv("FUSED_RESNET_SELF_CHECK", "off")
    monkeypatch.setitem(backends.HEURISTIC, "cuda", ("triton", "reference"))
    backends.reset()
    stages, projection, parts, adds = blocks(torch.float32)[name]
    spec = Branch(tuple(stages), projection, recompute, True)
    x, shortcut = given(adds, stages, torch.float32)
    dy = torch.randn(stock(spec, *copies(x, shortcut, parts, torch.float64, "cuda")).shape, device="cuda")
    found = step(lambda *operands: residual_branch.run(spec, *operands),
                 *copies(x, shortcut, parts, torch.float32, "cuda"), dy)
    theirs, exact = (step(lambda *operands: stock(spec, *operands), *copies(x, shortcut, parts, wide, "cuda"), dy)
                     for wide in (torch.float32, torch.float64))
    monkeypatch.undo()
    backends.reset()
    for i, one in enumerate(zip(found, theirs, exact, strict=True)):
        bound = numerics.check_network(*one, dtype="fp32")
        assert bound.ok, f"result {i}: {bound}"


def test_inside_a_cuda_graph():
    problem = norm(64, 14, n=8, shortcut="norm", dtype="bf16", device="cuda")
    layer = stats_problem(LAYERS[1])._replace(device="cuda", dtype="bf16")
    operands, given_ = norm_operands(problem), stats_operands(layer)

    def every():
        return (*bn_act.forward(problem, operands), bn_act_sums.forward(problem, operands),
                *bn_act_grad.forward(problem, operands), *conv_bn_stats.forward(layer, given_))

    expected = every()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = every()
    for t in result:
        t.zero_()
    graph.replay()
    assert equal(result, expected)
