"""Training takes stock's course: steps in fp64, curves within stock's own spread, accuracy, depth, the block's formula.

On a CPU both plans, the default and the one that saves little and makes the rest again (`recompute`), run stock's
operators on the same numbers: their curves are stock's to the last bit. The spread is for what rounds otherwise.
"""

import functools
import statistics
from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("typer")

from fused_resnet import backends, models
from fused_resnet import nn as ours
from fused_resnet.bench import curves
from fused_resnet.bench.stock import plain
from fused_resnet.cli import datasets
from fused_resnet.cli.processes import Processes
from fused_resnet.cli.recipe import Recipe
from fused_resnet.cli.trainer import Trainer
from fused_resnet.cli.work.train import variant
from tests.fusing.pairs import BRANCH, nodes

# The runs of stock serve several of these tests.
pytestmark = pytest.mark.xdist_group("curves")
EXACT = 1e-10
ALONE = Processes(0, 1, "cpu")
# 44 steps an epoch: 308 steps. At higher rates rounding errors grow so fast that a rate that is wrong hides in them.
CURVE = Recipe(data="digits", size=8, depth=8, batch=32, epochs=7, rate=0.02)
SEEDS = range(5)


class Permuted(Trainer):
    """Stock training with the samples permuted inside each batch: equal but for the order of its sums."""

    shuffle = 0

    def batches(self, done):
        dice = torch.Generator().manual_seed(self.shuffle * 100_003 + done)
        mixed = []
        for images, labels in super().batches(done):
            order = torch.randperm(len(labels), generator=dice)
            mixed.append((images[order].contiguous(memory_format=torch.channels_last), labels[order]))
        return mixed


def trainer(recipe, way, kind=Trainer, dtype=torch.float32):
    data = datasets.load(recipe.data, recipe.size).limited(recipe.limit)
    data = data.coloured() if recipe.model else data
    data = replace(data, train_x=data.train_x.to(dtype), test_x=data.test_x.to(dtype))
    made = kind(variant(recipe, data, way, ALONE).to(dtype), data, recipe, ALONE)
    made.epochs = recipe.epochs
    return made


def curve(recipe, way, shuffle=None):
    """The curve of a whole run; with `shuffle` of permuted batches."""
    made = trainer(recipe, way, Trainer if shuffle is None else Permuted)
    made.shuffle = shuffle
    made.run()
    return made.curve


@functools.cache
def stock_runs():
    return [curve(CURVE, "stock", shuffle).loss for shuffle in range(1, 5)]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("model", [None, "resnet18"])
def test_eight_steps_in_fp64_equal_stock(model, recompute):
    recipe = Recipe(data="digits", size=32 if model else 16, limit=128, model=model, depth=20, batch=16, epochs=1,
                    recompute=recompute)
    fused, stock = (trainer(recipe, way, dtype=torch.float64) for way in ("fused", "stock"))
    for made in (fused, stock):
        made.train_mode()
    for _ in range(8):
        values = []
        for made in (fused, stock):
            made.step()
            values.append(made._unread[-1].double())
        assert abs(values[0] - values[1]) <= EXACT
    for (name, a), b in zip(fused.net.state_dict().items(), stock.net.state_dict().values(), strict=True):
        assert (a.double() - b.double()).abs().max() <= EXACT * max(1.0, float(b.abs().max())), name


@pytest.mark.parametrize("recompute", [False, True])
def test_both_plans_take_stocks_steps_to_the_last_bit(recompute):
    recipe = replace(CURVE, limit=256, epochs=1, recompute=recompute)
    assert curve(recipe, "fused") == curve(recipe, "stock")


@pytest.mark.gate
@pytest.mark.skipif(backends.available()["triton"] is not None, reason="Triton cannot run here")
def test_our_kernels_take_stocks_steps():
    """Forward, backward and evaluation of a network on the Triton kernels, in the interpreter where there is no GPU."""
    recipe = replace(CURVE, batch=8, limit=64, epochs=1, recompute=True)
    stock, fused = (trainer(recipe, way) for way in ("stock", "fused"))
    with backends.use("triton"):
        for made in (stock, fused):
            made.train_mode()
            made.step()
            made.step()
            made.read()
        assert fused.curve.loss == pytest.approx(stock.curve.loss, rel=1e-5)
        for (name, p), q in zip(fused.net.named_parameters(), stock.net.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=name)
        images = fused.data.test_x[:8]
        with torch.no_grad():
            torch.testing.assert_close(fused.net.eval()(images), stock.net.eval()(images), rtol=1e-4, atol=1e-5)


