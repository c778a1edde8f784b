"""Whatever watches or transforms PyTorch's operators sees those of the stock modules."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fused_resnet as fr
from tests.fusing.helpers import agree, aside, counts, same_strides, twice
from tests.fusing.nets import Block, Net, X
from tests.nets import randomize


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frozen", [False, True])
@torch.no_grad()
def test_autocast_gives_stocks_dtypes(dtype, frozen):
    from torchvision.ops.misc import FrozenBatchNorm2d

    class Promotes(Block):
        def forward(self, x):
            out = F.relu(self.bn1(self.conv1(x)))
            out = self.bn2(self.conv2(out))
            return out, F.relu(out + x), x

    for net in (Promotes(), Block(), nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), Block())):
        stock = randomize(net).eval()
        if frozen:
            for block in stock.modules():
                if isinstance(block, Block):
                    block.bn1 = randomize(FrozenBatchNorm2d(8))
        fused = fr.fuse(stock)
        agree(stock, fused, X)
        with torch.autocast("cpu", dtype=dtype):
            for x in (X, X.to(dtype)):
                expected, result = stock(x), fused(x)
                same_strides(result, expected)
                same_strides(fused(x), expected)
        agree(stock, fused, X)
        assert counts(fused)[0] > 0


class Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


class Functions(torch.overrides.TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.ops.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Counter, Functions])
def test_modes_see_stocks_operators(stock, fused, mode):
    with mode() as first:
        stock(X)
    with mode() as second:
        fused(X)
    names = "conv", "batch_norm", "relu"
    wanted = [op for op in first.ops if any(n in op for n in names)]
    assert wanted == [op for op in second.ops if any(n in op for n in names)] != []


def test_a_default_device_does_not_stop_fusion(fused):
    with torch.device("cpu"):
        fused(X)
    assert not aside(fused)


def test_flops_are_counted(stock, fused):
    with FlopCounterMode(display=False) as first:
        stock(X)
    with FlopCounterMode(display=False) as second:
        fused(X)
    assert first.get_total_flops() == second.get_total_flops() > 0


def test_functorch_transforms(stock, fused):
    batch = X[None].repeat(3, 1, 1, 1, 1)
    torch.testing.assert_close(torch.vmap(fused)(batch), torch.vmap(stock)(batch))
    a, b = (torch.func.grad(lambda x, m=m: m(x).sum())(X) for m in (stock, fused))
    assert torch.equal(a, b)
    a, b = (torch.func.jvp(m, (X,), (torch.ones_like(X),)) for m in (stock, fused))
    assert torch.equal(a[1], b[1])
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, torch.ones_like(X))
        a, b = (torch.autograd.forward_ad.unpack_dual(m(dual)).tangent for m in (stock, fused))
        assert (a is None) is (b is None) and (a is None or torch.equal(a, b))


def test_functional_call_takes_the_given_tensors(stock, fused):
    other = {k: v + 0.1 if v.is_floating_point() else v for k, v in stock.state_dict().items()}
    torch.testing.assert_close(torch.func.functional_call(fused, other, X), torch.func.functional_call(stock, other, X),
                               rtol=1e-4, atol=1e-4)
    agree(stock, fused, X)


def test_inference_mode(stock, fused):
    with torch.inference_mode():
        result = fused(X)
        assert result.is_inference()
        torch.testing.assert_close(result, stock(X), rtol=1e-4, atol=1e-4)
        made = randomize(Net()).eval()
        twice(made, fr.fuse(made), X.clone())
    assert not fused(X).is_inference() and not aside(fused)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(stock, fused, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    torch.testing.assert_close(compiled(X), stock(X), rtol=1e-4, atol=1e-4)


def test_exports(stock, fused):
    for strict in (False, True):
        program = torch.export.export(fused, (X,), strict=strict)
        torch.testing.assert_close(program.module()(X), stock(X), rtol=1e-4, atol=1e-4)
        assert any("batch_norm" in str(n.target) for n in program.graph.nodes)


@pytest.mark.filterwarnings("ignore")
def test_torchscript_traces_stock(stock, fused):
    traced = torch.jit.trace(fused, X)
    assert "batch_norm" in str(traced.inlined_graph)
    torch.testing.assert_close(traced(X), stock(X), rtol=1e-4, atol=1e-4)


def test_symbolic_trace_sees_stock(stock, fused):
    def names(model):
        return [n.target for n in torch.fx.symbolic_trace(model).graph.nodes]

    assert names(fused) == names(stock)


def test_fake_and_meta_tensors(stock, fused):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert fused(mode.from_tensor(X)).shape == (2, 5)
    with torch.device("meta"):
        empty = fr.fuse(Net().eval())
    assert empty(X.to("meta")).shape == (2, 5)
    agree(stock, fused, X)
