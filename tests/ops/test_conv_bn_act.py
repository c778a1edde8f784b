"""The operator and its public function: numbers on every CPU backend, contracts, gradients, errors."""

import pytest
import torch
import torch.nn.functional as F

from fused_resnet import backends, numerics
from fused_resnet.functional import Prologue, conv_bn_act
from fused_resnet.ops import conv_bn_act as family
from fused_resnet.testing import inputs
from fused_resnet.testing.cases import CATALOGUE, LAYERS, TINY, conv

NETWORK = {problem._replace(N=1) for name in ("resnet18", "resnet50", "resnext50_32x4d") for problem, _ in LAYERS[name]}
# Channels and flags of real layers on a few pixels: what is left of a layer at the network's end.
SHRUNK = sorted({p._replace(H=min(p.H, 7), W=min(p.W, 7)) for p in NETWORK})


def call(problem, operands):
    return family.OP(*inputs.arguments(problem, operands))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", CATALOGUE, ids=lambda p: p.id)
def test_catalogue(case, backend, dtype, poison):
    problem = case._replace(dtype=dtype)
    reason = dict(backends.explain(problem))[backend]
    operands = inputs.make(problem)
    before = [t.clone() if isinstance(t, torch.Tensor) else t for t in operands]
    with backends.use(backend):
        if reason is not None:
            with pytest.raises(ValueError, match="cannot run"):
                call(problem, operands)
            return
        result = call(problem, operands)
        folded = backends.choose(family.FAMILY, problem).folded
    assert result.shape == problem.output_shape and result.dtype is operands.x.dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    bound = numerics.check(result, inputs.stock(problem, operands), inputs.stock(problem, operands, torch.float64),
                           dtype=dtype, depth=problem.depth, folded=folded)
    assert bound.ok, bound
    if problem.activation == "relu" and result.numel() > 100:
        assert 0.1 < (result != 0).double().mean() < 0.95  # a test on zeros proves nothing
    storages = {t.untyped_storage().data_ptr() for t in operands if isinstance(t, torch.Tensor) and t.numel()}
    assert not result.numel() or result.untyped_storage().data_ptr() not in storages
    assert all(torch.equal(a, b) for a, b in zip(operands, before) if isinstance(a, torch.Tensor))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case", SHRUNK, ids=lambda p: p.id)
def test_layers_of_real_networks(case, dtype):
    problem = case._replace(dtype=dtype)
    operands = inputs.make(problem)
    result = call(problem, operands)
    bound = numerics.check(result, inputs.stock(problem, operands), inputs.stock(problem, operands, torch.float64),
                           dtype=dtype, depth=problem.depth, folded=backends.choose(family.FAMILY, problem).folded)
    assert bound.ok, bound


LAYOUTS = {"contiguous": lambda t: t.contiguous(), "channels_last": lambda t: t,
           "strided": lambda t: torch.stack((t, t), -1)[..., 0], "transposed": lambda t: t.mT.contiguous().mT}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "grad"])
@pytest.mark.parametrize("case", [TINY[0], conv(4, 6, 5, bias=True, residual=True, prologue="relu"), conv(
    4, 4, 5, 1, norm=False, activation="identity"), conv(4, 4, 5, groups=2, stride=2, activation="silu")],
    ids=lambda p: p.id)
def test_operator_contract(case, grad, layout):
    operands = inputs.make(case)
    operands = operands._replace(**{f: LAYOUTS[layout](getattr(operands, f)) for f in ("x", "weight", "residual")
                                    if getattr(operands, f) is not None})
    if grad:
        operands = type(operands)(*[t.requires_grad_() if isinstance(t, torch.Tensor) else t for t in operands])
        # statistics are buffers
        operands = operands._replace(**{f: getattr(operands, f).detach() for f in (
            "mean", "var", "pre_mean", "pre_var") if getattr(operands, f) is not None})
    torch.library.opcheck(family.OP, inputs.arguments(case, operands),
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor",
                                      "test_aot_dispatch_dynamic"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [TINY[0], TINY[2], TINY[12]], ids=lambda p: p.id)
def test_layout_does_not_change_the_result(case, layout):
    operands = inputs.make(case)
    expected = call(case, operands)
    moved = operands._replace(**{f: LAYOUTS[layout](getattr(operands, f)) for f in ("x", "weight", "residual")
                                 if getattr(operands, f) is not None})
    assert torch.equal(call(case, moved), expected)


def public(operands, problem, **changes):
    pre = None
    if problem.prologue:
        pre = Prologue(*operands[8:12], operands.pre_eps, problem.prologue)
    arguments = dict(bias=operands.bias, residual=operands.residual, activation=problem.activation,
                     stride=problem.stride, padding=problem.padding, dilation=problem.dilation,
                     groups=problem.groups, eps=operands.eps, prologue=pre)
    return conv_bn_act(*operands[:2], *operands[3:7], **{**arguments, **changes})


@pytest.mark.parametrize("case", [conv(4, 6, 4, bias=True, residual=True), conv(4, 4, 4, 1, prologue="relu", groups=2),
                                  conv(2, 3, 5, stride=2, activation="silu"), conv(2, 2, 3, norm=False, bias=True)],
                         ids=lambda p: p.id)
