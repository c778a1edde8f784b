"""Containers that a forward makes for itself are no effect; everything that only looks like it is."""

import collections

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet as fr
from fused_resnet.fusing import plans
from tests.fusing.helpers import counts, equal, twice
from tests.nets import randomize

LOG: list = []
TABLE: dict = {}


def quiet_assert(condition, message=""):
    LOG.append(message)


class Meter:
    def __init__(self):
        self.count = 0

    def add_(self, n):
        self.count += n


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(2))
        self.seen, self.table, self.meter, self.flag = [], {}, Meter(), True
        self.register_buffer("count", torch.zeros(()))

    def body(self, x):
        return F.relu(self.bn(self.conv(x)))


class LocalList(Block):
    def forward(self, x):
        out = []
        for conv in self.convs:
            x = F.relu(conv(x))
            out.append(x)
        out.insert(0, self.body(x))
        out.extend([x])
        return torch.cat(out, 1)


class LocalDict(Block):
    def forward(self, x):
        out = {}
        out["first"] = x = self.body(x)
        for i, conv in enumerate(self.convs):
            out[f"conv{i}"] = x = F.relu(conv(x))
        return out


class Ordered(Block):
    def forward(self, x):
        result = collections.OrderedDict()
        result["out"] = self.body(x)
        if self.flag:
            result["aux"] = result["out"].mean((2, 3))
        return result


class NestedOrdered(Block):
    def forward(self, x):
        y = self.body(x)
        return [collections.OrderedDict([("b", y), ("a", (x, 1))]), {"y": y}]


class Asserts(Block):
    def forward(self, x):
        torch._assert(x.shape[1] == 8, "eight channels")
        return self.body(x)


class DropsPath(Block):
    """As timm writes stochastic depth: in eval mode its second half does not run."""

    def drop(self, x, p=0.5, training=False):
        if p == 0.0 or not training:
            return x
        mask = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(1 - p)
        mask.div_(1 - p)
        return x * mask

    def forward(self, x):
        out = self.drop(self.bn(self.conv(x)), 0.5, self.training)
        out += x
        return F.relu(out)


class Makes(Block):
    def forward(self, x):
        out = list(self.convs)
        sizes = dict(self.table)
        sizes["x"] = x
        out.append(self.conv)
        for conv in out:
            x = F.relu(conv(x))
        return x + sizes["x"]


KEPT = {LocalList: (3, 3), LocalDict: (3, 3), Ordered: (1, 3), NestedOrdered: (1, 3), Asserts: (1, 3), Makes: (3, 3),
        DropsPath: (1, 3)}


@pytest.mark.parametrize("kind", KEPT, ids=lambda kind: kind.__name__)
@torch.no_grad()
def test_what_stays_inside_is_dataflow(kind):
    stock = randomize(kind()).eval()
    fused = fr.fuse(stock)
    assert counts(fused) == KEPT[kind] and "" in plans(fused), str(fr.report(fused))
    for size in (6, 5):
        twice(stock, fused, torch.randn(2, 8, size, size))
    assert not fr.report(fused).notes and stock.seen == fused.seen == []


@torch.no_grad()
def test_assertions_are_made_at_every_call():
    fused = fr.fuse(Asserts().eval())
    fused(torch.randn(1, 8, 4, 4))
    with pytest.raises(AssertionError, match="eight channels"):
        fused(torch.randn(1, 4, 4, 4))


class Alias(Block):
    def forward(self, x):
        out = self.seen
        out.append(1)
        return self.body(x)


class SometimesAlias(Block):
    def forward(self, x):
        out = []
        if self.flag:
            out = self.seen
        out.append(1)
        return self.body(x)


class Choice(Block):
    def forward(self, x):
        out = [] if not self.flag else self.seen
        out.append(1)
        return self.body(x)


class Chain(Block):
    def forward(self, x):
        (self.seen or LOG).append(1)
        return self.body(x)


class Walrus(Block):
    def forward(self, x):
        (out := self.seen).append(1)
        out = [x]
        return self.body(out[0])


class Unpacked(Block):
    def forward(self, x):
        y, out = x, self.seen
        out.append(1)
        out = []
        return self.body(y)


class Argument(Block):
    def grow(self, out, x):
        out.append(x)
        return x

    def forward(self, x):
        return self.body(self.grow(self.seen, x))


