"""The first layers of a network, to the max-pool, as one step of a plan; the kernel runs in Triton's interpreter."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet as fr
from fused_resnet import backends
from fused_resnet.fusing import plans
from fused_resnet.models import ResNet
from fused_resnet.nn import BasicBlock, executor
from tests.fusing.helpers import agree, aside, both, equal, same_strides, twice
from tests.nets import randomize

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
X = torch.randn(2, 3, 18, 14, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    """A stem, and a convolution that reads it."""

    def __init__(self, pool=None, conv=None, channels=3):
        super().__init__()
        self.conv1, self.bn1 = conv or nn.Conv2d(channels, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16)
        self.relu, self.maxpool = nn.ReLU(inplace=True), pool or nn.MaxPool2d(3, 2, 1)
        self.conv2, self.bn2 = nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8)

    def stem(self, x):
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))

    def forward(self, x):
        return self.bn2(self.conv2(self.stem(x)))


class Functional(Net):
    def stem(self, x):
        return F.max_pool2d(input=F.relu(self.bn1(self.conv1(x))), kernel_size=3, stride=(2, 2), padding=1)


class Positional(Net):
    def stem(self, x):
        return F.max_pool2d(F.silu(self.bn1(self.conv1(x))), (3, 3), 2, 1, 1, False)


class Returned(Net):
    def forward(self, x):
        return self.stem(x)


class ReadTwice(Net):
    """The image is read by two convolutions, so it is converted once for both."""

    def forward(self, x):
        return super().forward(x), self.relu(self.bn1(self.conv1(x)))


@pytest.fixture
def runs(monkeypatch):
    """The family `stem` runs on Triton, all else on what is chosen here; (family, operands) of every run."""
    seen, choose, run = [], backends.choose, backends.run

    def chosen(family, problem):
        if family != "stem":
            return choose(family, problem)
        with backends.use("triton"):
            return choose(family, problem)

    def record(family, problem, operands, finite=False):
        seen.append((family, operands))
        return run(family, problem, operands, finite)

    monkeypatch.setattr(backends, "choose", chosen)
    monkeypatch.setattr(backends, "run", record)
    return seen


def families(runs):
    return [family for family, _ in runs]


def make(cls=Net, *args, **kwargs):
    """(stock, fused) for inference."""
    stock = randomize(cls(*args, **kwargs)).eval().requires_grad_(False)
    return stock, fr.fuse(stock)


def first(fused):
    row = next(iter(fr.report(fused)))
    return row.pattern, row.status, row.backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("cls", [Net, Functional, Positional, Returned, ReadTwice])
def test_agrees_with_stock(cls, memory_format, dtype, runs):
    stock, fused = make(cls)
    stock, fused, x = stock.to(dtype), fused.to(dtype), X.to(dtype, memory_format=memory_format)
    assert first(fused) == ("conv+norm+act", "fused", "")
    twice(stock, fused, x)
    assert families(runs).count("stem") == 2 and next(iter(plans(fused).values())).launches[0].pooled
    assert first(fused) == ("conv+norm+act" + "+maxpool" * (cls is not ReadTwice), "fused",
                            "triton" if cls is not ReadTwice else first(fused)[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_forced_backend_runs_it(dtype):
    stock, fused = make()
    stock, fused, x = stock.to(dtype), fused.to(dtype), X.to(dtype)
    with backends.use("triton"):
        twice(stock, fused, x)
        assert first(fused) == ("conv+norm+act+maxpool", "fused", "triton")
    for name in ("cpu", "reference") if dtype is torch.float32 else ("reference",):
        with backends.use(name):
            agree(stock, fused, x)
        assert first(fused) == ("conv+norm+act", "fused", name)


def test_without_a_kernel_the_launches_are_those_of_a_pool_apart(runs, monkeypatch):
    monkeypatch.undo()
    stock, fused = make()
    twice(stock, fused, X)
    assert first(fused) == ("conv+norm+act", "fused", backends.last())
    with torch.profiler.profile() as profile:
        fused(X)
    names = [event.name for event in profile.events()]
    pools = ("aten::max_pool2d", "fused_resnet::_max_pool")
    assert sum(map(names.count, pools)) == 1 and not any("batch_norm" in name for name in names)
    assert names.count("aten::contiguous") == 2, "the image is converted once, the result back"


@pytest.mark.parametrize("lay", [lambda x: x, lambda x: x.contiguous(memory_format=torch.channels_last)],
                         ids=["nchw", "nhwc"])
@pytest.mark.parametrize("keep", [None, torch.channels_last], ids=["as_stock", "channels_last"])
def test_the_kernel_gets_the_image_as_it_is(lay, keep, runs):
    stock = make()[0]
    fused, x = fr.fuse(stock, memory_format=keep), lay(X)
    same_strides(fused(x), stock(x if keep is None else x.contiguous(memory_format=torch.channels_last)))
    (operands,) = (operands for family, operands in runs if family == "stem")
    assert operands.x is x


def test_what_does_not_fit_runs_stock_with_the_strides_that_were_asked_for(runs):
    stock = make()[0]
    fused = fr.fuse(stock, memory_format=torch.channels_last)
    both(stock, fused, lambda m: setattr(m.bn1, "eps", 0.0))
    x = X.contiguous(memory_format=torch.channels_last)
    same_strides(fused(X), stock(x))
    torch.testing.assert_close(fused(X), stock(x))
    assert "stem" not in families(runs) and first(fused)[2] == "stock"


class UsedTwice(Net):
    """The pool's input is read by another."""

    def stem(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        return self.maxpool(x) + F.avg_pool2d(x, 3, 2, 1)


class Indices(Net):
    def stem(self, x):
        return F.max_pool2d(self.relu(self.bn1(self.conv1(x))), 3, 2, 1, return_indices=True)[0]


class NoNorm(Net):
    def stem(self, x):
        return self.maxpool(self.relu(self.conv1(x)))


OTHERS = {
    "kernel": (Net, nn.MaxPool2d(2, 2)), "stride": (Net, nn.MaxPool2d(3, 1, 1)), "padding": (Net, nn.MaxPool2d(3, 2)),
    "dilation": (Net, nn.MaxPool2d(3, 2, 1, dilation=2)), "ceil_mode": (Net, nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
    "default_stride": (Net, nn.MaxPool2d(3, padding=1)), "average": (Net, nn.AvgPool2d(3, 2, 1)), "twice": (UsedTwice,),
    "indices": (Indices,), "no_norm": (NoNorm,)}


@pytest.mark.parametrize("name", OTHERS)
def test_other_pools_stay_apart(name, runs):
    stock, fused = make(*OTHERS[name])
    twice(stock, fused, X)
    assert "stem" not in families(runs) and all(row.status == "fused" for row in fr.report(fused))


@pytest.mark.parametrize("conv", [
    lambda: nn.Conv2d(6, 16, 3, 2, 1), lambda: nn.Conv2d(3, 16, 3, 2, 2, dilation=2),
    lambda: nn.Conv2d(4, 16, 3, 2, 1, groups=4)], ids=["channels", "dilation", "groups"])
def test_convolutions_that_the_kernel_refuses(conv, runs):
    stock, fused = make(Net, None, conv())
    twice(stock, fused, torch.randn(1, stock.conv1.in_channels, 12, 12))
    assert "stem" not in families(runs) and first(fused)[:2] == ("conv+norm+act", "fused")


CHANGES = {
    "hook": lambda m: m.maxpool.register_forward_hook(lambda m, a, out: out * 2),
    "pre_hook": lambda m: m.maxpool.register_forward_pre_hook(lambda m, a: (a[0] + 1,)),
    "kernel": lambda m: m.maxpool.__dict__.update(kernel_size=2, padding=0),
    "ceil_mode": lambda m: setattr(m.maxpool, "ceil_mode", True),
    "stride": lambda m: setattr(m.maxpool, "stride", (2, 1)),
    "replaced": lambda m: setattr(m, "maxpool", nn.AvgPool2d(3, 2, 1)),
    "identity": lambda m: setattr(m, "maxpool", nn.Identity()),
    "forward": lambda m: setattr(m.maxpool, "forward", lambda x: x[:, :, ::2, ::2]),
    "train": lambda m: m.bn1.train(), "pool_train": lambda m: m.maxpool.train()}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_changed_pool_is_obeyed(change, when, runs):
    stock, fused = make()
    if when == "after":
        fused(X)
    both(stock, fused, CHANGES[change])
    del runs[:]
    agree(stock, fused, X)
    assert not runs and (aside(fused) or "train" in change)  # which is a route


def test_gradients_run_stock(runs):
    stock, fused = make()
    grads = []
    for model in (stock, fused):
        x = X.clone().requires_grad_()
        model(x).square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads) and not runs


def test_nan_and_inf_run_stock(runs):
    stock, fused = make()
    for value in (float("nan"), float("inf")):
        x = X.clone()
        x[0, 1, 3, 4] = value
        equal(stock, fused, x)
    assert not runs


def test_autocast(runs):
    stock, fused = make()
    with torch.autocast("cpu", torch.float16):
        twice(stock, fused, X)
    assert families(runs).count("stem") == 2
    twice(stock, fused, X)


def test_copies_pickles_and_state_dicts(runs):
    stock, fused = make(Functional)
    fused(X)
    assert list(fused.state_dict()) == list(stock.state_dict())
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        del runs[:]
        twice(stock, twin, X)
        assert families(runs).count("stem") == 2
    equal(stock, fr.unfuse(fused), X)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_our_networks_take_it_through_the_executor(memory_format, runs, monkeypatch):
    net = randomize(ResNet(BasicBlock, (1, 1, 1, 1), 7)).eval()
    x = X.contiguous(memory_format=memory_format)
    with torch.no_grad():
        net(x)  # the self-check runs operators of its own
        del runs[:]
        y = net(x)
        assert families(runs) == ["stem"] + ["conv_bn_act"] * 11 and runs[0][1].x is x
        monkeypatch.setattr(executor.state, "stock", True)
        expected = net(x)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4)


def test_cudnn_pools_what_its_convolution_answers(monkeypatch):
    """Without a GPU a stand-in takes the place of PyTorch's operator."""
    from fused_resnet.kernels.cudnn import stem
    from fused_resnet.ops.stem import StemProblem, reference_of
    from fused_resnet.testing import inputs
    from fused_resnet.testing.cases import conv

    def stand_in(x, weight, bias, stride, padding, dilation, groups):
        assert x.is_contiguous(memory_format=torch.channels_last)
        return torch.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups))

    monkeypatch.setattr(torch, "cudnn_convolution_relu", stand_in)
    problem = StemProblem(*conv(3, 16, 20, 7, stride=2))
    operands = inputs.make(problem)
    operands = operands._replace(x=operands.x.contiguous())
    y = stem.forward(problem, operands)
    assert y.shape == problem.output_shape and y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, reference_of(problem, operands), rtol=1e-4, atol=1e-5)
    assert "runs on CUDA" in stem.refuse(problem._replace(device="cpu"))
