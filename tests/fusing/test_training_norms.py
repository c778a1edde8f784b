"""Norms of a fused model while it trains: modes, frozen parts, statistics, errors, chance; equal to stock's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d
from torchvision.ops.stochastic_depth import StochasticDepth

import fused_resnet as fr
from fused_resnet.fusing import plans
from tests.fusing.helpers import same_strides
from tests.fusing.nets import Block, Net
from tests.fusing.pairs import (
    BRANCHES,
    Counted,
    X,
    both,
    close,
    fallbacks,
    net,
    norms,
    pair,
    same_state,
    same_step,
    train,
    trains,
)
from tests.nets import randomize


def frozen_norms(model):
    for norm in norms(model)[1::2]:
        norm.eval()


def frozen_norms_and_vectors(model):
    for norm in norms(model):
        norm.eval().requires_grad_(False)


def some_parameters(model):
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 != 0)


def only_the_head(model):
    model.requires_grad_(False).head.requires_grad_(True)


def without_counters(model):
    for norm in norms(model):
        norm.num_batches_tracked = None


def momentum(value):
    def change(model):
        for norm in norms(model):
            norm.momentum = value
    return change


CHANGES = {"nothing": lambda m: None, "eval": nn.Module.eval, "frozen_norms": frozen_norms,
           "frozen_norms_and_vectors": frozen_norms_and_vectors, "some_parameters": some_parameters,
           "only_the_head": only_the_head, "cumulative": momentum(None), "still": momentum(0.0),
           "momentum_1": momentum(1.0), "part_in_eval": lambda m: m.layer2.eval(),
           "head_in_eval": lambda m: m.head.eval(),
           "without_dropout": lambda m: m.layer1.drop.eval(), "without_counters": without_counters}


@pytest.mark.parametrize("when", ["before", "midway"])
@pytest.mark.parametrize("name", CHANGES)
def test_modes_and_frozen_parts(models, name, when):
    stock, fused = models
    x = X.clone().requires_grad_()
    if when == "midway":
        same_step(stock, fused, x)
    both(stock, fused, CHANGES[name])
    for _ in range(2):
        same_step(stock, fused, x)
    trains(fused, x)
    stock.train(), fused.train()
    same_step(stock, fused, x)
    stock.eval(), fused.eval()
    for x in (X, X.clone().requires_grad_()):
        close(fused(x), stock(x), 1e-10)


MADE = {"cumulative": {"momentum": None}, "no_statistics": {"track_running_stats": False}, "plain": {"affine": False},
        "bare": {"affine": False, "track_running_stats": False}, "large_eps": {"eps": 0.5}}


@pytest.mark.parametrize("name", MADE)
def test_norms_made_another_way(name):
    def change(model):
        for m in model.modules():
            for child, norm in m._modules.items():
                if isinstance(norm, nn.BatchNorm2d):
                    m._modules[child] = nn.BatchNorm2d(norm.num_features, **MADE[name]).double()

    stock = net()
    both(stock, stock, change)
    stock, fused = pair(stock)
    for mode in (True, True, False):
        stock.train(mode), fused.train(mode)
        same_step(stock, fused, X.clone().requires_grad_())
        trains(fused, X, BRANCHES)
        both(stock, fused, lambda m: m.zero_grad())


@pytest.mark.parametrize("layer", [FrozenBatchNorm2d, nn.SyncBatchNorm])
def test_other_norms(layer):
    stock = randomize(Net())
    for m in stock.modules():
        for child, norm in m._modules.items():
            if isinstance(norm, nn.BatchNorm2d) and (layer is nn.SyncBatchNorm or child != "bn2"):
                m._modules[child] = layer(8)
    stock, fused = pair(randomize(stock).double())
    for mode in (True, True, False):
        stock.train(mode), fused.train(mode)
        same_step(stock, fused, X.clone().requires_grad_())
        trains(fused, X, BRANCHES)


def test_norms_converted_after_fuse_run_stock_and_say_why(models):
    stock, fused = (nn.SyncBatchNorm.convert_sync_batchnorm(m) for m in models)
    same_step(stock, fused, X)
    assert "the submodule bn1, bn2 was replaced" in str(fallbacks(fused)["layer1"])
    again = fr.fuse(fused, recompute=False)
    trains(again, X, BRANCHES)


@pytest.mark.parametrize("size", [1, 2])
def test_one_value_a_channel_is_stocks_error_and_leaves_stocks_state(models, size):
    stock, fused = models
    stock.layer1.drop.p = fused.layer1.drop.p = 0.5
    x = X[:1, :, :1, :size]
    for _ in range(2):
        if size > 1:
            same_step(stock, fused, x)
            continue
        for model in (stock, fused):
            with pytest.raises(ValueError, match=r"Expected more than 1 value per channel when training, got input"):
                model(x)
        same_state(stock, fused)
        assert norms(fused)[0].num_batches_tracked == norms(stock)[0].num_batches_tracked > 0
        same_step(stock, fused, X)  # and goes on as stock does


@pytest.mark.parametrize("wrong", [X[:, :5], X[0, 0], X.float(), X.long(), X.to_sparse(), X[:, :, :0]])
def test_what_stock_refuses_is_refused_with_its_words(models, wrong):
    words = []
    for model in models:
        with pytest.raises(Exception) as caught:
            model(wrong)
        words.append((type(caught.value), str(caught.value)))
    assert words[0] == words[1]
    same_state(*models)
    same_step(*models, X)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_statistics_are_calibrated_without_gradients(models, context):
    stock, fused = models
    for _ in range(3):
        with context():
            torch.manual_seed(0)
            expected = stock(X)
            torch.manual_seed(0)
            close(fused(X), expected, 1e-12)
        same_state(stock, fused)
    same_step(stock, fused, X)
    trains(fused, X, BRANCHES)


class Twice(nn.Module):
    """One convolution and one norm at two places, and the projection computed first."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.bn, self.other = nn.BatchNorm2d(8, momentum=None), nn.BatchNorm2d(8, momentum=0.7)

    def forward(self, x):
        shortcut = self.other(self.conv2(x))
        out = F.relu(self.bn(self.conv1(x)))
        out = F.relu(self.bn(self.conv1(out)))
        out = F.relu(self.other(self.conv3(out)) + shortcut)
        return F.relu(self.bn(self.conv2(out)) + out)


