"""Random residual networks: whatever fuse() makes of one, it answers as stock does."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet as fr
from fused_resnet.fusing import plans
from tests.fusing.helpers import agree, counts, same_strides
from tests.fusing.pairs import BRANCH, close, loss_of, nodes, same_state, tensors
from tests.nets import randomize

C, SIZE = 8, 9
ACTIVATIONS = ["nn.ReLU()", "nn.ReLU(inplace=True)", "nn.ReLU6(inplace=True)", "nn.SiLU()", "nn.Hardswish()",
               "nn.GELU()", "nn.LeakyReLU(0.1, inplace=True)"]
FUNCTIONS = ["F.relu({0})", "F.relu({0}, inplace=True)", "F.relu({0}, True)", "F.relu_({0})", "torch.relu({0})",
             "{0}.relu()", "{0}.relu_()", "F.silu({0})", "torch.sigmoid({0})"]
JOINS = ["{0} + {1}", "torch.add({0}, {1})", "{0}.add({1})", "{0} * {1}", "{0}.add_({1})",
         "torch.add({0}, {1}, alpha=2)", "torch.cat([{0}, {1}], 1)[:, ::2]", "{0} - {1}"]
OTHERS = ["F.max_pool2d({0}, 3, 1, 1)", "F.avg_pool2d({0}, 3, 1, 1)", "{0}.clone()", "{0} * 0.5", "{0}[:, :, :]",
          "{0} * torch.sigmoid(F.adaptive_avg_pool2d({0}, 1))", "{0}.transpose(2, 3)", "{0}.contiguous()",
          "torch.flatten({0}, 2).view({0}.shape)", "{0}.chunk(2, 1)[0].repeat(1, 2, 1, 1)",
          "{0} - {0}.mean((2, 3), keepdim=True)"]
MODULES = ["nn.BatchNorm2d(C)", "nn.BatchNorm2d(C, affine=False)", "nn.Identity()", "nn.Dropout()",
           "nn.MaxPool2d(3, 1, 1)", "nn.GroupNorm(2, C)", "nn.Sequential()", "Branching()"]


class Branching(nn.Module):
    """Not traceable, and it changes what it is given."""

    def forward(self, x):
        return x.mul_(0.5) if x.dim() == 4 and float(x.abs().sum()) >= 0 else x


def convolution(rng):
    k = rng.choice([1, 3])
    extra = [f"padding={k // 2}", f"groups={rng.choice([1, 1, 2, C])}", f"bias={rng.choice([True, False])}"]
    if k == 3 and rng.random() < 0.2:
        extra[0] = "padding=2, dilation=2"
    return f"nn.Conv2d(C, C, {k}, {', '.join(extra)})"


class Writer:
    """Writes the source of a module, value by value; every value is [N, C, SIZE, SIZE]."""

    def __init__(self, rng):
        self.rng, self.made, self.lines, self.values = rng, [], [], ["x"]

    def module(self, source):
        if self.made and self.rng.random() < 0.12:  # shared: called at two places
            return self.rng.choice(self.made)
        name = f"m{len(self.made)}"
        self.made.append(name)
        self.sources = [*getattr(self, "sources", []), source]
        return name

    def assign(self, expression):
        self.values.append(f"v{len(self.values)}")
        self.lines.append(f"{self.values[-1]} = {expression}")

    def recent(self):
        return self.values[-1] if self.rng.random() < 0.75 else self.rng.choice(self.values)

    def call(self, source, value):
        self.assign(f"self.{self.module(source)}({value})")

    def step(self):
        rng = self.rng
        kind = rng.choices(["conv", "block", "act", "function", "join", "iadd", "other", "module"],
                           [4, 6, 3, 2, 4, 2, 1.5, 2.5])[0]
        if kind in ("conv", "block"):
            self.call(convolution(rng), self.recent())
        if kind == "block":
            if rng.random() < 0.8:
                self.call("nn.BatchNorm2d(C)", self.values[-1])
            if rng.random() < 0.6:
                self.assign(f"{self.values[-1]} + {rng.choice(self.values[:-1])}")
            if rng.random() < 0.7:
                self.call(rng.choice(ACTIVATIONS), self.values[-1])
        elif kind == "act":
            self.call(rng.choice(ACTIVATIONS), self.recent())
        elif kind == "function":
            self.assign(rng.choice(FUNCTIONS).format(self.recent()))
        elif kind == "join":
            self.assign(rng.choice(JOINS).format(self.recent(), rng.choice(self.values)))
        elif kind == "iadd":
            self.lines.append(f"{self.recent()} {rng.choice(['+=', '+=', '*='])} {rng.choice(self.values)}")
        elif kind == "other":
            self.assign(rng.choice(OTHERS).format(self.recent()))
        elif kind == "module":
            self.call(rng.choice(MODULES), self.recent())

    def source(self):
        for _ in range(self.rng.randint(2, 14)):
            self.step()
        result = self.rng.choice([self.values[-1]] * 4 + [f"({self.values[-1]}, {self.rng.choice(self.values)})",
                                                          f"[{self.rng.choice(self.values)}, {self.values[-1]}]",
                                                          f"{{'out': {self.values[-1]}}}"])
        made = [f"self.{name} = {source}" for name, source in zip(self.made, getattr(self, "sources", []))]
        return "\n".join(["class Net(nn.Module):", "    def __init__(self):", "        super().__init__()",
                          *(f"        {line}" for line in made), "", "    def forward(self, x):",
                          *(f"        {line}" for line in self.lines), f"        return {result}"])


def network(seed):
    source = Writer(random.Random(seed)).source()
    scope = {"nn": nn, "F": F, "torch": torch, "C": C, "Branching": Branching, "__name__": "generated"}
    exec(source, scope)
    torch.manual_seed(seed)
    net = scope["Net"]()
    if seed % 3 == 0:  # inside of a parent, as blocks are
        net = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU(inplace=True), net)
    if seed % 4 == 1:
        net, stem = stemmed(net, seed)
        source = f"{stem}\n{source}"
    return randomize(net, seed).eval(), source


def stemmed(net, seed):
    """The network behind a stem, or something that is nearly one; its input has the shape that the network takes."""
    rng = random.Random(seed)
    pool = rng.choice(["3, 2, 1", "3, 2, 1", "3, stride=2, padding=1", "3, 2, 1, ceil_mode=True", "2, 2", "3, 1, 1"])
    act = rng.choice(ACTIVATIONS)
    conv = rng.choice(["7, padding=3, bias=False", "3, padding=1", "1"])
    scope = {"nn": nn, "C": C}
    stem = f"nn.Conv2d(C, C, {conv}), nn.BatchNorm2d(C), {act}, nn.MaxPool2d({pool}), nn.Upsample({SIZE})"
    return nn.Sequential(*eval(f"[{stem}]", scope), net), stem


def refuses(net, x):
    try:
        net(x.clone())
    except RuntimeError:  # such as a sum into overlapping memory
        return True
    return False


def compare(seed):
    stock, source = network(seed)
    fused = fr.fuse(stock)
    for size in (SIZE, SIZE, 4):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, C, size, size).contiguous(memory_format=memory_format)
            try:
                if refuses(stock, x):
                    assert refuses(fused, x)
                else:
                    agree(stock, fused, x)
            except Exception as error:
                raise AssertionError(f"seed {seed}\n{source}\n{fr.report(fused)}") from error
    return counts(fused)[0], any(plan.broken for plan in plans(fused).values())


@torch.no_grad()
def sweep(seeds):
    results = [compare(seed) for seed in seeds]
    fused, broken = sum(n > 0 for n, _ in results), sum(b for _, b in results)
    assert fused >= len(results) // 4, "the generator makes too little that fuses to prove anything"
    assert broken <= len(results) // 20, f"{broken} plans were dropped at their first call"


@pytest.mark.filterwarnings("ignore:fused_resnet leaves")
def test_random_networks_agree():
    sweep(range(60))


@pytest.mark.gate
@pytest.mark.filterwarnings("ignore:fused_resnet leaves")
@pytest.mark.parametrize("batch", range(10))
def test_many_random_networks_agree(batch):
    sweep(range(1000 + 200 * batch, 1200 + 200 * batch))


def step(net, given):
    """(results, their graph's branches, gradient of the input) of a forward and backward, or the error's class."""
    torch.manual_seed(7)
    x = given.clone().requires_grad_()
    try:
        out = net(x * 1)  # no leaf, so that it may be written over
        loss = loss_of(out)
        if isinstance(loss, torch.Tensor):
            loss.backward()
    except RuntimeError as error:  # such as a value that was written over before its gradient was taken
        return type(error)
    return out, nodes(out)[BRANCH], x.grad


def compare_training(seed):
    """Steps of a random network in training mode beside stock's; how many branches ran, or None without a verdict."""
    stock, source = network(seed)
    stock, branches = stock.double().train(), 0
    fused = fr.fuse(stock, recompute=bool(seed % 2))
    for size in (SIZE, SIZE, 4):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(3, C, size, size, dtype=torch.float64).contiguous(memory_format=memory_format)
            theirs, mine = step(stock, x), step(fused, x)
            if isinstance(theirs, type):
                return None  # nothing to compare with; where bits stand for y, its memory may be written over
            try:
                assert not isinstance(mine, type), mine
                same_strides(mine[0], theirs[0])
                for a, b in zip(tensors(mine[0]), tensors(theirs[0]), strict=True):
                    close(a, b, 1e-9, "output")
                close(mine[2], theirs[2], 1e-8, "gradient of the input")
                same_state(stock, fused, 1e-8)
            except Exception as error:
                raise AssertionError(f"seed {seed}\n{source}\n{fr.report(fused)}") from error
            branches = max(branches, mine[1])
    return branches


def sweep_training(seeds):
    results = [compare_training(seed) for seed in seeds]
    judged = [n for n in results if n is not None]
    assert len(judged) >= len(results) // 2 and sum(n > 0 for n in judged) >= len(results) // 4, results


def test_random_networks_train():
    sweep_training(range(60))


@pytest.mark.gate
@pytest.mark.parametrize("batch", range(10))
def test_many_random_networks_train(batch):
    sweep_training(range(4000 + 100 * batch, 4100 + 100 * batch))
