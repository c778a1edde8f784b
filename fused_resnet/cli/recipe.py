"""What decides a training run: model, optimiser, schedule, augmentation. Two runs of one recipe take the same steps.

All randomness comes from the seed and the number of the step, never from a generator that runs along: a run that is
resumed in the middle of an epoch, or spread over more processes, sees the images that one process would have seen.
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fused_resnet import models as builders
from fused_resnet.bench.stock import in_memory_format, plain
from fused_resnet.cli import console, models
from fused_resnet.cli.datasets import Data

BATCH = 128  # images that the learning rate is given for; it grows in proportion with the joint batch
WARMUP = {"one-cycle": 0.25, "cosine": 0.05}  # share of the steps over which the rate rises
LEAST = 0.02  # of the peak: no step of a one-cycle schedule is wasted on a rate of 0
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Recipe:
    """The options of `fused-resnet train` that decide the result."""

    data: str | None = None
    size: int | None = None
    limit: int | None = None
    model: str | None = None  # None: cifar_resnet of this depth
    depth: int = 20
    start: str | None = None  # weights to start from
    freeze: str = ""
    epochs: int | None = None
    batch: int = 64  # of one process
    accumulate: int = 1
    rate: float = 0.1
    momentum: float = 0.9
    decay: float = 5e-4
    schedule: str = "one-cycle"
    warmup: float | None = None
    smoothing: float = 0.0
    clip: float | None = None
    shift: int | None = None
    flip: bool | None = None
    erase: float = 0.0
    mixup: float = 0.0
    amp: str | None = None
    channels_last: bool = True
    recompute: bool = False
    sync_bn: bool = False
    seed: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        if self.schedule not in WARMUP:
            raise ValueError(f"--schedule takes {' or '.join(WARMUP)}, got {self.schedule!r}")
        if self.amp is not None and self.amp not in AMP:
            raise ValueError(f"--amp takes {' or '.join(AMP)}, got {self.amp!r}")
        if self.rate <= 0:
            raise ValueError(f"--rate takes a positive number, got {self.rate}")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"--clip takes a positive number, got {self.clip}")

    @classmethod
    def options(cls) -> list[str]:
        """The fields that the user sets; the number of processes is torchrun's."""
        return [f.name for f in fields(cls) if f.name != "processes"]

    @property
    def name(self) -> str:
        return self.model or f"cifar_resnet{self.depth}"

    @property
    def joint(self) -> int:
        """Images of one optimiser step, over all processes."""
        return self.batch * self.accumulate * self.processes

    def learning_rate(self, place: float) -> float:
        """The rate at `place` of the run, 0 .. 1: linear warm-up, then down to 0 as a line or a cosine."""
        warmup = WARMUP[self.schedule] if self.warmup is None else self.warmup
        if place < warmup:
            share = place / warmup
        else:
            share = (1 - place) / max(1 - warmup, 1e-9)
            share = 0.5 - 0.5 * math.cos(math.pi * share) if self.schedule == "cosine" else share
        return self.rate * self.joint / BATCH * max(LEAST, share)

    def differences(self, other: dict[str, Any]) -> list[str]:
        """The options whose values are others than those of a stored recipe, as "option was A, is B"."""
        mine = asdict(self)
        return [f"--{'from' if f.name == 'start' else f.name.replace('_', '-')} was {other.get(f.name)}, is "
                f"{mine[f.name]}" for f in fields(self) if mine[f.name] != other.get(f.name)]


def mixed(*numbers: int) -> int:
    """One seed out of several numbers; neighbours give unrelated streams."""
    return random.Random(":".join(map(str, numbers))).getrandbits(63)


def build(recipe: Recipe, data: Data) -> nn.Module:
    """The stock model with a classifier for the data's classes, weights loaded and stages frozen.

    Raises:
        ValueError: an unknown model, no classifier in it, weights that do not fit, names that cannot be frozen.
    """
    if recipe.model is None:
        torch.manual_seed(recipe.seed)
        net: nn.Module = plain(builders.cifar_resnet(recipe.depth, num_classes=len(data.classes),
                                                     in_channels=data.channels))
        head = "fc"
    else:
        _, net = models.resolve(recipe.model, recipe.seed)
        head = replace_classifier(net, len(data.classes))
    if recipe.start is not None:
        models.load_weights(net, Path(recipe.start), besides=head)
    freeze(net, recipe.freeze)
    return in_memory_format(net, torch.channels_last) if recipe.channels_last else net


