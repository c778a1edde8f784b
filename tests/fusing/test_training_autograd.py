"""What autograd offers, on a fused model in training: equal gradients, hooks fired, errors and memory freed."""

import collections
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from fused_resnet.fusing import plans
from tests.fusing.nets import Block
from tests.fusing.pairs import (
    BRANCH,
    BRANCHES,
    Counted,
    X,
    both,
    close,
    loss_of,
    net,
    nodes,
    norms,
    pair,
    same_state,
    same_step,
    sgd,
    trains,
)


def test_saliency_in_eval_mode(models):
    stock, fused = both(*models, nn.Module.eval)
    fused.requires_grad_(False), stock.requires_grad_(False)
    for _ in range(2):
        x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
        a, = torch.autograd.grad(stock(x).max(1).values.sum(), x)
        b, = torch.autograd.grad(fused(y).max(1).values.sum(), y)
        close(b, a, 1e-12)
    trains(fused, X.clone().requires_grad_(), BRANCHES)


def test_accumulated_and_retained_gradients(models):
    stock, fused = models
    for _ in range(3):
        same_step(stock, fused, X, retain_graph=True)
    result, expected = same_step(stock, fused, X, retain_graph=True)
    loss_of(result).backward()
    loss_of(expected).backward()
    same_state(stock, fused)
    for out in (expected, result):
        with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
            loss_of(out).backward()


def test_two_calls_before_one_backward(models):
    def losses(model):
        a, b = model(X), model(X.flip(0) + 1)
        ((a - b).square().mean() + loss_of(a)).backward()

    for _ in range(2):
        both(*models, losses)
        same_state(*models)


def test_a_discriminator_and_its_generator(models):
    def losses(model):
        fake = model.layer1(model.stem(X))
        real = model(X)
        model.requires_grad_(False)
        (model(fake).mean() - real.mean()).backward()
        model.requires_grad_(True)
        model(fake.detach()).mean().backward()

    for _ in range(2):
        both(*models, losses)
        same_state(*models)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("part", ["all", "layer2", "block", "function"])
def test_checkpoints(models, reentrant, part):
    def run(model):
        x = X.clone().requires_grad_()
        if part == "all":
            out = checkpoint(model, x, use_reentrant=reentrant)
        else:
            out = model.layer1(model.stem(x))
            if part == "layer2":
                out = checkpoint(model.layer2, out, use_reentrant=reentrant)
            elif part == "block":
                out = checkpoint_sequential(model.layer2, 2, out, use_reentrant=reentrant)
            else:
                out = checkpoint(lambda t: model.layer2[1](F.relu(model.layer2[0](t))), out, use_reentrant=reentrant)
        loss_of(out).backward()
        return x.grad

    for _ in range(3):
        a, b = both(*models, run)
        close(b, a, 1e-10)
        same_state(*models)
    again = part != "block"  # checkpoint_sequential runs the last part, which is looked at here, only once
    assert norms(models[1])[-1].num_batches_tracked == 3 + 3 * again, "stock moves statistics twice, too"


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_around_what_is_not_understood(reentrant):
    stock, fused = pair(nn.Sequential(Block(), nn.ReLU(), Counted(), Block(project=True)).double())
    assert plans(fused)[""].routes[True].opaque == [fused[2]]

    def run(model):
        loss_of(checkpoint(model, X.clone().requires_grad_(), use_reentrant=reentrant)).backward()

    for _ in range(3):
        both(stock, fused, run)
        same_state(stock, fused)
    assert stock[2].calls == fused[2].calls
    for _ in range(2):
        same_step(stock, fused, X)
    trains(fused, X, 2)


def test_penalties_on_gradients(models):
    def penalty(model):
        x = X.clone().requires_grad_()
        out = model(x)
        first = torch.autograd.grad(out.square().sum(), [x, *model.parameters()], create_graph=True)
        (out.sum() + sum(g.square().sum() for g in first)).backward()
        return x.grad

    for _ in range(2):
        a, b = both(*models, penalty)
        close(b, a, 1e-8)
        same_state(*models, 1e-8)


def test_batched_gradients_and_hessians(models):
    def jacobian(model):
        model.eval()
        x = X.clone().requires_grad_()
        out = model(x)
        basis = torch.eye(out.numel(), dtype=out.dtype).view(-1, *out.shape)
        wanted = [x, model.head.bias, *model.layer2.parameters(), *model.stem.parameters()]
        rows = torch.autograd.grad(out, wanted, basis, is_grads_batched=True, retain_graph=True)
        twice = torch.autograd.functional.hvp(lambda t: model(t).square().sum(), X, torch.ones_like(X))
        return (*rows, *twice)

    a, b = both(*models, jacobian)
    for mine, theirs in zip(b, a, strict=True):
        close(mine, theirs, 1e-9)