class Default(Block):
    def forward(self, x, out=LOG):  # the classic
        out.append(1)
        return self.body(x)


class LoopVariable(Block):
    def forward(self, x):
        for out in (self.seen, []):
            out.append(1)
        return self.body(x)


class Captured(Block):
    def forward(self, x):
        out = self.seen

        def grow():
            out.append(1)
            return x

        return self.body(grow())


class ResultIsKept(Block):
    def forward(self, x):
        _ = self.seen.append(1)
        return self.body(x)


class InAnExpression(Block):
    def forward(self, x):
        return (self.body(x), self.seen.append(1))[0]


class InAComprehension(Block):
    def forward(self, x):
        done = [self.seen.append(i) for i in (1,)]
        return self.body(x) if done else x


class BoundBefore(Block):
    def forward(self, x):
        grow = self.seen.append
        grow(1)
        return self.body(x)


class AliasOfTable(Block):
    def forward(self, x):
        out = self.table
        out["x"] = 1
        return self.body(x)


class GlobalTable(Block):
    def forward(self, x):
        TABLE["x"] = 1
        return self.body(x)


class TableOfTables(Block):
    def forward(self, x):
        out = {}
        out["t"] = self.table
        out["t"]["x"] = 1
        return self.body(x)


class ListOfLists(Block):
    def forward(self, x):
        out = [self.seen]
        out[0].append(1)
        return self.body(x)


class NotTorchs(Block):
    def forward(self, x):
        quiet_assert(True, "called")
        return self.body(x)


class CountsByBuffer(Block):
    def forward(self, x):
        self.count.add_(1)
        return self.body(x)


class CountsByMeter(Block):
    def forward(self, x):
        self.meter.add_(1)
        return self.body(x)


class MeterByName(Block):
    def forward(self, x):
        meter = self.meter
        meter.add_(1)
        return self.body(x)


class WritesView(Block):
    def forward(self, x):
        out = self.body(x)
        view = out.view(-1)
        view.mul_(2)
        return out


class WritesSlice(Block):
    def forward(self, x):
        out = self.body(x)
        part = out[:, :4]
        part.mul_(2)
        return out


class WritesInput(Block):
    def forward(self, x):
        x.mul_(2)
        return self.body(x)


class WritesAlias(Block):
    def forward(self, x):
        out = self.body(x)
        same = out
        same.mul_(2)
        return out


class WritesWeight(Block):
    def forward(self, x):
        weight = self.conv.weight
        weight.mul_(1.5)
        return self.body(x)


class AnotherSelf(Block):
    def forward(self, x):
        y = self.body(x)
        self = self.meter
        self.add_(1)
        return y


LEFT = [Alias, SometimesAlias, Choice, Chain, Walrus, Unpacked, Argument, Default, LoopVariable, Captured, ResultIsKept,
        InAnExpression, InAComprehension, BoundBefore, AliasOfTable, GlobalTable, TableOfTables, ListOfLists, NotTorchs,
        CountsByBuffer, CountsByMeter, MeterByName, WritesView, WritesSlice, WritesInput, WritesAlias, WritesWeight,
        AnotherSelf]
IN_PLACE = {WritesView, WritesSlice, WritesInput, WritesAlias, WritesWeight}  # seen in the results


@pytest.mark.parametrize("kind", LEFT, ids=lambda kind: kind.__name__)
@torch.no_grad()
def test_what_others_can_see_is_an_effect(kind):
    stock = randomize(kind()).eval()
    fused = fr.fuse(stock)
    assert not plans(fused), str(fr.report(fused))
    assert all(row.reason and row.reason != "no plan covers it" for row in fr.report(fused))
    x = torch.randn(1, 8, 5, 5)
    before = len(LOG)
    stock(x)
    grown = len(LOG) - before
    fused(x)
    assert len(LOG) == before + 2 * grown
    equal(stock, fused, x)
    assert len(stock.seen) == len(fused.seen) and stock.table == fused.table
    assert stock.meter.count == fused.meter.count
    assert torch.equal(stock.count, fused.count)
    left = grown or stock.seen or stock.table or stock.meter.count or float(stock.count) or TABLE
    assert left or kind in IN_PLACE, "the forward has no effect that the test sees"
