"""Small networks whose convolutions the native library runs, and what tells a replayed call from one step by step."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet as fr
from fused_resnet import backends, native, tape
from fused_resnet.fusing import plans, replay
from fused_resnet.kernels.cpu import conv_bn_act, packed
from tests import seeds
from tests.nets import randomize

CALLS = 5  # stock's check, a measurement of slices, a recording; the last ones play
needs_library = pytest.mark.skipif(native.missing("cpu") is not None, reason=str(native.missing("cpu")))


class Net(nn.Module):
    """A stem, two blocks and a head."""

    def __init__(self, first, second, width, pool=None):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.pool = pool or nn.Identity()
        self.layer1, self.layer2 = first, second
        self.fc = nn.Linear(width, 7)

    def forward(self, x):
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


class Two(nn.Module):
    """Two inputs, which both are residuals; one convolution twice."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(16), nn.BatchNorm2d(16)

    def forward(self, x, y):
        out = F.relu(self.bn1(self.conv1(x)) + y)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn2(self.conv2(out)) + x))) + y)


class Whimsical(nn.Module):
    """Nobody can say beforehand in which memory format it answers."""

    def forward(self, x):
        return x.contiguous(memory_format=torch.contiguous_format if x[0, 0, 0, 0] > 0 else torch.channels_last)


class Opaque(nn.Module):
    """Convolutions behind steps whose results lie anywhere and may be NaN; the end reads what was before them."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(4))
        self.whim = Whimsical()

    def forward(self, x):
        x = before = torch.log(5 - self.whim(F.relu(self.convs[0](x))))
        for conv in self.convs[1:]:
            x = F.relu(conv(x))
        return torch.cat((x, before), 1).permute(0, 2, 3, 1).flatten(1)


NETS = {
    "basic": lambda: Net(seeds.ShortcutBlock(16, 16), seeds.ShortcutBlock(16, 32, 2), 32),
    "bottleneck": lambda: Net(seeds.Bottleneck(16, 16), seeds.Bottleneck(64, 16), 64),
    "pool": lambda: Net(seeds.ShortcutBlock(16, 16), seeds.ShortcutBlock(16, 32, 2), 32, nn.MaxPool2d(3, 2, 1)),
    "other pool": lambda: Net(seeds.ShortcutBlock(16, 16), seeds.ShortcutBlock(16, 32, 2), 32, nn.MaxPool2d(2)),
}


NETS["opaque"] = Opaque


def image(batch=1, size=20, channels=3, dtype=torch.float32, seed=1):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stock_net(name="basic", dtype=torch.float32):
    """No gradients are asked for, so that calls need no `no_grad`."""
    return randomize(NETS[name]()).eval().requires_grad_(False).to(dtype)


def warm(model, *inputs):
    for _ in range(CALLS):
        out = model(*inputs)
    return out


def warmed(name="basic", dtype=torch.float32):
    """(stock, fused), the second called until it replays."""
    stock = stock_net(name, dtype)
    fused = fr.fuse(stock)
    warm(fused, image(channels=16 if name == "opaque" else 3, dtype=dtype))
    return stock, fused


def stretches(model):
    known = plans(model)[""].replays._known.values()
    return [item for _, items in known for item in items if type(item) is replay.Stretch]


@contextlib.contextmanager
def step_by_step():
    """Nothing is replayed or recorded inside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "kind_of", lambda steps, inputs: None)
        yield


def own_method(problem):
    """In the place of the chooser's rule: the native library's own kernels on every processor, but for images."""
    if problem.C == 3:
        return "onednn"
    return "winograd2" if packed.refuse(problem, "winograd2") is None else "direct"


@pytest.fixture(autouse=True)
def played(monkeypatch):
    """The lengths of the tapes that were played; convolutions run on the native library's kernels."""
    seen, play = [], tape.Tape.play

    def count(self, given, packs):
        seen.append(len(self))
        return play(self, given, packs)

    backends.reset()
    monkeypatch.setattr(tape.Tape, "play", count)
    monkeypatch.setattr(conv_bn_act, "_default", own_method)
    yield seen
    backends.reset()