def test_hooks_on_parameters_and_tensors_fire_as_often_and_may_change_gradients(models):
    def run(model):
        fired = collections.Counter()
        handles = []
        for name, p in model.named_parameters():
            handles.append(p.register_hook(lambda g, name=name: (fired.update([name]), g * 2)[1]))
            handles.append(p.register_post_accumulate_grad_hook(lambda p, name=name: fired.update([f"{name} done"])))
        x = X.clone().requires_grad_()
        x.register_hook(lambda g: g.clamp(-1, 1))
        out = model(x)
        out.register_hook(lambda g: (fired.update(["out"]), g * 3)[1])
        loss_of(out).backward()
        for handle in handles:
            handle.remove()
        return fired, x.grad

    for _ in range(2):
        (fired, a), (mine, b) = both(*models, run)
        assert fired == mine and set(fired.values()) == {1}
        close(b, a, 1e-10)
        same_state(*models)
    trains(models[1], X, BRANCHES)


def test_optimizers_that_step_inside_of_backward(models):
    def run(model):
        optimizers = {p: torch.optim.SGD([p], lr=1e-3, momentum=0.9) for p in model.parameters()}

        def step(p):
            optimizers[p].step()
            p.grad = None

        handles = [p.register_post_accumulate_grad_hook(step) for p in model.parameters()]
        for _ in range(4):
            loss_of(model(X)).backward()
        for handle in handles:
            handle.remove()

    both(*models, run)
    same_state(*models)


@pytest.mark.parametrize("place", ["", "layer1", "layer2.0.conv1", "layer2.1.bn2", "head"])
def test_backward_hooks_fire_as_in_stock(place):
    stock = net()
    for m in stock.modules():
        m.__dict__.update({"inplace": False} if isinstance(m, nn.ReLU) else {})  # as stock asks for
    stock, fused = pair(stock)
    same_step(stock, fused, X)

    def run(model):
        seen = []
        handle = model.get_submodule(place).register_full_backward_hook(
            lambda m, given, got: seen.append([t.clone() for t in (*given, *got) if t is not None]))
        loss_of(model(X.clone().requires_grad_())).backward()
        count = nodes(model(X))[BRANCH]
        handle.remove()
        return seen, count

    (a, _), (b, count) = both(stock, fused, run)
    assert len(a) == len(b) == 1
    for mine, theirs in zip(b[0], a[0], strict=True):
        close(mine, theirs, 1e-10)
    same_state(stock, fused)
    # With a hook inside of it the root runs stock, and its parts are fused: in layer2.0 the shortcut alone.
    assert count == (3 if place == "layer2.1.bn2" else 4)
    trains(fused, X, BRANCHES)


def test_global_backward_hooks_see_every_module():
    def run(model):
        seen = collections.Counter()
        handle = nn.modules.module.register_module_full_backward_hook(lambda m, *_: seen.update([type(m).__name__]))
        try:
            loss_of(model(X.clone().requires_grad_())).backward()
        finally:
            handle.remove()
        return seen

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

        def forward(self, x):
            return F.relu(self.bn(self.conv(x)))

    stock, fused = pair(Plain().double())
    same_step(stock, fused, X)
    a, b = both(stock, fused, run)
    assert a == b and a["Conv2d"] == 1


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected")
def test_anomaly_mode_and_saved_tensor_hooks(models):
    stock, fused = models
    with torch.autograd.detect_anomaly(check_nan=True):
        same_step(stock, fused, X)
    with torch.autograd.graph.save_on_cpu():
        for _ in range(2):
            same_step(stock, fused, X)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (packed.append(0), t.clone())[1], lambda t: t):
        trains(fused, X, BRANCHES)
    assert packed
    with torch.autograd.detect_anomaly(check_nan=True), pytest.raises(RuntimeError, match="returned nan values"):
        fused(X * float("nan")).sum().backward()


def alive():
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


@pytest.mark.filterwarnings("ignore")
def test_nothing_stays_behind(models):
    _, fused = models
    optimizer = sgd(fused)

    def step():
        optimizer.zero_grad()
        out = fused(X)
        loss_of(out).backward()
        optimizer.step()
        return weakref.ref(out)

    step()
    before = alive()
    for _ in range(5):
        assert step()() is None, "freed without the garbage collector"
    assert alive() <= before


def test_backward_frees_what_forward_kept():
    _, fused = pair(net())
    kept = []

    def pack(t):
        mine = t.detach()  # lives as long as the graph keeps it
        kept.append(weakref.ref(mine))
        return mine

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = fused(X)
    total = loss_of(out)
    assert kept and all(ref() is not None for ref in kept)
    total.backward()
    assert all(ref() is None for ref in kept)
    assert out.grad_fn is not None


def test_a_model_is_freed_with_its_plans():
    _, fused = pair(net())
    for _ in range(2):
        loss_of(fused(X)).backward()
    refs = [weakref.ref(m) for m in fused.modules()]
    del fused
    gc.collect()
    assert all(ref() is None for ref in refs)
