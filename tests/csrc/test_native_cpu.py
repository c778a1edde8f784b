"""The native library's CPU part: its raw operators beside the references, their fakes, and what they refuse."""

import itertools

import pytest
import torch

from fused_resnet import backends, native, numerics
from fused_resnet.kernels.cpu import bn_act, bn_act_grad, bn_act_sums
from fused_resnet.problem import ConvProblem
from fused_resnet.testing import inputs
from tests.kernels import training
from tests.kernels.training import norm, norm_operands

pytestmark = pytest.mark.usefixtures("library")
KERNELS = {bn_act: training.agree_forward, bn_act_sums: training.agree_sums, bn_act_grad: training.agree_grad}
VARIANTS = list(itertools.product(("identity", "relu", "relu6"), ("", "tensor", "norm")))
SIZES = [(8, 5), (3, 7), (20, 3), (64, 9), (1, 1), (200, (2, 3))]
NORMS = [norm(*size, n=3, activation=activation, shortcut=shortcut)
         for size, (activation, shortcut) in zip(SIZES * 2, VARIANTS + VARIANTS[:3])]
CONVS = [
    ConvProblem("cpu", "fp32", 2, 9, 8, 6, 5, 3, 3, padding=(1, 1), residual=True),
    ConvProblem("cpu", "fp64", 1, 7, 7, 4, 8, 1, 1, stride=(2, 1), bias=True, activation="silu"),
    ConvProblem("cpu", "bf16", 2, 6, 5, 8, 12, 3, 2, (2, 2), (2, 1), (2, 1), groups=4, activation="relu6"),
    ConvProblem("cpu", "fp16", 1, 5, 5, 8, 8, 3, 3, padding=(1, 1), groups=8, prologue="relu", activation="hardswish"),
    ConvProblem("cpu", "fp32", 1, 1, 1, 3, 2, 3, 3, padding=(1, 1), norm=False, activation="identity"),
]


@pytest.fixture(params=KERNELS, ids=lambda kernel: kernel.__name__.rpartition(".")[2])
def kernel(request):
    return request.param


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("problem", NORMS, ids=lambda p: p.id)
def test_norms_agree_with_the_references(kernel, problem, dtype):
    problem = problem._replace(dtype=dtype)
    assert kernel.refuse(problem) is None and not kernel.needs_finite(problem)
    operands = norm_operands(problem)
    KERNELS[kernel](problem, operands, training.run(kernel.forward, problem, operands))


@pytest.mark.parametrize(("activation", "shortcut"), VARIANTS)
def test_norms_of_doubles(kernel, activation, shortcut):
    problem = norm(12, 5, activation=activation, shortcut=shortcut, dtype="fp64")
    operands = backends.widen(norm_operands(problem))
    found, exact = kernel.forward(problem, operands), backends.reference(kernel.__name__.rpartition(".")[2])(
        problem, operands)
    for mine, theirs in zip(found, exact):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_nan_and_inf_go_where_stock_sends_them(kernel):
    problem = norm(16, 4, activation="relu6", shortcut="norm")
    operands = norm_operands(problem)
    operands.x[0, 1, 2, 3], operands.x[1, 2, 0, 0] = float("nan"), float("inf")
    operands.residual[1, 3, 1, 1], operands.dy[0, 4, 1, 2] = float("nan"), float("nan")
    KERNELS[kernel](problem, operands, kernel.forward(problem, operands))


def test_vectors_may_be_absent_and_masks_too(kernel):
    problem = norm(16, 4, activation="identity", shortcut="norm")
    operands = norm_operands(problem)._replace(gamma=None, beta=None, r_gamma=None, r_beta=None)
    KERNELS[kernel](problem, operands, kernel.forward(problem, operands))


def test_sums_do_not_depend_on_the_number_of_threads():
    problem = norm(24, 61, n=3, shortcut="norm")
    operands, found, before = norm_operands(problem), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(bn_act_sums.forward(problem, operands))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_an_empty_batch():
    problem = norm(8, 4, n=0)
    y, mask = bn_act.forward(problem, norm_operands(problem))
    assert y.shape == (0, 8, 4, 4) and mask.numel() == 0
    assert torch.equal(bn_act_sums.forward(problem, norm_operands(problem)), torch.zeros(2, 8))


@pytest.mark.parametrize("problem", CONVS, ids=lambda p: p.id)
def test_convolutions_agree_with_the_reference(problem):
    o = inputs.make(problem)
    y = torch.ops.fused_resnet._conv_bn_act.default(*o[:12], o.eps, o.pre_eps, problem.activation, problem.prologue,
                                                    *problem[9:12], problem.groups)
    _agree("conv_bn_act", problem, o, y)


@pytest.mark.parametrize(("dtype", "size", "activation"), [("fp32", (17, 12), "relu"), ("bf16", (9, 9), "silu"),
                                                           ("fp64", (1, 2), "identity")])
