"""The training kernels on a CUDA GPU: every case and dtype, sizes of a network, a residual branch, a CUDA graph."""

import importlib

import pytest
import torch

from fused_resnet import backends, numerics
from fused_resnet.kernels.triton import bn_act, bn_act_grad, bn_act_sums, conv_bn_stats
from fused_resnet.kernels.triton.launch import arch_of
from fused_resnet.ops import residual_branch
from fused_resnet.ops.residual_parts import Branch
from fused_resnet.testing.cases import conv
from tests.gpu.conftest import here
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
OURS = ("triton", "cuda")
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


def kernel_of(backend, family, problem):
    """The module of a backend; skips what it refuses."""
    here(backend)
    kernel = importlib.import_module(f"fused_resnet.kernels.{backend}.{family}")
    if reason := kernel.refuse(problem):
        pytest.skip(f"{backend}: {reason}")
    return kernel


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("family", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", [*dict.fromkeys(NORMS), *LARGE], ids=lambda p: p.id)
def test_norms(problem, dtype, family, backend, precision):
    problem = problem._replace(device="cuda", dtype=dtype)
    kernel, agree = kernel_of(backend, family, problem), KERNELS[family][1]
    operands = norm_operands(problem)
    result = run(kernel.forward, problem, operands)
    agree(problem, operands, result)
    assert equal(result, kernel.forward(problem, operands))


@pytest.mark.parametrize("family", KERNELS)
@pytest.mark.parametrize("backend", OURS)
def test_norms_of_more_than_2_to_the_31_elements(backend, family):
    """The last image lies beyond what 32 bits can index; the others are zero, and add nothing to its channels' sums."""
    if torch.cuda.get_device_properties(0).total_memory < 64 << 30:
        pytest.skip("needs a GPU with 64 GiB of memory")
    problem = norm(64, 512, n=129, shortcut="tensor", dtype="fp16", device="cuda")
    one = problem._replace(N=1)
    assert problem.N * problem.C * problem.H * problem.W > 2**31
    kernel, agree = kernel_of(backend, family, problem), KERNELS[family][1]
    small, large = norm_operands(one), {}
    for name in ("x", "residual", "dy"):
        large[name] = torch.zeros(problem.output_shape, dtype=torch.float16, device="cuda").contiguous(
            memory_format=torch.channels_last)
        large[name][-1:] = getattr(small, name)
    bytes_ = small.mask.numel()
    mask = torch.zeros(bytes_ * problem.N, dtype=torch.uint8, device="cuda")
    mask[-bytes_:] = small.mask
    result = kernel.forward(problem, small._replace(**large, mask=mask))
    if family == "bn_act":
        result = result[0][-1:], result[1][-bytes_:]
    agree(one, small, tuple(t[-1:] for t in result) if family == "bn_act_grad" else result)


@pytest.mark.parametrize("backend", OURS)
def test_norms_on_two_streams_at_once(backend):
    problems = [norm(256, 14, n=n, shortcut="norm", dtype="bf16", device="cuda") for n in (16, 9)]
    operands = [norm_operands(p, seed=i) for i, p in enumerate(problems)]
    kernels = [kernel_of(backend, family, problems[0]) for family in KERNELS]

    def every(i):
        return [t for kernel in kernels for t in _row(kernel.forward(problems[i], operands[i])) if t is not None]

    alone, together = [every(0), every(1)], []
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                together.append((alone[i], every(i)))
    torch.cuda.synchronize()
    assert all(equal(a, b) for expected, found in together for a, b in zip(expected, found, strict=True))


def _row(result):
    return (result,) if isinstance(result, torch.Tensor) else result


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


@pytest.mark.parametrize("backend", OURS)
def test_norms_inside_a_cuda_graph(backend):
    problem = norm(64, 14, n=8, shortcut="norm", dtype="bf16", device="cuda")
    operands, kernels = norm_operands(problem), [kernel_of(backend, family, problem) for family in KERNELS]

    def every():
        return [t for kernel in kernels for t in _row(kernel.forward(problem, operands))]

    expected = every()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = every()
    for t in result:
        t.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


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