def replace_classifier(net: nn.Module, classes: int) -> str:
    """Gives the last linear layer of `net` as many outputs as there are classes, in place.

    Returns:
        Its name.

    Raises:
        ValueError: there is none.
    """
    linear = [(name, module) for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError("the model has no linear layer that could be replaced by a classifier for the data")
    name, old = linear[-1]
    if old.out_features != classes:
        parent, _, last = name.rpartition(".")
        setattr(net.get_submodule(parent), last, nn.Linear(old.in_features, classes, old.bias is not None))
    return name


def freeze(net: nn.Module, names: str) -> list[nn.Module]:
    """Takes modules out of training, in place: their parameters, and for batch norms their statistics, too.

    Args:
        names: comma-separated: children of the model such as conv1,bn1,layer1, or "norms" for all of them.

    Returns:
        The norms that have to stay in eval mode.

    Raises:
        ValueError: there is no such module, or nothing is left to train.
    """
    children = dict(net.named_children())
    still: list[nn.Module] = []
    for name in console.split(names):
        if name != "norms" and name not in children:
            raise ValueError(f"--freeze: the model has no {name!r}; it has norms, {', '.join(children)}")
        chosen = [m for m in net.modules() if isinstance(m, NORMS)] if name == "norms" else [children[name]]
        for module in chosen:
            module.requires_grad_(False)
            still += [m for m in module.modules() if isinstance(m, NORMS)]
    if not any(p.requires_grad for p in net.parameters()):
        raise ValueError(f"--freeze {names} leaves nothing to train")
    return still


def optimizer(net: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """SGD with Nesterov momentum; norms and biases are not decayed (He et al. 2019, arXiv:1812.01187, 3.1)."""
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() > 1], "weight_decay": recipe.decay},
              {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0}]
    return torch.optim.SGD([group for group in groups if group["params"]], lr=recipe.rate, momentum=recipe.momentum,
                           nesterov=recipe.momentum > 0)


class Augment:
    """Random crops, mirror images and erased boxes of the images of one step, the same however they are spread."""

    def __init__(self, recipe: Recipe, data: Data):
        self.shift = (2 if not data.mirrors else data.size // 8) if recipe.shift is None else recipe.shift
        self.flip = data.mirrors if recipe.flip is None else recipe.flip
        self.erase = recipe.erase

    def __call__(self, images: torch.Tensor, mine: slice, count: int, seed: int) -> torch.Tensor:
        """Changes images [n, C, H, W]; the result is in channels_last memory.

        Args:
            images: those with the places `mine` among the `count` images of the step.
            seed: of the step.
        """
        dice = torch.Generator().manual_seed(seed)
        h, w = images.shape[2:]
        down, right = torch.randint(-self.shift, self.shift + 1, (2, count, 1), generator=dice)[:, mine]
        mirrored = torch.rand(count, 1, generator=dice)[mine] < 0.5
        rows = (torch.arange(h) + down).clamp_(0, h - 1)  # beyond the border its pixels are repeated
        columns = (torch.arange(w) + right).clamp_(0, w - 1)
        if self.flip:
            columns = torch.where(mirrored, columns.flip(1), columns)
        place = torch.arange(len(images)).view(-1, 1, 1)
        index = (t.to(images.device) for t in (place, rows.unsqueeze(2), columns.unsqueeze(1)))
        n, r, c = index
        images = images[n, :, r, c].permute(0, 3, 1, 2)
        if self.erase:
            images = images.masked_fill(self._boxes(count, h, w, dice)[mine].to(images.device), 0.0)
        return images

    def _boxes(self, count: int, h: int, w: int, dice: torch.Generator) -> torch.Tensor:
        """[count, 1, H, W]: a box of up to half the edges for a share of the images (arXiv:1708.04896)."""
        draw = torch.rand(5, count, 1, generator=dice)
        inside = []
        for edge, at, length in ((h, draw[0], draw[1]), (w, draw[2], draw[3])):
            size = 1 + (length * edge / 2).floor()
            first, places = (at * (edge - size + 1)).floor(), torch.arange(edge)
            inside.append((places >= first) & (places < first + size))
        return (inside[0].unsqueeze(2) & inside[1].unsqueeze(1) & (draw[4] < self.erase).unsqueeze(2)).unsqueeze(1)


def mix_weight(recipe: Recipe, seed: int) -> float:
    """The share of an image that its partner leaves to it (mixup, Zhang et al. 2018, arXiv:1710.09412)."""
    return random.Random(seed).betavariate(recipe.mixup, recipe.mixup) if recipe.mixup > 0 else 1.0
