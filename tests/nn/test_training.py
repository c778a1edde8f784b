"""Branches of live modules beside the modules: batch norm's semantics to the letter, dtypes, autocast, refusals."""

import copy

import pytest
import torch
from torch import nn

from fused_resnet.nn import training
from fused_resnet.nn.training import Unit


def unit(c, k, kernel=3, activation="relu", stride=1, bias=False, **norm):
    torch.manual_seed(c * 100 + k)
    conv = nn.Conv2d(c, k, kernel, stride, kernel // 2, bias=bias)
    made = nn.BatchNorm2d(k, **norm)
    with torch.no_grad():
        for p in made.parameters():
            p.uniform_(0.5, 1.5)
        for b in (made.running_mean, made.running_var):
            if b is not None:
                b.uniform_(0.5, 1.5)
    return nn.ModuleDict({"conv": conv, "norm": made}), activation


class Chain(nn.Module):
    """Units one after the other, with or without a shortcut."""

    def __init__(self, *units, projection=None, adds=False):
        super().__init__()
        self.units = nn.ModuleList(u for u, _ in units)
        self.names = [a for _, a in units]
        self.projection = projection[0] if projection else None
        self.adds = adds

    def forward(self, x):
        acts = {"relu": nn.ReLU(), "relu6": nn.ReLU6(), "identity": nn.Identity()}
        z = x
        for i, u in enumerate(self.units):
            z = u["norm"](u["conv"](z if i == 0 else acts[self.names[i - 1]](z)))
        if self.projection is not None:
            z = z + self.projection["norm"](self.projection["conv"](x))
        elif self.adds:
            z = z + x
        return acts[self.names[-1]](z)

    def fused(self, x, recompute=False, **options):
        units = [Unit(u["conv"], u["norm"], a) for u, a in zip(self.units, self.names, strict=True)]
        other = None if self.projection is None else Unit(self.projection["conv"], self.projection["norm"], "identity")
        assert all(training.blocked(u) is None for u in units)
        return training.run(x, units, x if self.adds or other else None, other, recompute, **options)


def image(c=4, dtype=torch.float32, n=3):
    torch.manual_seed(0)
    return torch.randn(n, c, 6, 5, dtype=dtype, requires_grad=True)


def compare(net, x, steps=3, tolerance=1e-5, **options):
    """A few forwards and backwards of both; parameters' gradients, buffers and outputs must agree."""
    twin, other = copy.deepcopy(net), x.detach().clone().requires_grad_()
    for _ in range(steps):
        y, expected = net.fused(x, **options), twin(other)
        assert y is not None and y.dtype == expected.dtype and y.stride() == expected.stride()
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
        weight = torch.randn_like(y)
        (y * weight).sum().backward()
        (expected * weight).sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=tolerance * 10, atol=tolerance * 100)
    for (name, a), b in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if b.grad is not None:
            assert a.grad.dtype == b.grad.dtype and a.grad.stride() == b.grad.stride(), name
            torch.testing.assert_close(a.grad, b.grad, rtol=tolerance * 10, atol=tolerance * 100)
    for (name, a), b in zip(net.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=name)


NORMS = {"plain": {}, "cumulative": {"momentum": None}, "zero": {"momentum": 0.0}, "not-affine": {"affine": False},
         "no-running": {"track_running_stats": False}, "eps": {"eps": 0.1}}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_norms_keep_batchnorms_semantics(norm, mode, recompute):
    net = Chain(unit(4, 6, 1, **NORMS[norm]), unit(6, 4, **NORMS[norm]), adds=True).train(mode == "train")
    compare(net, image(), recompute=recompute)


def test_single_norms_may_be_frozen_inside_of_a_training_block():
    net = Chain(unit(4, 6, 1), unit(6, 6, bias=True), unit(6, 8, 1), projection=unit(4, 8, 1))
    net.units[1]["norm"].eval()
    net.projection["norm"].eval()
    net.units[0]["norm"].weight.requires_grad_(False)
    net.units[2]["conv"].weight.requires_grad_(False)
    compare(net, image())


def test_statistics_move_without_gradients_too():
    net = Chain(unit(4, 4))
    twin = copy.deepcopy(net)
    with torch.no_grad():
        torch.testing.assert_close(net.fused(image()), twin(image()))
    assert net.units[0]["norm"].num_batches_tracked == 1
    torch.testing.assert_close(net.units[0]["norm"].running_var, twin.units[0]["norm"].running_var)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_data_beside_fp32_norms(dtype):
    net = Chain(unit(4, 6, 1), unit(6, 4), adds=True)
    for u in net.units:
        u["conv"].to(dtype)
    compare(net, image(dtype=dtype), steps=1, tolerance=4e-2)


def test_autocast_casts_what_stock_casts():
    net = Chain(unit(4, 6, 1), unit(6, 8), projection=unit(4, 8, 1))
    with torch.autocast("cpu", torch.bfloat16):
        compare(net, image(), steps=1, tolerance=4e-2)
        same = Chain(unit(4, 4), adds=True)
        assert same.fused(image()) is None, "stock adds fp32 to bf16 and answers in fp32"
        assert same.fused(image(dtype=torch.float64)) is None


def test_fp64():
    compare(Chain(unit(4, 6), unit(6, 4), adds=True).double(), image(dtype=torch.float64), tolerance=1e-12)


@pytest.mark.parametrize(("net", "x"), [
    (Chain(unit(4, 4)), torch.randn(1, 4, 1, 1)),  # one value a channel
    (Chain(unit(4, 4)), torch.randn(2, 5, 6, 6)),  # channels
    (Chain(unit(4, 4)), torch.randn(4, 6, 6)),  # no batch
    (Chain(unit(4, 4)), torch.randn(2, 4, 6, 6).double()),
    (Chain(unit(4, 4)), torch.randn(0, 4, 6, 6)),
    (Chain(unit(4, 6), adds=True), torch.randn(2, 4, 6, 6)),  # cannot be added
    (Chain(unit(4, 4, stride=2), adds=True), torch.randn(2, 4, 6, 6)),
])
def test_what_stock_would_complain_about_is_left_to_stock(net, x):
    before = copy.deepcopy(net.state_dict())
    assert net.fused(x) is None
    for a, b in zip(before.values(), net.state_dict().values(), strict=True):
        assert torch.equal(a, b), "a refusal has no side effects"


def test_reasons():
    good = Chain(unit(4, 4)).units[0]
    assert training.blocked(Unit(good["conv"], good["norm"], "relu")) is None
    assert "silu" in training.blocked(Unit(good["conv"], good["norm"], "silu"))
    assert "GroupNorm" in training.blocked(Unit(good["conv"], nn.GroupNorm(1, 4), "relu"))
    good["norm"].register_forward_hook(lambda *a: None)
    assert "hook" in training.blocked(Unit(good["conv"], good["norm"], "relu"))