def test_gradients(case):
    problem = case._replace(dtype="fp64", N=1)
    operands = inputs.make(problem)
    leaves = [f for f in operands._fields if isinstance(getattr(operands, f), torch.Tensor)
              and not f.endswith(("mean", "var"))]

    def function(*tensors):
        return public(operands._replace(**dict(zip(leaves, tensors))), problem)

    tensors = [getattr(operands, f).detach().requires_grad_() for f in leaves]
    assert torch.autograd.gradcheck(function, tensors)
    stock = family.reference(*inputs.arguments(problem, operands._replace(**dict(zip(leaves, tensors)))))
    weight = torch.randn_like(stock)
    ours = torch.autograd.grad(function(*tensors), tensors, weight)
    assert all(torch.equal(a, b) for a, b in zip(ours, torch.autograd.grad(stock, tensors, weight)))


def test_gradient_of_relu_at_nan_is_one():
    x = torch.tensor([float("nan"), 0.0, 1.0]).view(1, 1, 1, 3).requires_grad_()
    conv_bn_act(x, torch.ones(1, 1, 1, 1), activation="relu").sum().backward()
    assert x.grad.flatten().tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (1, 6, 1, 1), (6, 1, 1), (4, 4), (), (1, 6, 4, 1), (2, 6, 4, 4)],
                         ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_residual_broadcasts(shape, grad):
    operands = inputs.make(conv(4, 6, 4))
    residual = torch.randn(shape, requires_grad=grad)
    result = conv_bn_act(*operands[:2], *operands[3:7], residual=residual, padding=1)
    expected = torch.relu(F.batch_norm(F.conv2d(operands.x, operands.weight, padding=1), operands.mean, operands.var,
                                       operands.gamma, operands.beta) + residual)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    if grad:
        assert torch.equal(*(torch.autograd.grad(t.sum(), residual)[0] for t in (result, expected)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "residual", "weight", "gamma", "beta", "mean", "var"])
@pytest.mark.parametrize("activation", ["identity", "relu", "relu6"])
def test_nan_and_inf_stand_where_stock_has_them(activation, where, value):
    problem = conv(8, 8, 5, activation=activation, residual=True)
    operands = inputs.make(problem)
    tensor = getattr(operands, where)
    tensor[(1,) * tensor.dim()] = value
    result, stock = call(problem, operands), inputs.stock(problem, operands)
    assert torch.equal(result.isnan(), stock.isnan())


def fine():
    return dict(zip(("x", "weight", "gamma", "beta", "mean", "var"), (
        torch.randn(2, 4, 8, 8), torch.randn(8, 4, 3, 3), *torch.rand(4, 8))))


WRONG = {
    "channels": {"x": torch.randn(2, 3, 8, 8)}, "2d": {"x": torch.randn(4, 8)},
    "unbatched": {"x": torch.randn(4, 8, 8)},
    "5d": {"x": torch.randn(2, 4, 8, 8, 8)}, "none": {"x": None}, "double": {"x": torch.randn(2, 4, 8, 8).double()},
    "weight": {"weight": torch.randn(8, 5, 3, 3)}, "large": {"weight": torch.randn(8, 4, 9, 9)},
    "norm": {"mean": torch.rand(7), "var": torch.rand(7)}, "gamma": {"gamma": torch.rand(7)},
    "norm dtype": {"mean": torch.rand(8).double(), "var": torch.rand(8).double()},
    "residual": {"residual": torch.randn(2, 8, 5, 6)}, "residual device": {"residual": torch.randn(
        2, 8, 6, 6, device="meta")}, "bias": {"bias": torch.randn(7)}, "stride": {"stride": 0},
    "padding": {"padding": -1}, "dilation": {"dilation": 0}, "groups": {"groups": 3}, "no groups": {"groups": 0},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_operands_raise_what_torch_raises(wrong):
    arguments = {**fine(), **WRONG[wrong]}
    with pytest.raises(Exception) as ours:
        conv_bn_act(**arguments)

    def stock(x, weight, gamma, beta, mean, var, bias=None, residual=None, **settings):
        y = F.batch_norm(F.conv2d(x, weight, bias, **settings), mean, var, gamma, beta)
        return torch.relu(y if residual is None else y + residual)

    with pytest.raises(Exception) as torchs:
        stock(**arguments)
    assert type(ours.value) is type(torchs.value)
    # torch.nn.functional's TypeErrors quote how it was called
    assert str(ours.value).split(" - got")[0] == str(torchs.value).split(" - got")[0]


@pytest.mark.parametrize("arguments,text", [
    ({"activation": "tanh"}, "unknown activation 'tanh'"), ({"activation": None}, "unknown activation None"),
    ({"var": None}, "mean and var"), ({"mean": None}, "mean and var"),
    ({"prologue": Prologue(None, None, torch.zeros(4), torch.ones(4), 1e-5, "gelu")}, "unknown activation 'gelu'")])
def test_wrong_settings_are_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        conv_bn_act(**{**fine(), **arguments})


def test_meta_tensors_give_shapes():
    y = conv_bn_act(torch.empty(2, 3, 9, 9, device="meta"), torch.empty(5, 3, 3, 3, device="meta"), stride=2)
    assert y.shape == (2, 5, 4, 4) and y.is_meta