def test_shared_convolutions_and_norms_move_statistics_in_stocks_order():
    for recompute in (False, True):
        stock, fused = pair(randomize(Twice()).double(), recompute=recompute)
        for _ in range(4):
            same_step(stock, fused, X)
        assert stock.bn.num_batches_tracked == 12 and not any(plan.broken for plan in plans(fused).values())


class Gate(nn.Module):
    """Another forward in training, with a second result."""

    def __init__(self):
        super().__init__()
        self.body, self.aux = Block(project=True), nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x):
        x = F.dropout(self.body(x), 0.3, self.training)
        return (x, self.aux(x)) if self.training else x


class Random(nn.Module):
    """Every kind of chance in a forward."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(), nn.Dropout2d(0.4), Block(project=True))
        self.depth, self.drop = StochasticDepth(0.5, "row"), nn.AlphaDropout(0.2)

    def forward(self, x):
        x = x + self.depth(self.blocks(x))
        return F.dropout(self.drop(x), 0.1, self.training)


@pytest.mark.parametrize("make", [Random, Gate, lambda: nn.Sequential(Block(), nn.ReLU(), Counted(), Gate()),
                                  lambda: nn.Sequential(nn.ReLU(), Counted(), nn.Dropout(0.5), Block(project=True),
                                                        nn.ReLU(), Counted())])
def test_random_numbers_are_stocks_from_the_first_call_on(make):
    stock, fused = pair(randomize(make()).double())
    for mode in (True, True, False, True):
        stock.train(mode), fused.train(mode)
        same_step(stock, fused, X.clone().requires_grad_())
        both(stock, fused, lambda m: m.zero_grad())
    assert [m.calls for m in stock.modules() if isinstance(m, Counted)] == [
        m.calls for m in fused.modules() if isinstance(m, Counted)]
    trains(fused, X)


def test_training_and_evaluation_take_turns(models):
    stock, fused = models
    train(stock, fused, X, steps=2)
    for _ in range(2):
        both(stock, fused, nn.Module.eval)
        with torch.no_grad():
            for _ in range(2):
                expected, result = stock(X), fused(X)
                same_strides(result, expected)
                close(result, expected, 1e-9)
        both(stock, fused, nn.Module.train)
        train(stock, fused, X, steps=2)
