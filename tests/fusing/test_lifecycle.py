"""Copies, files, threads, fusing again and taking it back."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import nn

import fused_resnet as fr
from fused_resnet.fusing import plans
from fused_resnet.nn import executor
from tests.fusing.helpers import agree, counts, equal, pickled, same_strides, saved, twice
from tests.fusing.nets import Block, X
from tests.nets import randomize


@pytest.mark.parametrize("clone", [copy.deepcopy, pickled, saved])
@torch.no_grad()
def test_copies_are_fused_and_independent(clone):
    stock = randomize(tv.resnet18()).eval()
    stock.features = nn.Sequential(Block(3), nn.Conv2d(3, 3, 1), nn.ReLU())
    fused = fr.fuse(stock)
    x = torch.randn(1, 3, 40, 40)
    for called in (False, True):
        twin = clone(fused)
        assert all(plan.module is twin.get_submodule(name) for name, plan in plans(twin).items()) and plans(twin)
        twice(stock, twin, x)
        assert counts(twin)[0] == counts(fused)[0] and not fr.report(twin).notes
        twin.layer1[0].relu = nn.GELU()
        twin.layer2[0].conv1.weight.mul_(2)
        if called:
            assert not torch.allclose(twin(x), stock(x))
        twice(stock, fused, x)


def test_functions_without_a_public_name_of_their_own_are_pickled():
    stock = randomize(Pools()).eval().requires_grad_(False)
    twice(stock, pickled(fr.fuse(stock)), X)


class Pools(Block):
    def forward(self, x):
        out = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        pooled = torch.cat([F.adaptive_avg_pool2d(out, 1), F.adaptive_max_pool2d(out, 1)], 1)
        return pooled * torch.sigmoid(self.bn2.bias[0])


def test_a_replica_for_data_parallel_is_stock(stock, fused):
    replica = fused.layer1._replicate_for_data_parallel()
    assert not plans(replica) and plans(fused.layer1)
    replica.conv1, replica.scale = nn.Conv2d(8, 8, 3, padding=1), 2.0
    assert not torch.equal(replica(X), fused.layer1(X))
    assert "_replicate_for_data_parallel" not in vars(fr.unfuse(fused).layer1)


@torch.no_grad()
def test_eight_threads_call_first_at_once(stock):
    class Slow(Block):
        def forward(self, x):
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(x)

    stock.layer2.append(Slow().eval())
    fused, results = fr.fuse(stock), []
    start = threading.Barrier(8)

    def work(i):
        start.wait()
        results.append((i, [fused(X + i) for _ in range(3)]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    for i, outputs in results:
        for out in outputs:
            torch.testing.assert_close(out, stock(X + i), rtol=1e-4, atol=1e-4)
    assert not any(plan.broken for plan in plans(fused).values()) and not executor.state.stock


def test_fuse_twice_and_unfuse(stock):
    fused = fr.fuse(stock)
    again = fr.fuse(fused)
    twice(stock, again, X)
    twice(stock, fused, X)
    assert len(plans(again)) == len(plans(fused))
    equal(stock, fr.unfuse(fused), X)
    assert not plans(fused) and "forward" not in vars(fused)
    with pytest.raises(ValueError, match=r"fuse\(\) returned"):
        fr.report(fused)
    assert fr.fuse(stock, inplace=True) is stock
    assert plans(fr.unfuse(again.layer1)) == {}
    twice(stock, again, X)


def test_a_part_may_be_fused_again(stock, fused):
    fr.fuse(fused.layer2, inplace=True)
    twice(stock, fused, X)


def test_filter(stock):
    fused = fr.fuse(stock, filter=lambda name, module: not name.startswith("layer2"))
    assert {r.name for r in fr.report(fused) if r.status == "fused"} == {"stem.0", "layer1.conv1", "layer1.conv2"}
    assert any("left out by the filter" in row.reason for row in fr.report(fused))
    assert not plans(fused.layer2) and plans(fused)[""].opaque
    for _ in range(2):
        agree(stock, fused, X)
    assert counts(fr.fuse(stock, filter=lambda name, module: name != "head")) == counts(fr.fuse(stock))


def test_strict_names_what_was_skipped(stock):
    assert fr.fuse(stock, strict=True) is not stock
    with pytest.raises(ValueError, match=r"layer1\.conv1"):
        fr.fuse(stock, strict=True, filter=lambda name, module: name != "layer1")


@pytest.mark.parametrize("wrong", [None, lambda x: x, nn.Module, "model"])
def test_fuse_takes_modules_only(wrong):
    with pytest.raises(ValueError, match=r"nn\.Module"):
        fr.fuse(wrong)
    with pytest.raises(ValueError, match="memory_format"):
        fr.fuse(nn.ReLU(), memory_format=torch.preserve_format)


@torch.no_grad()
def test_channels_last_throughout():
    stock = randomize(nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), Block(16))).eval()
    fused = fr.fuse(stock, memory_format=torch.channels_last)
    for size in (9, 3):
        x = torch.randn(2, 8, size, size)
        for _ in range(2):
            out = fused(x)
            same_strides(out, stock(x.contiguous(memory_format=torch.channels_last)))
            torch.testing.assert_close(out, stock(x), rtol=1e-4, atol=1e-4)
    assert not any(plan.broken for plan in plans(fused).values())