def test_stems_agree_with_the_reference(dtype, size, activation):
    from fused_resnet.ops.stem import StemProblem

    problem = StemProblem("cpu", dtype, 2, *size, 3, 10, 7, 7, (2, 2), (3, 3), bias=True, activation=activation)
    o = inputs.make(ConvProblem(*problem))
    o = o._replace(x=o.x.contiguous())  # any strides
    y = torch.ops.fused_resnet._stem.default(*o[:7], o.eps, activation, problem.stride, problem.padding)
    _agree("stem", problem, o, y)


def _agree(family, problem, o, y):
    import fused_resnet.functional  # noqa: F401  registers the families

    reference = backends.reference(family)
    exact = reference(problem._replace(dtype="fp64"), backends.widen(o))
    assert y.is_contiguous(memory_format=torch.channels_last)
    if problem.dtype == "fp64":  # the yardstick, stock's own error against fp64, would be 0
        torch.testing.assert_close(y, exact, rtol=1e-12, atol=1e-12)
        return
    bound = numerics.check(y, reference(problem, o), exact, dtype=problem.dtype, depth=problem.depth)
    assert bound.ok, f"{problem.id}: {bound}"


def test_operators_pass_opcheck():
    problem = norm(8, 3, shortcut="norm", activation="relu")
    o = norm_operands(problem)
    utils = ("test_schema", "test_faketensor")
    ops, shortcut = torch.ops.fused_resnet, (o.residual, o.r_gamma, o.r_beta, o.r_mean, o.r_var)
    for op, args in (
            (ops._bn_act, (o.x, o.gamma, o.beta, o.mean, o.var, o.eps, "relu", *shortcut, o.r_eps)),
            (ops._bn_act, (o.x, None, None, o.mean, o.var, o.eps, "identity", *[None] * 5, 0.0)),
            (ops._bn_act_sums, (o.dy, o.mask, o.x, o.mean, o.var, o.eps, o.residual, o.r_mean, o.r_var, o.r_eps)),
            (ops._bn_act_grad, (o.dy, o.mask, o.x, o.gamma, o.mean, o.var, o.eps, o.means, True, o.residual, o.r_gamma,
                                o.r_mean, o.r_var, o.r_eps, o.r_means)),
            (ops._bn_act_grad, (o.dy, None, o.x, None, o.mean, o.var, o.eps, o.means, False, *[None] * 4, 0.0, None))):
        torch.library.opcheck(op.default, args, test_utils=utils)
    p, c = CONVS[0], inputs.make(CONVS[0])
    for tile in ({}, {"tile": -1}):
        torch.library.opcheck(ops._conv_bn_act.default, (*c[:12], 1e-5, 1e-5, "relu", "", *p[9:12], 1), tile,
                              test_utils=utils)
    torch.library.opcheck(ops._stem.default, (*c[:7], 1e-5, "relu", (2, 2), (1, 1)), test_utils=utils)


@pytest.mark.parametrize(("change", "message"), [
    ({"x": torch.Tensor.contiguous}, "x must be dense in channels_last memory"),
    ({"x": torch.Tensor.int, "residual": torch.Tensor.int}, "x must be fp32, fp64, bf16 or fp16"),
    ({"gamma": lambda t: t[:-1]}, "gamma must be dense, of 8 elements"),
    ({"residual": lambda t: t[:1]}, "residual must have the shape"),
    ({"residual": lambda t: None}, "needs the residual"), ({"r_var": lambda t: None}, "needs the residual")])
def test_what_does_not_fit_is_refused(change, message):
    problem = norm(8, 3, shortcut="norm")
    o = norm_operands(problem)
    o = o._replace(**{name: alter(getattr(o, name)) for name, alter in change.items()})
    with pytest.raises(RuntimeError, match=message):
        bn_act.forward(problem, o)


def test_the_chooser_finds_the_kernels():
    for name in ("bn_act", "bn_act_sums", "bn_act_grad"):
        assert backends.choose(name, norm(8, 2)).name == "cpu"
        assert "on cuda" in backends.kernels(name, norm(8, 2))["cpu"].refuse(norm(8, 2, device="cuda"))


def test_the_loader_gives_its_reasons(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    assert native._missing("cpu") == "it was not built"
    (tmp_path / "_native.json").write_text('{"cpu": "there is no compiler"}')
    assert native._missing("cpu") == "there is no compiler"
    native.path_of("cpu").write_bytes(b"not a library")
    assert "cannot be loaded" in native._missing("cpu")
    monkeypatch.setattr(torch, "__version__", "2.10.1")
    assert "2.11" in native._missing("cpu")
    monkeypatch.setenv("FUSED_RESNET_SKIP_LOADING", "1")
    backends.reset()
    try:
        assert "SKIP_LOADING" in native._missing("cpu")
    finally:
        monkeypatch.undo()
        backends.reset()


def test_a_library_of_other_sources_is_not_used(monkeypatch):
    monkeypatch.setitem(native.FAKES, "_no_such_operator", lambda x: x)
    assert "without _no_such_operator" in native._missing("cpu")
