"""Stock beside fused while both train: steps, what they leave behind, and what autograd recorded."""

import collections

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import fused_resnet as fr
from fused_resnet.fusing import plans
from tests.fusing.helpers import same_strides
from tests.fusing.nets import Net
from tests.nets import randomize

BRANCH = "_BranchBackward"
BRANCHES = 4  # of `net`
X = torch.randn(3, 8, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def net():
    """`Net` in fp64: `BRANCHES` branches in training."""
    return randomize(Net()).double()


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


class Counted(nn.Module):
    """Not understood, because it keeps count."""

    def __init__(self):
        super().__init__()
        self.conv, self.calls = nn.Conv2d(8, 8, 1), 0

    def forward(self, x):
        self.calls += 1
        return self.conv(x)


def pair(stock, recompute=False, **options):
    """(stock, fused) in training mode with equal parameters; branches also where stock's modules are as fast."""
    stock = stock.train()
    return stock, fr.fuse(stock, recompute=recompute, **options)


def tensors(out):
    return [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]


def nodes(out):
    """How many nodes of each name the graph behind `out` has."""
    todo, seen = [t.grad_fn for t in tensors(out) if t.grad_fn is not None], set()
    found = collections.Counter()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        found[node.name()] += 1
        todo += [before for before, _ in node.next_functions if before is not None]
    return found


def loss_of(out):
    """Weighs all elements of all floating results, another way at each."""
    total = 0.0
    for t in tensors(out):
        if t.is_floating_point() and t.requires_grad:
            weight = torch.linspace(-1, 2, t.numel(), dtype=torch.float64).cos().to(t.dtype).view(t.shape)
            total = total + (t * weight).sum() + t.square().mean()
    return total


def close(a, b, tolerance, what=""):
    assert (a is None) == (b is None), what
    if b is None:
        return
    assert a.dtype == b.dtype and a.shape == b.shape, what
    if not b.is_floating_point():
        assert torch.equal(a, b), what
        return
    assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf()), what
    a, b = (t.detach().nan_to_num(posinf=0, neginf=0).double() for t in (a, b))
    worst, scale = float((a - b).abs().max()) if a.numel() else 0.0, float(b.abs().max()) if b.numel() else 0.0
    assert worst <= tolerance * max(scale, 1.0), f"{what}: {worst} beside {scale}"


def agreed(fused):
    """No plan and no route was dropped, at its first call, because it disagreed with stock."""
    for name, plan in plans(fused).items():
        dropped = [plan.broken, *(route for route in plan.routes.values() if "disagreed" in str(route))]
        assert not any(dropped), f"{name}: {dropped}"


def same_state(stock, fused, tolerance=1e-10):
    """Parameters, their gradients and buffers are equal, and `fused` did not have to be put right."""
    agreed(fused)
    for (name, p), (other, q) in zip(stock.named_parameters(), fused.named_parameters(), strict=True):
        assert name == other
        close(q, p, tolerance, name)
        close(q.grad, p.grad, tolerance, f"gradient of {name}")
    for (name, p), (_, q) in zip(stock.named_buffers(), fused.named_buffers(), strict=True):
        close(q, p, tolerance, name)


def same_step(stock, fused, x, tolerance=1e-10, **options):
    """One forward and backward of both on copies of x; outputs, strides, gradients and buffers are equal."""
    x, y = x.detach().clone().requires_grad_(x.requires_grad), x.detach().clone().requires_grad_(x.requires_grad)
    chance = torch.get_rng_state()
    expected = stock(x)
    after = torch.get_rng_state()
    torch.set_rng_state(chance)
    result = fused(y)
    assert torch.equal(torch.get_rng_state(), after), "other random numbers were drawn"
    same_strides(result, expected)
    for a, b in zip(tensors(result), tensors(expected), strict=True):
        close(a, b, tolerance, "output")
    loss_of(expected).backward(**options)
    loss_of(result).backward(**options)
    close(y.grad, x.grad, tolerance, "gradient of the input")
    same_state(stock, fused, tolerance)
    return result, expected


def trains(fused, x, branches=None, **call):
    """Asserts that a call of `fused` records branches, as many as wanted. Leaves buffers as they were."""
    agreed(fused)
    before = [b.clone() for b in fused.buffers()]
    found = nodes(fused(x, **call))[BRANCH]
    with torch.no_grad():
        for b, then in zip(fused.buffers(), before, strict=True):
            b.copy_(then)
    assert found == branches if branches is not None else found, f"{found} branches: {fallbacks(fused)}"
    return found


def fallbacks(fused):
    return {name: dict(plan.fallbacks) for name, plan in plans(fused).items() if plan.fallbacks}


def both(stock, fused, change):
    """Applies one change to both, with the same random numbers; what it returns, for both."""
    torch.manual_seed(5)
    first = change(stock)
    torch.manual_seed(5)
    return first, change(fused)


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, **options)


def train(stock, fused, x, steps=8, tolerance=1e-10):
    """Both take the same steps of SGD with momentum on fresh images; equal at each."""
    optimizers = sgd(stock), sgd(fused)
    for i in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=bool(i % 2))
        torch.manual_seed(i)
        same_step(stock, fused, torch.randn_like(x), tolerance)
        for optimizer in optimizers:
            optimizer.step()
    stock.eval(), fused.eval()
    with torch.no_grad():
        for a, b in zip(tensors(fused(x)), tensors(stock(x)), strict=True):
            close(a, b, 1e-8 if x.dtype is torch.float64 else 1e-3, "evaluation after training")
    stock.train(), fused.train()
