"""Forwards that are dataflow and still unusual: chance, keywords, structured results, shared modules."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet as fr
from tests.fusing.helpers import counts, equal, twice
from tests.nets import randomize


class Chance(nn.Module):
    """Draws in eval mode, too: Monte-Carlo dropout."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        return F.dropout(F.relu(self.bn(self.conv(x))), 0.5, True)


@torch.no_grad()
def test_random_numbers_are_drawn_as_in_stock():
    stock = randomize(Chance()).eval()
    fused = fr.fuse(stock)
    for _ in range(3):
        torch.manual_seed(3)
        expected, follow = stock(torch.ones(1, 8, 5, 5)), torch.rand(3)
        torch.manual_seed(3)
        torch.testing.assert_close(fused(torch.ones(1, 8, 5, 5)), expected)
        assert torch.equal(torch.rand(3), follow)
    assert counts(fused) == (1, 1) and not fr.report(fused).notes


class Keywords(nn.Module):
    """Calls its children by keyword, which is legal."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x):
        out = self.relu(input=self.bn(input=self.conv(input=x)))
        return F.relu(input=self.bn(self.conv(out))) + torch.add(input=out, other=out)


@torch.no_grad()
def test_children_called_by_keyword():
    stock = randomize(Keywords()).eval()
    twice(stock, fr.fuse(stock), torch.randn(1, 8, 5, 5))


class Outputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout()

    def forward(self, x):
        out = F.relu(self.bn(self.conv(x)) + x)
        return {"out": out, "list": [out, x, self.drop(x)], "shape": (out.shape[0], "text", None), "again": out,
                "pool": F.max_pool2d(out, 2), "flat": F.max_pool2d(out, 3).flatten(2),
                "moved": self.bn(out).permute(0, 2, 3, 1)}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_outputs_of_any_structure(memory_format):
    stock = randomize(Outputs()).eval()
    fused = fr.fuse(stock)
    assert counts(fused) == (1, 1)
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=memory_format)
    twice(stock, fused, x)
    result = fused(x)
    assert result["list"][0] is result["out"] is result["again"]
    assert result["list"][1] is x and result["list"][2] is x


class Shared(nn.Module):
    """One convolution at two places, one norm for both, weights tied to a second convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.tied = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.tied.weight = self.conv.weight
        self.alias = self.conv

    def forward(self, x):
        out = F.relu(self.bn(self.conv(x)))
        out = F.relu(self.bn(self.alias(out)))
        return F.relu(self.bn(self.tied(out)) + out)


@torch.no_grad()
def test_shared_modules_and_parameters():
    stock = randomize(Shared()).eval()
    fused = fr.fuse(stock)
    assert counts(fused) == (2, 2)
    x = torch.randn(1, 8, 6, 6)
    twice(stock, fused, x)
    stock.conv.weight.mul_(2)
    fused.tied.weight.mul_(2)
    twice(stock, fused, x)


class SharesMemory(Outputs):
    def forward(self, x):
        out = F.relu(self.bn(self.conv(x)))
        return out, out.flatten(2)


@torch.no_grad()
def test_results_that_share_memory_stay_stocks():
    stock = randomize(SharesMemory()).eval()
    fused = fr.fuse(stock)
    with pytest.warns(UserWarning, match="share memory"):
        out, view = fused(torch.randn(1, 8, 5, 5))
    assert view.data_ptr() == out.data_ptr() and "share memory" in fr.report(fused).notes[0]
    equal(stock, fused, torch.randn(1, 8, 5, 5))