@pytest.mark.gate
def test_300_steps_lie_within_the_spread_of_stock():
    recipe = replace(CURVE, recompute=True)
    assert nodes(trainer(recipe, "fused").net.train()(torch.randn(4, 1, 8, 8)))[BRANCH], "nothing is made again"
    found = curve(recipe, "fused")
    assert len(found.loss) >= 300 and curves.inside(found.loss, stock_runs()) >= 0.95


@pytest.mark.gate
@pytest.mark.parametrize("factor", [1.01, 1.03])
def test_a_rate_that_is_a_little_off_lies_outside(factor):
    assert curves.inside(curve(replace(CURVE, rate=CURVE.rate * factor), "stock").loss, stock_runs()) < 0.95


@pytest.mark.gate
def test_five_seeds_are_as_accurate_as_stock():
    recipe = Recipe(data="digits", size=16, depth=8, batch=32, epochs=6, rate=0.1)
    stock, fused = (statistics.fmean(curve(replace(recipe, seed=seed, recompute=way == "fused"), way).accuracy[-1]
                                     for seed in SEEDS) for way in ("stock", "fused"))
    assert stock > 0.95 and abs(fused - stock) <= 0.005, (stock, fused)


def one_step(depth, size, recompute):
    """A network after one step beside its plain twin: losses, and that everything stayed finite."""
    net = models.cifar_resnet(depth).train()
    twin = plain(net)
    for block in net.modules():
        if hasattr(type(block), "recompute"):
            block.recompute = recompute
    x, labels, losses = torch.randn(2, 3, size, size), torch.tensor([3, 7]), []
    for one in (net, twin):
        sgd = torch.optim.SGD(one.parameters(), lr=0.1)
        loss = nn.functional.cross_entropy(one(x), labels)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in one.parameters())
        sgd.step()
        assert all(p.isfinite().all() for p in one.state_dict().values())
        losses.append(float(loss.detach()))
    assert losses[0] == losses[1]
    return net, twin


@pytest.mark.parametrize("recompute", [False, True])
def test_resnet110_trains_a_step(recompute):
    net, twin = one_step(110, 32, recompute)
    if not recompute:
        for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), name


@pytest.mark.gate
@pytest.mark.parametrize("recompute", [False, True])
def test_resnet1202_trains_a_step(recompute):
    one_step(1202, 32, recompute)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_gradient_of_a_block_is_dy_times_one_plus_the_branchs_jacobian(recompute):
    """dL/dx = dL/dz (1 + dF/dx) for z = x + F(x), and dL/dz = dL/dy where the last ReLU passes."""
    block = ours.ResidualBlock(4, 4).double().train()
    block.recompute = recompute
    with torch.no_grad():
        block.bn2.weight.uniform_(0.5, 1.5)
    x, dy, v = (torch.randn(3, 4, 6, 5, dtype=torch.float64) for _ in range(3))

    def branch(x):
        return block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))

    _, pulled = torch.autograd.functional.vjp(branch, x, dz := dy * (x + branch(x) > 0))
    x.requires_grad_()
    dx, = torch.autograd.grad(block(x), x, dy)
    torch.testing.assert_close(dx, dz + pulled, rtol=EXACT, atol=EXACT)
    h = 1e-6
    with torch.no_grad():
        slope = ((block(x + h * v) - block(x - h * v)) * dy).sum() / (2 * h)
    torch.testing.assert_close((dx * v).sum(), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_pass_an_identity_unchanged(recompute):
    """Where F is 0 the factor is 1: a stack of such blocks hands the gradient through as it is."""
    stack = nn.Sequential(*(ours.ResidualBlock(4, 4) for _ in range(20))).train()
    for block in stack:
        block.recompute = recompute
        nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 4, 6, 5, requires_grad=True)
    dy = torch.randn(2, 4, 6, 5)
    dx, = torch.autograd.grad(stack(x), x, dy)
    assert torch.equal(dx, dy)


def test_inside_measures_against_the_widest_deviation_of_the_window():
    stock = [[1.0] * 100, [1.0] * 100]
    stock[0][50], stock[1][50] = 1.1, 0.9
    assert curves.inside([1.0] * 100, stock) == 1.0
    near = [1.0] * 100
    near[40] = 1.19
    far = [1.0] * 100
    far[40], far[70] = 1.21, 1.01
    assert curves.inside(near, stock) == 1.0 and curves.inside(far, stock) == 0.98
    assert curves.smooth([1.0, 2.0, 3.0, 4.0], 2) == [1.0, 1.5, 2.5, 3.5]
