"""An item is something done to a model. It is done to stock and to fused, and both have to show the same."""

import copy
import dataclasses
import warnings

import torch
import torch._decomp.decompositions_for_jvp  # warns when it is first needed
import torchvision.models.resnet as tv
from torch import nn
from torchvision.ops.misc import Conv2dNormActivation

import fused_resnet as fr
from tests.fusing.nets import Block, X
from tests.fusing.pairs import close
from tests.nets import randomize

LIMIT = 1e-4  # of values that rounding may move: fp32 through seven convolutions and two steps of SGD
LIMITS = {torch.bfloat16: 0.1, torch.float16: 2e-2}


class Small(nn.Module):
    """`Net` without its last block, of our test blocks, of torchvision's or of ours."""

    def __init__(self, conv, block, projected):
        super().__init__()
        self.stem, self.layer1, self.layer2 = conv(8, 8, 1), block(8), nn.Sequential(projected(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.layer2(self.layer1(self.stem(x)))
        return self.head(x.mean((2, 3)))


def _shortcut():
    return nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))


def _plain(c, k, r):
    return nn.Sequential(nn.Conv2d(c, k, r, bias=False), nn.BatchNorm2d(k), nn.ReLU())


def _net(**options):
    stock = randomize(Small(_plain, Block, lambda c: Block(c, project=True)))
    return stock, fr.fuse(stock, **options)


def _called():
    stock, fused = _net()
    with torch.no_grad():
        for model in (stock, fused):
            model.eval()(X), model(X)
            model.train()
    return stock, fused


def _blocks():
    stock = randomize(Small(Conv2dNormActivation, lambda c: tv.BasicBlock(c, c),
                            lambda c: tv.BasicBlock(c, c, 1, _shortcut())))
    mine = Small(fr.nn.ConvBNAct2d, lambda c: fr.nn.BasicBlock(c, c), lambda c: fr.nn.BasicBlock(c, c, 1, _shortcut()))
    mine.load_state_dict(stock.state_dict())
    return stock, mine


# How a model got its fused forward -> (stock, fused), both in training mode and with equal parameters
MADE = {"called": _called, "fused": _net, "recompute": lambda: _net(recompute=True), "blocks": _blocks}
# Besides ("called", False), which is the quickest to find that something went stale
EVERY = [("called", True), ("fused", False), ("recompute", True), ("recompute", False), ("blocks", True),
         ("blocks", False)]
_made = {}


def models(made):
    """(stock, fused) of `MADE[made]`, copies of what was made once."""
    if made not in _made:
        _made[made] = MADE[made]()
    return copy.deepcopy(_made[made])


@dataclasses.dataclass
class Seen:
    """What an item showed: its answer or its error, the warnings, and the model that it left."""

    answer: object = None
    error: tuple = ()
    warnings: list = dataclasses.field(default_factory=list)
    model: object = None


def observe(model, item):
    """Does `item` to `model`. An answer that is a model takes the model's place."""
    torch.manual_seed(3)
    seen = Seen(model=model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            seen.answer = item(model)
        except Exception as error:  # whatever it is, both have to raise it
            seen.error = type(error), str(error)
    seen.warnings = [(w.category, str(w.message)) for w in caught]
    if isinstance(seen.answer, nn.Module):
        seen.model, seen.answer = seen.answer, None
    return seen


def quietly(change):
    """A change whose own warning (deprecated, but used) is not the question."""
    def item(model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            change(model)
    return item


def same(a, b, what):
    """`a` (of the fused model) is what `b` (of stock) is: tensors close with stock's strides, the rest equal."""
    if isinstance(b, torch.Tensor):
        if b.is_mkldnn:
            a, b = a.to_dense(), b.to_dense()
        if b.is_meta or b.is_sparse:
            assert (type(a), a.shape, a.dtype, a.device) == (type(b), b.shape, b.dtype, b.device), what
            return
        assert type(a) is type(b) and a.stride() == b.stride(), f"{what}: {type(a)} {a.stride()} for {b.stride()}"
        assert (a.requires_grad, a.is_leaf, a.is_inference()) == (b.requires_grad, b.is_leaf, b.is_inference()), what
        close(a, b, LIMITS.get(b.dtype, LIMIT), what)
    elif isinstance(b, dict):
        assert list(a) == list(b), what
        for key in b:
            same(a[key], b[key], f"{what}[{key}]")
    elif isinstance(b, list | tuple):
        assert type(a) is type(b) and len(a) == len(b), f"{what}: {a} for {b}"
        for i, (one, other) in enumerate(zip(a, b)):
            same(one, other, f"{what}[{i}]")
    else:
        assert a == b, f"{what}: {a!r} for {b!r}"


def anatomy(model):
    """All of a model that is no tensor's value: names, modes, flags, hooks, in order."""
    return {"modules": [(name, m.training, [len(getattr(m, h)) for h in m.__dict__ if h.endswith("_hooks")])
                        for name, m in model.named_modules()],
            "parameters": [(name, p.requires_grad, p.dtype, p.stride()) for name, p in model.named_parameters()],
            "buffers": [(name, b.dtype) for name, b in model.named_buffers()],
            "keys": list(model.state_dict()), "metadata": dict(model.state_dict()._metadata)}


def step(model, x, seed=0):
    """One step of training: loss, gradients, and the model after SGD."""
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = None
    out = model(x)
    if not out.requires_grad:
        return out
    loss = out.square().mean()
    loss.backward()
    grads = [p.grad for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.add_(p.grad, alpha=-0.01)
    return loss.detach(), grads


def exercise(model, x=X):
    """Uses a model as it stands, trains it, and evaluates it."""
    like = next((p for p in model.parameters() if p.is_floating_point()), x)
    if like.is_meta:
        return [observe(model, lambda m: m(x.to("meta")))]
    x = x.to(like.dtype)
    seen = [observe(model, lambda m: m(x))]
    model.train()
    seen += [observe(model, lambda m, i=i: step(m, x + i, i)) for i in range(2)]
    model.eval()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            seen.append(observe(model, lambda m: m(x)))
    seen.append(observe(model, lambda m: step(m, x)))
    return seen


def compare(seen, wanted, what):
    assert seen.error == wanted.error, f"{what}: {seen.error} for {wanted.error}"
    assert seen.warnings == wanted.warnings, f"{what}: {seen.warnings} for {wanted.warnings}"
    same(seen.answer, wanted.answer, what)


def beside(item, made, mode, x=X):
    """Does `item` to both models of `MADE[made]`, in training mode or in eval mode, then uses what it leaves."""
    stock, fused = (m.train(mode) for m in models(made))
    wanted, seen = observe(stock, item), observe(fused, item)
    compare(seen, wanted, "item")
    for when in ("item", "use"):
        assert anatomy(seen.model) == anatomy(wanted.model), f"after the {when}"
        same(dict(seen.model.state_dict()), dict(wanted.model.state_dict()), f"state after the {when}")
        for name, plan in fr.fusing.plans(seen.model).items():
            dropped = [plan.broken, *(route for route in plan.routes.values() if "disagreed" in str(route))]
            assert not any(dropped), f"{name}: {dropped}"
        if when == "item":
            for i, (mine, theirs) in enumerate(zip(exercise(seen.model, x), exercise(wanted.model, x), strict=True)):
                compare(mine, theirs, f"use {i}")
