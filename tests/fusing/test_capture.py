"""What a graph would forget is not captured: the module stays stock, with all its effects, and says why."""

import random
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet as fr
from fused_resnet.fusing import plans
from tests.fusing.helpers import agree, counts, equal, twice
from tests.nets import randomize

LOG: list = []
FLAG = {"calls": 0}


def remember(x):
    LOG.append(1)
    return x


class Block(nn.Module):
    """conv, norm, ReLU and a residual; subclasses do one thing more."""

    def __init__(self, channels=8):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.calls, self.seen, self.scale = 0, [], 1.0

    def body(self, x):
        return self.relu(self.bn(self.conv(x)) + x)


class SetsAttribute(Block):
    def forward(self, x):
        self.calls = self.calls + 1
        return self.body(x)


class WritesContainer(Block):
    def forward(self, x):
        FLAG["calls"] += 1
        return self.body(x)


class Prints(Block):
    def forward(self, x):
        print("here")
        return self.body(x)


class AsksInstance(Block):
    def forward(self, x):
        return self.body(x) if isinstance(x, torch.Tensor) else x


class AsksType(Block):
    def forward(self, x):
        return self.body(x) if type(x) is torch.Tensor else x


class Branches(Block):
    def forward(self, x):
        return self.body(x) if x.mean() > 0 else x


class BranchesOnWeights(Block):
    def forward(self, x):
        return self.body(x) if self.bn.running_mean.sum() > 0 else self.conv(x)


class BakesWeight(Block):
    def forward(self, x):
        return self.body(x) * float(self.bn.bias[0])


class BranchesOnShape(Block):
    def forward(self, x):
        return self.body(x) if x.shape[-1] > 8 else x


class UsesContext(Block):
    def forward(self, x):
        with torch.no_grad():
            return self.body(x)


class IsDecorated(Block):
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, x):
        return self.body(x)


class HelperIsDecorated(Block):
    @torch.inference_mode()
    def inner(self, x):
        return self.body(x)

    def forward(self, x):
        return self.inner(x)


class Catches(Block):
    def forward(self, x):
        try:
            return self.body(x)
        except RuntimeError:
            return x


class CallsHelper(Block):
    def forward(self, x):
        return self.body(remember(x))


class Appends(Block):
    def forward(self, x):
        self.seen.append(1)
        return self.body(x)


class TakesMany(Block):
    def forward(self, *xs):
        return self.body(xs[0])


class ScalesInput(Block):
    def forward(self, x):
        x *= 0.5
        return self.body(x)


class ScalesInputByMethod(Block):
    def forward(self, x):
        return self.body(x.mul_(0.5))


class ReluOnInput(Block):
    def __init__(self):
        super().__init__()
        self.early = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.bn(self.conv(self.early(x))) + x


class PositionalInplace(Block):
    def forward(self, x):
        return self.bn(self.conv(F.relu(x, True))) + x


class ReluOnShortcut(Block):
    def forward(self, x):
        shortcut = self.bn(x)
        return self.bn(self.conv(shortcut)) + F.relu_(shortcut) + shortcut


class ThroughView(Block):
    def forward(self, x):
        out = self.body(x)
        out.view(-1).mul_(2)
        return out


class WritesOut(Block):
    def forward(self, x):
        out = self.body(x)
        return torch.add(out, 1, out=x)


class ByChance(Block):
    def forward(self, x):
        return self.body(x) if random.random() < 2 else x


class ByTime(Block):
    def forward(self, x):
        return self.body(x) * (1 if time.time() > 0 else 0)


class OwnTensor(Block):
    def forward(self, x):
        return self.body(x) + torch.ones(1)


class KeepsTensor(Block):
    def __init__(self):
        super().__init__()
        self.shift = torch.ones(1)

    def forward(self, x):
        return self.body(x) + self.shift


class PopsState(Block):
    def forward(self, x):
        scale = FLAG.pop("calls")
        FLAG["calls"] = scale
        return self.body(x)


class Yields(Block):
    def parts(self, x):
        yield self.body(x)
        yield x

    def forward(self, x):
        a, b = self.parts(x)
        return a + b


