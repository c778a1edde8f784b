"""verify() must bite: what is wrong is called wrong."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet as fr
from fused_resnet.fusing import plans
from tests import seeds
from tests.nets import randomize

X = torch.randn(2, 8, 10, 10, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def stock():
    return randomize(nn.Sequential(seeds.ShortcutBlock(8, 8), seeds.Bottleneck(8, 8))).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fused_models_pass(stock, dtype):
    fused = fr.fuse(stock)
    verdict = fr.verify(stock.to(dtype), fused.to(dtype), X.to(dtype))
    assert verdict and str(verdict).startswith("ok: relative rms error") and verdict.fused.rel < 0.02


def drop_add(plan):
    plan.launches[1].residual = None


def drop_activation(plan):
    plan.launches[0].activation = "identity"


def drop_norm(plan):
    plan.launches[0].norm = None


def swap_norms(plan):
    a, b = plan.launches[:2]
    a.norm, b.norm = b.norm, a.norm


def add_twice(plan):
    plan.launches[1].x, plan.launches[1].residual = plan.launches[1].residual, plan.launches[1].x


@pytest.mark.parametrize("fault", [drop_add, drop_activation, drop_norm, swap_norms, add_twice])
@torch.no_grad()
def test_a_broken_plan_is_found(stock, fault):
    fused = fr.fuse(stock)
    fused(X)
    fault(plans(fused)[""])
    verdict = fr.verify(stock, fused, X)
    assert not verdict and str(verdict).startswith("WRONG")


@pytest.mark.parametrize("fault", [drop_add, drop_activation, drop_norm, swap_norms, add_twice])
@torch.no_grad()
def test_the_first_call_finds_it_too(stock, fault):
    fused = fr.fuse(stock)
    fault(plans(fused)[""])
    with pytest.warns(UserWarning, match="disagreed"):
        assert fr.verify(stock, fused, X)
    assert plans(fused)[""].broken


def test_nan_in_one_model_only_is_found(stock):
    fused = fr.fuse(stock)
    fused[0].bn1.running_mean[0] = float("nan")
    assert not fr.verify(stock, fused, X)


def test_neither_model_nor_sample_changes(stock):
    class Writes(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(F.relu_(x))

    model = Writes(stock).eval()
    before, x = [p.clone() for p in model.parameters()], X.clone()
    assert fr.verify(model, fr.fuse(model), x)
    assert torch.equal(x, X) and all(map(torch.equal, before, model.parameters()))
    assert fr.verify(fr.fuse(model), fr.fuse(model), x), "a fused model may stand for stock"


class Indexed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, index, x):
        return {"index": index, "out": F.relu(self.bn(self.conv(x)))}


def test_several_inputs_and_structured_outputs():
    model = randomize(Indexed()).eval()
    assert fr.verify(model, fr.fuse(model), (torch.arange(3), X))


def test_what_cannot_be_compared_is_refused(stock):
    fused = fr.fuse(stock)
    with pytest.raises(ValueError, match="eval"):
        fr.verify(stock.train(), fused, X)
    with pytest.raises(ValueError, match="no floating-point tensor"):
        fr.verify(nn.Flatten().eval(), nn.Flatten().eval(), torch.arange(4)[None])
