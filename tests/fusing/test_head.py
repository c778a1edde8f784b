"""What stands behind the last map: the mean of each channel and the classifier, beside stock's."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet as fr
from fused_resnet import native, numerics
from fused_resnet.fusing import head
from fused_resnet.fusing.apply import plans
from tests.fusing.replays import stretches

pytestmark = pytest.mark.skipif(native.missing("cpu") is not None, reason=str(native.missing("cpu")))


FLAT = {"function": lambda x: torch.flatten(x, 1), "method": lambda x: x.flatten(1), "ends": lambda x: x.flatten(1, -1),
        "view": lambda x: x.view(x.size(0), -1), "dims": lambda x: x.flatten(1, 2).flatten(1)}
JOINED = ("function", "method", "ends", "module")


class Net(nn.Module):
    def __init__(self, classes=10, bias=True, functional=False, flat="function"):
        super().__init__()
        self.flat, self.rows = flat, nn.Flatten()
        self.conv, self.norm, self.act = nn.Conv2d(3, 37, 3, padding=1, bias=False), nn.BatchNorm2d(37), nn.ReLU()
        self.pool, self.fc, self.functional = nn.AdaptiveAvgPool2d(1), nn.Linear(37, classes, bias), functional

    def forward(self, x):
        x = self.act(self.norm(self.conv(x)))
        x = F.adaptive_avg_pool2d(x, (1, 1)) if self.functional else self.pool(x)
        return self.fc(self.rows(x) if self.flat == "module" else FLAT[self.flat](x))


def nets(dtype=torch.float32, **options):
    torch.manual_seed(0)
    stock = Net(**options).eval().to(dtype)
    return stock, fr.fuse(stock)


def kinds(fused):
    return [type(step) for plan in plans(fused).values() for step in plan.steps]


def agree(stock, fused, x):
    with torch.no_grad():
        wanted = stock(x)
        for _ in range(3):  # checked, recorded, played
            y = fused(x)
            assert y.shape == wanted.shape and y.stride() == wanted.stride() and y.dtype == wanted.dtype
            assert numerics.measure(y, wanted).rel < (1e-6 if x.dtype is torch.float32 else 2e-2)
    assert not any(plan.broken for plan in plans(fused).values())


@pytest.fixture
def calls(monkeypatch):
    """What the operators behind the head were called for."""
    seen = []
    execute = head.family.execute
    monkeypatch.setattr(head.family, "execute", lambda p, *rest: (seen.append(p), execute(p, *rest))[1]
                        if p.R == p.H == 1 else execute(p, *rest))
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"classes": 1}, {"classes": 1000}, {"functional": True},
                                     *({"flat": flat} for flat in (*FLAT, "module"))],
                         ids=lambda options: "-".join(map(str, options.items())) or "plain")
def test_the_head_answers_what_stock_answers(dtype, options, calls):
    stock, fused = nets(dtype, **options)
    joined = options.get("flat", "function") in JOINED
    assert ({head.Head} if joined else {head.Mean, head.Classifier}) <= set(kinds(fused))
    for n, size in ((1, 7), (5, 9), (64, 3)):
        agree(stock, fused, torch.randn(n, 3, size, size, dtype=dtype))
    assert calls, "the classifier ran as PyTorch has it"
    assert joined == any(type(step) is head.Head for item in stretches(fused) for step in item.steps)


def test_what_is_read_by_others_is_no_part_of_a_head():
    class Twice(Net):
        def forward(self, x):
            x = self.pool(self.act(self.norm(self.conv(x))))
            rows = torch.flatten(x, 1)
            return self.fc(rows), rows, x

    stock = Twice().eval()
    fused = fr.fuse(stock)
    assert head.Head not in kinds(fused)
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        for y, wanted in zip(fused(x), stock(x), strict=True):
            assert numerics.measure(y, wanted).rel < 1e-6


def test_large_batches_leave_the_classifier_to_pytorch(calls):
    stock, fused = nets()
    agree(stock, fused, torch.randn(65, 3, 4, 4))
    assert not calls


def test_changes_of_the_classifier_are_seen_at_the_next_call():
    stock, fused = nets()
    x = torch.randn(2, 3, 6, 6)
    agree(stock, fused, x)
    other = Net().eval()

    def behind_its_back(m):
        m.fc.weight.data.mul_(2.0)
        fr.refresh(m)

    changes = (
        behind_its_back, lambda m: m.fc.weight.mul_(0.5),
        lambda m: setattr(m.fc.weight, "data", other.fc.weight.data.clone()),
        lambda m: setattr(m.fc, "weight", nn.Parameter(other.fc.weight.detach() * 3)),
        lambda m: setattr(m.fc, "bias", None), lambda m: setattr(m.fc, "bias", nn.Parameter(torch.arange(10.0))),
        lambda m: m.load_state_dict(other.state_dict()),
        lambda m: setattr(m.fc.weight, "data", torch.arange(370.0).reshape(37, 10).t()),
        lambda m: setattr(m.fc.weight, "data", torch.arange(370.0).reshape(10, 37)),
        lambda m: setattr(m.pool, "output_size", (1, 1)), lambda m: setattr(m.pool, "output_size", 1))
    for change in changes:
        with torch.no_grad():
            change(fused), change(stock)
        agree(stock, fused, x)


def test_a_square_weight_that_is_transposed_where_it_lies(calls):
    """Neither its shape nor its address tells."""
    stock, fused = nets(classes=37)
    x = torch.randn(2, 3, 6, 6)
    agree(stock, fused, x)
    for model in (stock, fused):
        model.fc.weight.data = model.fc.weight.data.t()
    del calls[:]
    agree(stock, fused, x)
    assert calls, "the classifier ran as PyTorch has it"


def test_copies_and_pickles_have_heads_of_their_own():
    stock, fused = nets()
    x = torch.randn(2, 3, 6, 6)
    agree(stock, fused, x)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        own = copy.deepcopy(stock)
        with torch.no_grad():
            other.fc.weight.mul_(2), own.fc.weight.mul_(2)
        agree(own, other, x)
        agree(stock, fused, x)


def test_hooks_autocast_and_larger_pools_run_stock():
    stock, fused = nets()
    x = torch.randn(2, 3, 6, 6)
    agree(stock, fused, x)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert fused(x).dtype is stock(x).dtype
    seen = []
    handle = fused.fc.register_forward_hook(lambda *_: seen.append(1))
    agree(stock, fused, x)
    assert len(seen) == 3
    handle.remove()
    wide = [nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(size)).eval()
            for size in (2, (1, 3), (None, 1))]
    for net in wide:
        agree(net, fr.fuse(net), x)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_the_classes_as_in_stock(value):
    stock, fused = nets()
    x = torch.randn(2, 3, 6, 6)
    agree(stock, fused, x)
    for model in (stock, fused):
        model.fc.weight.data[3, 5] = value
        fr.refresh(model)
    with torch.no_grad():
        assert torch.equal(fused(x).isfinite(), stock(x).isfinite())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n, c, h, w", [(1, 1, 1, 1), (3, 37, 5, 7), (2, 64, 1, 9), (1, 2048, 7, 7), (8, 17, 40, 3)])
def test_means_of_maps(dtype, n, c, h, w):
    torch.manual_seed(0)
    x = torch.randn(n, c, h, w).to(dtype).contiguous(memory_format=torch.channels_last)
    y = torch.ops.fused_resnet._mean_pool(x)
    wanted = x.double().mean((2, 3), keepdim=True)
    assert y.shape == (n, c, 1, 1) and y.dtype is dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(y.double(), wanted, rtol=2e-3 if dtype is torch.bfloat16 else 1e-6,
                          atol=4e-3 if dtype is torch.bfloat16 else 1e-6)
    torch.library.opcheck(torch.ops.fused_resnet._mean_pool.default, (x,),
                          test_utils=("test_schema", "test_faketensor"))


def test_means_refuse_what_they_cannot_read():
    mean = torch.ops.fused_resnet._mean_pool
    for x in (torch.randn(2, 3, 4, 5), torch.randn(2, 3), torch.empty(1, 3, 0, 2).to(memory_format=torch.channels_last),
              torch.ones(1, 4, 2, 2, dtype=torch.float64).to(memory_format=torch.channels_last)):
        with pytest.raises(RuntimeError):
            mean(x)