REFUSALS = {
    SetsAttribute: "sets an attribute", WritesContainer: "writes into a container", Prints: "print",
    AsksInstance: "tests types", AsksType: "tests types", Branches: "more than dataflow",
    BakesWeight: "more than dataflow",
    BranchesOnWeights: "more than dataflow", BranchesOnShape: "more than dataflow", UsesContext: "context manager",
    IsDecorated: "context manager", HelperIsDecorated: "context manager", Catches: "handles exceptions",
    CallsHelper: "for its effect", Appends: "for its effect", TakesMany: "takes *xs", ScalesInput: "in place",
    ScalesInputByMethod: "in place", ReluOnInput: "in place", PositionalInplace: "in place", ReluOnShortcut: "in place",
    ThroughView: "for its effect", WritesOut: "out=", ByChance: "chance or time", ByTime: "chance or time",
    OwnTensor: "tensors of its own", KeepsTensor: "neither parameter nor buffer", PopsState: "calls pop",
    Yields: "is a generator"}


@pytest.mark.parametrize("kind", REFUSALS, ids=lambda kind: kind.__name__)
@torch.no_grad()
def test_more_than_dataflow_stays_stock(kind, capsys):
    stock = randomize(kind()).eval()
    fused = fr.fuse(stock)
    row, = fr.report(fused)
    assert row.status == "skipped" and REFUSALS[kind] in row.reason and not plans(fused)
    for size in (12, 6):
        x, y = torch.randn(2, 2, 8, size, size).abs()
        y.copy_(x)
        LOG.clear()
        FLAG["calls"] = 0
        assert torch.equal(stock(x), fused(y)) and torch.equal(x, y)
        assert stock.calls == fused.calls and stock.seen == fused.seen
        assert len(LOG) in (0, 2) and FLAG["calls"] in (0, 2)
    printed = capsys.readouterr().out
    assert printed == "here\n" * 4 * (kind is Prints)


@torch.no_grad()
def test_a_forward_replaced_on_an_instance_is_called():
    stock = randomize(nn.Sequential(Block(), nn.Conv2d(8, 8, 1), nn.ReLU())).eval()
    stock[0].forward = lambda x: x + 1
    stock[1].forward = lambda x: x * 3
    fused = fr.fuse(stock)
    assert fr.report(fused).fused == 0
    assert fr.report(fused).rows[0].reason == "0: forward was replaced on the instance"
    equal(stock, fused, torch.randn(1, 8, 5, 5))
    assert stock[0].__dict__["forward"] is fr.unfuse(fused)[0].__dict__["forward"]


@pytest.mark.parametrize("kind", [SetsAttribute, Branches, Appends, ReluOnInput, ScalesInput], ids=lambda k: k.__name__)
@torch.no_grad()
def test_what_stands_around_an_untraceable_module_fuses(kind):
    stem, last = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), nn.Conv2d(8, 8, 1)
    stock = randomize(nn.Sequential(stem, kind(), last, nn.ReLU())).eval()
    fused = fr.fuse(stock)
    assert counts(fused) == (2, 3) and len(plans(fused)) == 2
    for _ in range(2):
        agree(stock, fused, torch.randn(2, 3, 12, 12))
        assert fused[1].calls == stock[1].calls and fused[1].seen == stock[1].seen, "once a call, the first included"
    assert stock[1].calls in (0, 2)


@torch.no_grad()
def test_an_untraceable_parent_gets_its_children_planned():
    class Parent(Prints):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())

        def forward(self, x):
            print("parent")
            return self.inner(x)

    stock = randomize(Parent()).eval()
    fused = fr.fuse(stock)
    assert list(plans(fused)) == ["inner"]
    assert [row.status for row in fr.report(fused)] == ["skipped", "fused"]
    twice(stock, fused, torch.randn(1, 8, 9, 9))


@torch.no_grad()
def test_an_untraceable_child_that_shares_its_input_keeps_the_parent_stock():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.child = nn.Conv2d(8, 8, 1), ReluOnInput()

        def forward(self, x):
            out = F.relu(self.conv(x))
            return self.child(out) + out

    stock = randomize(Parent()).eval()
    fused = fr.fuse(stock)
    assert "shares a tensor with child" in fr.report(fused).rows[0].reason
    equal(stock, fused, torch.randn(1, 8, 5, 5))


def test_a_running_profiler_is_left_alone():
    import cProfile

    profile = cProfile.Profile()
    fused = profile.runcall(fr.fuse, randomize(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())).eval())
    assert profile.getstats() and counts(fused) == (1, 1)
