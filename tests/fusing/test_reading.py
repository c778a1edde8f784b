"""Reading: modules that are made alike are read once, whatever differs is read by itself, and nothing else changes."""

import collections
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet as fr
from fused_resnet.fusing import capture, plans, reading
from fused_resnet.fusing.route import Route
from fused_resnet.fusing.structure import Structures
from tests.fusing.helpers import agree, counts, twice
from tests.nets import randomize

timm = pytest.importorskip("timm")
tv = pytest.importorskip("torchvision").models
X = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(4))
ACTIVE = {"True", "-0.0", "[2, 1]", "{'b': 1, 'a': 1}", "(1,)", "'yes'", "nan", "[[True]]"}


class Chosen(nn.Module):
    """A forward that looks at everything about `how`."""

    def __init__(self, how, channels=4):
        super().__init__()
        self.conv, self.bn, self.how = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), how

    def forward(self, x):
        y = self.bn(self.conv(x))
        return F.relu(y) if repr(self.how) in ACTIVE else y


class Moded(nn.Module):
    """Another forward in training, and a child that reads nothing."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.inner = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), Chosen(True)

    def forward(self, x):
        y = self.bn(self.conv(self.inner(x)))
        return F.relu(y) if self.training else y


class Calls(nn.Module):
    """Calls of one child in every way that tells more than a tensor, and in those that do not."""

    class Child(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x, other=None, twice=False):
            y = F.relu(self.bn(self.conv(x)))
            y = y + y if twice else y
            return y if other is None else y + other

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return F.relu(self.conv(x)), x

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x, by):
            return self.bn(self.conv(x)) * by

    class Handed(nn.Module):
        def forward(self, x):
            return x

    def __init__(self):
        super().__init__()
        self.child, self.pair, self.scaled, self.handed = self.Child(), self.Pair(), self.Scaled(), self.Handed()

    def forward(self, x):
        a, b = self.pair(self.handed(x))
        a = self.child(self.child(a), None, True) + self.child(b, twice=True)
        a = self.scaled(a, 2.0) + self.scaled(a, b)
        return self.child(a, other=b) + self.child(a, self.handed(b))


class NormAct(nn.BatchNorm2d):
    def forward(self, x):
        return F.relu(super().forward(x))


def counting(seen, name, function):
    def counted(*args):
        seen[name] += 1
        return function(*args)

    return counted


def traced(monkeypatch, model, **options):
    """The fused model, and how many captures and modules traced through it took."""
    seen = collections.Counter()
    for name, home in (("capture", reading), ("examine", capture)):
        monkeypatch.setattr(home, name, counting(seen, name, getattr(home, name)))
    fused = fr.fuse(model, **options)
    monkeypatch.undo()
    return fused, seen


def unlike(monkeypatch, model, **options):
    """The fused model where every module was read by itself."""
    monkeypatch.setattr(Structures, "number", lambda self, module: None)
    fused = fr.fuse(model, **options)
    monkeypatch.undo()
    return fused


def anatomy(fused):
    """Every plan and route, with names in the place of modules."""
    names = {id(m): name for name, m in fused.named_modules()}

    def told(v):
        if isinstance(v, nn.Module):
            return type(v).__name__, names.get(id(getattr(v, "whole", v)))
        if isinstance(v, list | tuple):
            return [told(item) for item in v]
        if isinstance(v, dict):
            return {key: told(item) for key, item in v.items()}
        if hasattr(v, "__dict__") and type(v).__module__.startswith("fused_resnet.") and "Memo" not in type(v).__name__:
            return type(v).__name__, {key: told(item) for key, item in vars(v).items() if key != "guards"}
        return v if isinstance(v, str | int | float | bool | None) else repr(type(v))

    found = {}
    for name, plan in plans(fused).items():
        guards = [plan.guards, *(route.guards for route in plan.routes.values() if isinstance(route, Route))]
        watched = [sorted((names[id(m)], n) for m, n, _ in g.reads) + [names[id(m)] for m in g.watched] for g in guards]
        found[name] = told({k: v for k, v in vars(plan).items() if k not in ("guards", "checked", "names")}), watched
    return found


NETS = {
    "resnet50": tv.resnet50,
    "densenet121": tv.densenet121,
    "norm_act": lambda: nn.Sequential(*[nn.Sequential(*[timm.layers.ConvNormAct(4, 4) for _ in range(3)])
                                         for _ in range(2)]),
    "subclass": lambda: nn.Sequential(*[nn.Sequential(nn.Conv2d(4, 4, 1), NormAct(4)) for _ in range(2)]),
    "preact": lambda: timm.create_model("resnetv2_18"),
    "squeezed": lambda: timm.create_model("seresnet18"),
    "ours": fr.models.resnet18,
    "calls": lambda: nn.Sequential(Calls(), Calls()),
    "moded": lambda: nn.Sequential(Moded(), Moded()),
}


@pytest.mark.parametrize("net", NETS)
def test_nothing_but_the_time_changes(net, monkeypatch):
    """The same steps, slots, reasons and guards as when every module is read by itself."""
    stock = NETS[net]().eval()
    fused, alone = fr.fuse(stock), unlike(monkeypatch, stock)
    assert list(fr.report(fused)) == list(fr.report(alone))
    assert vars(fused._fused_resnet_notes) == vars(alone._fused_resnet_notes)
    mine, theirs = anatomy(fused), anatomy(alone)
    assert list(mine) == list(theirs)
    for name in mine:
        assert mine[name] == theirs[name], name


@pytest.mark.parametrize("make", [tv.resnet152, fr.models.resnet152], ids=["torchvision", "ours"])
def test_blocks_are_read_once_for_each_kind(make, monkeypatch):
    """50 blocks of 8 kinds: each kind, its shortcut, each stage, the network."""
    fused, seen = traced(monkeypatch, make().eval())
    assert counts(fused) == (155, 155)
    assert seen["capture"] <= 17 and seen["examine"] <= 30, seen


@torch.no_grad()
def test_a_deeper_network_costs_no_more_captures(monkeypatch):
    nets = [randomize(nn.Sequential(*[nn.Sequential(Moded(), Calls()) for _ in range(n)])).eval() for n in (2, 9)]
    (_, few), (fused, many) = (traced(monkeypatch, net) for net in nets)
    assert few == many and few["capture"] > 3
    twice(nets[1], fused, X)


@pytest.mark.parametrize("a,b", [(True, 1), (0.0, -0.0), ([1, 2], [2, 1]), ((1,), [1]), ("yes", "no"), (None, True),
                                 ({"a": 1, "b": 1}, {"b": 1, "a": 1}), (1.0, float("nan")), ([[True]], [[1]])], ids=str)
@torch.no_grad()
def test_attributes_that_differ_in_anything(a, b):
    stock = randomize(nn.Sequential(Chosen(a), Chosen(b), Chosen(a))).eval()
    fused = fr.fuse(stock)
    patterns = [row.pattern for row in fr.report(fused)]
    assert patterns[0] == patterns[2] and set(patterns) == {"conv+norm", "conv+norm+act"}
    twice(stock, fused, X)


def other(change):
    def make():
        net = nn.Sequential(Chosen(True), Chosen(True))
        change(net[1])
        return net

    return make


class Tuned(nn.Conv2d):
    pass


DIFFERENT = {
    "bias": other(lambda m: setattr(m.conv, "bias", None)),
    "dtype": other(lambda m: m.conv.half()),
    "frozen": other(lambda m: m.conv.weight.requires_grad_(False)),
    "padding": other(lambda m: setattr(m.conv, "padding", (0, 0))),
    "child": other(lambda m: m.add_module("more", nn.ReLU())),
    "class": other(lambda m: setattr(m, "conv", Tuned(4, 4, 3, padding=1))),
    "shape": other(lambda m: setattr(m, "conv", nn.Conv2d(4, 4, 1))),
    "forward": other(lambda m: setattr(m.conv, "forward", m.conv.forward)),
    "object": other(lambda m: setattr(m, "note", object())),
    "module_in_a_list": other(lambda m: setattr(m, "note", [nn.ReLU()])),
    "function": other(lambda m: setattr(m, "note", torch.relu)),
    "marked_tensor": other(lambda m: setattr(m.conv.weight, "note", 1)),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_modules_that_are_not_alike(case):
    net = DIFFERENT[case]()
    structures = Structures(net)
    assert structures.number(net[0]) is not None and structures.number(net[0]) != structures.number(net[1])
    assert Structures(nn.Sequential(net[0])).number(net[0]) is not None


def test_functions_are_told_apart():
    structures = Structures(net := nn.Sequential(*map(Chosen, (F.relu, F.silu, F.relu, Tuned, nn.Conv2d))))
    numbers = [structures.number(m) for m in net]
    assert numbers[0] == numbers[2] and len(set(numbers)) == 4 and None not in numbers


def test_modules_that_are_alike():
    net = nn.Sequential(Chosen(True), Chosen(True), Chosen(True, 8))
    structures = Structures(net)
    numbers = [structures.number(m) for m in net]
    assert numbers[0] == numbers[1] != numbers[2] and None not in numbers


@torch.no_grad()
def test_shared_modules_and_tensors_are_like_nothing():
    shared = Chosen(True)
    stock = nn.Sequential(shared, Chosen(True), shared, Chosen(True), Chosen(True))
    stock[3].conv.weight = stock[4].conv.weight
    structures = Structures(randomize(stock))
    assert [structures.number(m) is None for m in stock] == [True, False, True, True, True]
    assert structures.number(stock) is None
    twice(stock.eval(), fr.fuse(stock), X)


class Freezes(nn.Module):
    """As detectors do: `train()` does more than `training`."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Moded(), Moded()

    def train(self, mode=True):
        super().train(mode)
        self.a.eval()
        self.b.inner.how = mode
        return self

    def forward(self, x):
        return self.b(self.a(x))


