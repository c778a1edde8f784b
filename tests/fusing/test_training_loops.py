"""What training loops do to models, done to a fused one and to stock: equal after every step."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm

import fused_resnet as fr
from fused_resnet.fusing import plans
from tests.fusing.helpers import pickled, saved
from tests.fusing.nets import Block, Net
from tests.fusing.pairs import (
    BRANCH,
    BRANCHES,
    X,
    both,
    close,
    fallbacks,
    loss_of,
    net,
    nodes,
    pair,
    same_state,
    same_step,
    sgd,
    trains,
)
from tests.nets import randomize


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, cache):
    stock, fused = pair(randomize(Net()))
    for _ in range(3):
        for model in (stock, fused):
            torch.manual_seed(0)
            with torch.autocast("cpu", dtype, cache_enabled=cache):
                out = model(X.float())
                other = model(X.float())
            assert out.dtype is dtype
            loss_of([out, other]).backward()
        same_state(stock, fused, 5e-2)
    with torch.autocast("cpu", dtype):
        trains(fused, X.float(), BRANCHES)


@pytest.mark.parametrize("bad", [None, float("inf"), float("nan")])
def test_a_scaler_skips_steps_with_gradients_that_are_not_finite(bad):
    stock, fused = pair(randomize(Net()))
    optimizers, scalers = (sgd(stock), sgd(fused)), [torch.amp.GradScaler("cpu", init_scale=16.0) for _ in range(2)]
    for step in range(4):
        for model, optimizer, scaler in zip((stock, fused), optimizers, scalers, strict=True):
            torch.manual_seed(step)
            optimizer.zero_grad()
            out = model(X.float())
            scaler.scale(loss_of(out * bad if bad is not None and step == 1 else out)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale() == (8.0 if bad is not None and step > 0 else 16.0)
        for (name, p), q in zip(stock.named_parameters(), fused.parameters(), strict=True):
            close(q, p, 1e-4, name)


@pytest.mark.parametrize("made", [
    lambda ps: torch.optim.SGD(ps, 1e-3, momentum=0.9, foreach=True),
    lambda ps: torch.optim.SGD(ps, 1e-3, momentum=0.9, fused=True),
    lambda ps: torch.optim.AdamW(ps, 1e-3, foreach=True), lambda ps: torch.optim.AdamW(ps, 1e-3, fused=True)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_optimizers(models, made, memory_format):
    stock, fused = (m.to(memory_format=memory_format) for m in models)
    optimizers = made(stock.parameters()), made(fused.parameters())
    for i in range(4):
        same_step(stock, fused, X + i, 1e-7)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=bool(i % 2))


@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("keep", [False, True])
def test_memory_formats(weights, keep):
    stock, fused = pair(net().to(memory_format=weights), memory_format=torch.channels_last if keep else None)
    wide = torch.randn(3, 16, 9, 18, dtype=torch.float64)
    for x in (X, X.contiguous(memory_format=torch.channels_last), X, wide[:, ::2, :, ::2], X[:1].expand(3, -1, -1, -1),
              X.transpose(2, 3), X[:, :, :2, :2], X[:, :, 3:, 1:], wide[:, :8].permute(0, 1, 3, 2)[:, :, 1:, :]):
        for part in (stock.layer2, fused.layer2), (stock, fused):
            same_step(*part, x.contiguous(memory_format=torch.channels_last) if keep else x)
    assert not any(plan.broken for plan in plans(fused).values()), fallbacks(fused)


def test_compiled(models):
    stock, fused = models
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for model in (stock, fused):
        model.layer1.drop.p = 0.0
        for block in model.layer2:
            block.drop.p = 0.0
    for _ in range(2):
        loss_of(stock(X)).backward()
        loss_of(compiled(X)).backward()
        same_state(stock, fused)
    same_step(stock, fused, X)


def test_functional_call_and_transforms(models):
    def call(model):
        given = {k: v.detach().clone() for k, v in model.state_dict().items()}
        weights = {k: given[k].requires_grad_() for k, _ in model.named_parameters()}
        out = torch.func.functional_call(model, given, X)
        grads = torch.autograd.grad(loss_of(out), list(weights.values()))
        return [out, *grads, *given.values()], nodes(out)[BRANCH]

    before = copy.deepcopy(models[0])
    for _ in range(2):
        (a, _), (b, branches) = both(*models, call)
        assert branches == BRANCHES
        for mine, theirs in zip(b, a, strict=True):
            close(mine, theirs, 1e-10)
    same_state(before, models[1])
    same_state(before, models[0])

    def transformed(model):
        model.eval()
        weights = {k: v.detach() for k, v in model.named_parameters()}

        def loss(weights, x):
            return torch.func.functional_call(model, weights, x[None]).square().sum()

        each = torch.vmap(torch.func.grad(loss), (None, 0))(weights, X)
        return torch.func.jvp(lambda x: model(x), (X,), (torch.ones_like(X),))[1], *each.values()

    a, b = both(*models, transformed)
    for mine, theirs in zip(b, a, strict=True):
        close(mine, theirs, 1e-9)


REWRITES = {
    "parametrized": lambda m: parametrizations.weight_norm(m.layer1.conv1),
    "orthogonal": lambda m: parametrizations.orthogonal(m.layer2[1].conv2),
    "weight_norm": lambda m: nn.utils.weight_norm(m.layer1.conv2),
    "spectral_norm": lambda m: spectral_norm(m.layer2[0].conv1),
    "pruned": lambda m: prune.l1_unstructured(m.layer2[0].downsample[0], "weight", 0.5),
    "norm_parametrized": lambda m: nn.utils.parametrize.register_parametrization(m.layer1.bn1, "weight", nn.Softplus()),
    "converted": lambda m: m.float().double(), "assigned": lambda m: m.load_state_dict(
        {k: v.clone() for k, v in m.state_dict().items()}, assign=True),
    "loaded": lambda m: m.load_state_dict({k: v.flip(0) if v.dim() else v for k, v in m.state_dict().items()}),
    "grown": lambda m: m.layer2.append(Block().double()),
    "replaced": lambda m: setattr(m.layer1, "relu", nn.LeakyReLU(0.1)),
    "tied": lambda m: setattr(m.layer1.conv2, "weight", m.layer1.conv1.weight),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REWRITES)
def test_modules_rewritten_between_steps(models, name):
    stock, fused = models
    same_step(stock, fused, X)
    both(stock, fused, lambda m: m.zero_grad())
    both(stock, fused, REWRITES[name])
    for i in range(3):
        torch.manual_seed(i)
        same_step(stock, fused, X)
    trains(fused, X)


def test_double_precision_midway():
    stock, fused = pair(randomize(Net()))
    same_step(stock, fused, X.float(), 1e-4)
    for model in (stock, fused):
        model.double().zero_grad()
    fused.load_state_dict(stock.state_dict())
    same_step(stock, fused, X)
    trains(fused, X, BRANCHES)


@pytest.mark.parametrize("clone", [copy.deepcopy, pickled, saved])
def test_copies_go_on_training(models, clone):
    stock, fused = models
    optimizers = [sgd(stock), sgd(fused)]
    for i in range(4):
        for model in (stock, fused):
            model.zero_grad()
        if i == 2:  # a checkpoint: model and momentum
            state = copy.deepcopy(optimizers[1].state_dict())
            fused = clone(fused)
            optimizers[1] = sgd(fused)
            optimizers[1].load_state_dict(state)
            same_state(stock, fused)
        torch.manual_seed(i)
        same_step(stock, fused, X)
        for optimizer in optimizers:
            optimizer.step()
    trains(fused, X, BRANCHES)
    assert all(plan.module is fused.get_submodule(name) for name, plan in plans(fused).items())


def test_averaged_models(models):
    averages = [torch.optim.swa_utils.AveragedModel(m, use_buffers=True) for m in models]
    optimizers = [sgd(m) for m in models]
    for i in range(3):
        both(*models, lambda m: m.zero_grad())
        torch.manual_seed(i)
        same_step(*models, X)
        for average, model, optimizer in zip(averages, models, optimizers, strict=True):
            optimizer.step()
            average.update_parameters(model)
    same_state(*averages)
    trains(averages[1], X, BRANCHES)
    batches = [X, X + 1]
    for average in averages:
        torch.manual_seed(0)
        torch.optim.swa_utils.update_bn(batches, average)
    same_state(*averages)
    for average in averages:
        average.eval()
    with torch.no_grad():
        close(averages[1](X), averages[0](X), 1e-9)


def test_a_fused_part_of_a_stock_model():
    stock = net().train()
    outer = copy.deepcopy(stock)
    outer.layer2 = fr.fuse(outer.layer2, recompute=False)
    for _ in range(2):
        same_step(stock, outer, X)
    trains(outer, X, 2)
    filtered = fr.fuse(stock, filter=lambda name, module: not name.startswith("layer2"), recompute=False)
    for model in (stock, filtered):
        model.zero_grad()
    for _ in range(2):
        same_step(stock, filtered, X)
    trains(filtered, X, 2)
    unfused = fr.unfuse(filtered)
    same_step(stock, unfused, X)
    assert not nodes(unfused(X))[BRANCH]


def test_threads_train_models_of_their_own():
    models = [pair(net(), recompute=bool(i % 2)) for i in range(4)]
    results = {}

    def work(i):
        results[i] = None
        for k in range(3):
            for model in models[i]:
                for m in model.modules():
                    if isinstance(m, nn.Dropout):  # one generator serves all threads
                        m.p = 0.0
                loss_of(model(X + k)).backward()
        results[i] = nodes(models[i][1](X))[BRANCH]
        models[i][0](X)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(results.values()) == {BRANCHES}
    for stock, fused in models:
        same_state(stock, fused)


@pytest.mark.parametrize("activation", ["ReLU6", "Identity"])
def test_results_that_stock_lets_be_written_over(activation):
    for inplace in (False, True):
        act = getattr(nn, activation)() if activation == "Identity" else getattr(nn, activation)(inplace=inplace)
        stock = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), act, nn.LeakyReLU(0.1, inplace=True))
        stock, fused = pair(stock.double())
        for _ in range(2):
            same_step(stock, fused, 9 * X)
        trains(fused, X, 1)


def test_results_that_must_not_be_written_over_are_an_error_as_in_stock():
    for model in pair(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).double()):
        out = model(X)
        out.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
