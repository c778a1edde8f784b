"""The training loop: steps of a recipe, evaluation, and a state from which it goes on as if it had never stopped."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fused_resnet.bench.curves import Curve
from fused_resnet.cli.datasets import Data, Pictures
from fused_resnet.cli.processes import Processes
from fused_resnet.cli.recipe import AMP, Augment, Recipe, freeze, mix_weight, mixed, optimizer

CHUNK = 256  # images of one evaluation batch
READ = 20  # steps between two looks at the losses: each one waits for the GPU
AGREE = 8  # steps between two agreements of several processes on whether to stop
PACED, MOST = 3, 12  # steps that decide how many epochs fit a budget, after one that warms up; most epochs
Batch = tuple[torch.Tensor, torch.Tensor]


class Stopped(Exception):
    """A signal asked for the end of training; what `save` was given is the whole state."""

    def __init__(self, signal: int):
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


class Trainer:
    """Trains `net` in place.

    Args:
        net: the model, on the processes' device.
        data: what it learns from.
        recipe: how.
        processes: this one and the others.

    Raises:
        ValueError: the training part is smaller than one step.
    """

    def __init__(self, net: nn.Module, data: Data, recipe: Recipe, processes: Processes):
        self.net, self.data, self.recipe, self.processes = net, data, recipe, processes
        self.device = torch.device(processes.device)
        self.steps = len(data.train_y) // recipe.joint
        if not self.steps:
            raise ValueError(f"a step takes {recipe.joint} images (--batch {recipe.batch} x --accumulate "
                             f"{recipe.accumulate} x {recipe.processes} processes), the training part has "
                             f"{len(data.train_y)}")
        self.still = freeze(net, recipe.freeze)
        self.augment = Augment(recipe, data)
        self.optimizer = optimizer(net, recipe)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.amp == "fp16")
        self.model = net
        if processes.count > 1:
            self.model = DistributedDataParallel(net, [self.device.index] if self.device.type == "cuda" else None)
        self.epochs = recipe.epochs or 0  # 0: not known yet
        self.done = 0
        self.seconds = 0.0
        self.curve = Curve()
        self._unread: list[torch.Tensor] = []
        self._ahead: tuple[int, Future[list[Batch]]] | None = None
        self._thread = ThreadPoolExecutor(1, "batches") if isinstance(data.train_x, Pictures) else None

    def batches(self, done: int) -> list[Batch]:
        """What this process sees in step number `done`: `accumulate` pairs of images and labels, augmented.

        The epoch's order is cut into steps, a step into rounds of accumulation, a round into processes.
        """
        recipe, who = self.recipe, self.processes
        epoch, place = divmod(done, self.steps)
        dice = torch.Generator().manual_seed(mixed(recipe.seed, 1, epoch))
        order = torch.randperm(len(self.data.train_y), generator=dice)[place * recipe.joint:(place + 1) * recipe.joint]
        seed, found = mixed(recipe.seed, 2, done), []
        for turn in range(recipe.accumulate):
            start = (turn * who.count + who.rank) * recipe.batch
            mine = slice(start, start + recipe.batch)
            images = self.data.train_x[order[mine]].to(self.device, non_blocking=True)
            labels = self.data.train_y[order[mine]].to(self.device, non_blocking=True)
            images = self.augment(images, mine, recipe.joint, seed)
            found.append((images if recipe.channels_last else images.contiguous(), labels))
        return found

    def _fetch(self) -> list[Batch]:
        """The batches of this step; pictures are decoded while the step before computes."""
        if self._thread is None:
            return self.batches(self.done)
        number, future = self._ahead or (-1, None)
        found = future.result() if future is not None and number == self.done else self.batches(self.done)
        if self.done + 1 < self.epochs * self.steps:
            self._ahead = self.done + 1, self._thread.submit(self.batches, self.done + 1)
        return found

    def loss(self, net: nn.Module, images: torch.Tensor, labels: torch.Tensor, mix: float = 1.0) -> torch.Tensor:
        """Cross-entropy in the recipe's precision; with `mix` below 1 of images mixed with their neighbours."""
        if mix < 1:
            images = images.lerp(images.roll(1, 0), 1 - mix)
        with torch.autocast(self.device.type, AMP.get(self.recipe.amp or ""), self.recipe.amp is not None):
            scores = net(images)
            if not isinstance(scores, torch.Tensor) or scores.shape != (len(images), len(self.data.classes)):
                raise ValueError(f"the model answers {getattr(scores, 'shape', type(scores).__name__)} to "
                                 f"{len(images)} images, not a tensor of {len(images)} x {len(self.data.classes)}")
            value = F.cross_entropy(scores, labels, label_smoothing=self.recipe.smoothing)
            if mix < 1:
                other = F.cross_entropy(scores, labels.roll(1, 0), label_smoothing=self.recipe.smoothing)
                value = mix * value + (1 - mix) * other
        return value

    def step(self) -> None:
        """One optimiser step."""
        recipe = self.recipe
        seed = mixed(recipe.seed, 3, self.done)
        torch.manual_seed(mixed(seed, self.processes.rank))  # for dropout and its like
        place = self.done / (self.epochs * self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate(place)
        self.optimizer.zero_grad(set_to_none=True)
        batches, total = self._fetch(), torch.zeros((), device=self.device)
        for turn, (images, labels) in enumerate(batches):
            last = turn == len(batches) - 1
            with contextlib.nullcontext() if last or self.model is self.net else self.model.no_sync():  # type: ignore
                value = self.loss(self.model, images, labels, mix_weight(recipe, seed)) / recipe.accumulate
                self.scaler.scale(value).backward()
            total += value.detach()
        if recipe.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.net.parameters(), recipe.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._unread.append(total)
        self.done += 1

    def train_mode(self) -> None:
        """Train mode, but for the norms that are frozen."""
        self.model.train()
        for norm in self.still:
            norm.eval()

    def pace(self, budget: float) -> None:
        """Chooses the number of epochs that fit `budget` seconds, at most twelve, by a few steps that are undone."""
        before, weights = self.state(), copy.deepcopy(self.net.state_dict())
        self.epochs = 1
        self.train_mode()
        taken = []
        for _ in range(PACED + 1):
            start = time.perf_counter()
            self.step()
            float(self._unread[-1])
            taken.append(time.perf_counter() - start)
        self._unread.clear()
        self.restore(weights, before)
        share = budget / (min(taken) * self.steps)
        self.epochs = self.processes.largest(max(1, min(MOST, int(share))))

    def run(self, *, save: Callable[[], None] = lambda: None, signal: Callable[[], int] = lambda: 0,
            tell: Callable[[str, float], None] = lambda what, share: None) -> None:
        """Trains to the end, evaluating after every epoch.

        Args:
            save: called after every epoch and before `Stopped` is raised.
            signal: the number of the signal that asks for the end, or 0.
            tell: receives what is going on, and the share of steps that is done.

        Raises:
            Stopped: a signal came.
            ValueError: the loss is no longer finite.
        """
        start = time.perf_counter() - self.seconds
        self.train_mode()
        while self.done < self.epochs * self.steps:
            self.step()
            ends = self.done % self.steps == 0
            if ends or len(self._unread) >= READ:
                self.read()
            if ends:
                self.curve.accuracy.append(self.accuracy())
                self.train_mode()
            stop = 0
            if self.processes.count == 1 or ends or self.done % AGREE == 0:
                stop = self.processes.largest(signal())
            self.seconds = time.perf_counter() - start
            if ends or stop:
                self.read()
                save()
            if stop:
                raise Stopped(stop)
            shown = f", loss {self.curve.loss[-1]:.3f}" if self.curve.loss else ""
            tell(f"epoch {(self.done - 1) // self.steps + 1} of {self.epochs}{shown}",
                 self.done / (self.epochs * self.steps))
        self.net.eval()

    def read(self) -> None:
        """Moves the losses of the last steps to the curve, as means over all processes."""
        if not self._unread:
            return
        losses = self.processes.mean(torch.stack(self._unread).float()).tolist()
        self._unread.clear()
        self.curve.loss += losses
        if not all(map(math.isfinite, losses)):
            raise ValueError(f"the loss is no longer finite before step {self.done}: a smaller --rate or --clip may "
                             "help")

    def accuracy(self) -> float:
        """The share of held-out images that are classified rightly; only the leading process looks."""
        if not self.processes.leads:
            return 0.0
        return float((predict(self.net, self.data, self.device) == self.data.test_y).float().mean())

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs, of plain types and tensors. Random numbers follow from `done`."""
        return {"epochs": self.epochs, "done": self.done, "seconds": self.seconds, "curve": asdict(self.curve),
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def restore(self, state_dict: dict[str, Any], state: dict[str, Any]) -> None:
        """Goes back to where `state()` and the model's `state_dict()` were taken."""
        self.net.load_state_dict(state_dict)
        self.epochs, self.done, self.seconds = state["epochs"], state["done"], state["seconds"]
        self.curve = Curve(**copy.deepcopy(state["curve"]))
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


@torch.no_grad()
def predict(net: nn.Module, data: Data, device: torch.device) -> torch.Tensor:
    """The class of every held-out image, [n] int64 on the CPU."""
    net.eval()
    found = []
    for chosen in torch.arange(len(data.test_y)).split(CHUNK):
        found.append(net(data.test_x[chosen].to(device)).argmax(1).cpu())
    return torch.cat(found)