def test_train_that_does_more_is_followed(monkeypatch):
    stock = randomize(Freezes()).eval()
    assert Structures(stock).number(stock.a) is None
    fused = fr.fuse(stock, recompute=False)
    assert anatomy(fused) == anatomy(unlike(monkeypatch, stock, recompute=False))
    with torch.no_grad():
        twice(stock, fused, X)
    for model in (stock, fused):
        model.train()
    agree(stock, fused, X)


def test_modes_that_differ_are_read_by_themselves(monkeypatch):
    """A part that stays in eval mode by itself is not what it was read as in training."""
    stock = randomize(nn.Sequential(Moded(), Moded())).eval()
    fused = fr.fuse(stock, recompute=False)
    for model in (stock, fused):
        model.train()
        model[0].eval()
    agree(stock, fused, X)
    agree(stock, fused, X)


@torch.no_grad()
def test_the_filter_tells_blocks_apart():
    stock = randomize(nn.Sequential(*[Moded() for _ in range(3)])).eval()
    fused = fr.fuse(stock, filter=lambda name, module: name != "1.inner")
    assert [row.name for row in fr.report(fused) if row.status == "skipped"] == ["1.conv", "1.inner.conv"]
    assert fr.report(fused).rows[2].reason == "1: forward shares a tensor with inner, which is not understood"
    twice(stock, fused, X)


@torch.no_grad()
def test_refusals_hold_for_all_that_are_alike(monkeypatch):
    class Counts(Chosen):
        def forward(self, x):
            self.how = 1
            return super().forward(x)

    stock = randomize(nn.Sequential(*[nn.Sequential(Counts(0), Chosen(True)) for _ in range(4)])).eval()
    fused, seen = traced(monkeypatch, stock)
    reasons = fr.report(fused).skipped()
    assert reasons == {f"{i}.0: forward sets an attribute": [f"{i}.0.conv"] for i in range(4)}
    assert seen["capture"] == 4
    twice(stock, fused, X)


@pytest.mark.parametrize("running", [True, False])
def test_the_collector_is_as_it_was(running):
    stock = nn.Sequential(Chosen(True))
    try:
        (gc.enable if running else gc.disable)()
        fr.fuse(stock)
        assert gc.isenabled() is running
    finally:
        gc.enable()
