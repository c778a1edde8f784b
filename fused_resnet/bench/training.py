"""Training steps under measurement: forward, cross-entropy, backward, SGD with momentum; pictures, random labels.

Parameters stay fp32; a 16-bit row computes under autocast. Before a provider is timed, the loss and every gradient of
its first step are compared with an fp64 run of the stock model, beside what stock in the row's own precision gives.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fused_resnet import backends, numerics, timing
from fused_resnet.bench import pictures
from fused_resnet.bench.providers import Provider
from fused_resnet.bench.session import Job, logits, precision
from fused_resnet.bench.steps import saved_bytes

RATE, MOMENTUM = 1e-3, 0.9
CLASSES_FROM = 2  # pictures that tell how many classes a model has

Batch = tuple[torch.Tensor, torch.Tensor]  # pictures [N, 3, H, W] and labels [N]


class Step:
    """A model with its optimizer: calling it is one training step.

    Args:
        model: in train mode; what torch.compile or fuse made counts, too.
        cast: dtype of autocast, None without.
        forced: the backend that fused blocks have to use, None for the chooser's.
    """

    def __init__(self, model: nn.Module, cast: torch.dtype | None = None, forced: str | None = None) -> None:
        self.model, self.cast, self.forced = model, cast, forced
        self.optimizer = torch.optim.SGD(model.parameters(), RATE, MOMENTUM, foreach=True)

    def loss(self, batch: Batch) -> torch.Tensor:
        """The loss with its graph, a scalar."""
        images, labels = batch
        with torch.autocast(images.device.type, self.cast, enabled=self.cast is not None), backends.use(self.forced):
            return F.cross_entropy(logits(self.model(images)), labels)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """The loss of a step that is done."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def gradients(self, batch: Batch) -> list[torch.Tensor]:
        """The loss and the gradient of every parameter, without a step."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(batch)
        loss.backward()
        found = [loss.detach(), *(p.grad for p in self.model.parameters() if p.grad is not None)]
        self.optimizer.zero_grad(set_to_none=True)
        return found


class Training:
    """What a training job runs: see `session.Inference`, which has the same methods."""

    graphs = False

    def __init__(self, job: Job, model: nn.Module, images: torch.Tensor) -> None:
        self.job = job
        self.cast = numerics.DTYPES[job.dtype] if job.autocast else None
        with torch.no_grad():
            classes = logits(model(images[:CLASSES_FROM])).shape[-1]
        self.model = copy.deepcopy(model).to(job.device).train()
        count = timing.pool_size(job.batch * images[0].numel() * 4, job.device)
        draw = torch.Generator().manual_seed(0)
        self.pool = [(batch.to(job.device), torch.randint(classes, (len(batch),), generator=draw).to(job.device))
                     for batch in pictures.batches(images, job.batch, count)]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The setting that everything of this job runs in."""
        with torch.enable_grad(), precision(self.job.dtype):
            yield

    def reference(self) -> int:
        """Runs the stock model in fp64 and in the row's precision; returns the FLOPs of a step."""
        exact = self._exact()
        with FlopCounterMode(display=False) as counter:
            stock = Step(copy.deepcopy(self.model), self.cast).gradients(self.pool[0])
        self.yard = list(zip(stock, exact, strict=True))
        return counter.get_total_flops()

    def _exact(self) -> list[torch.Tensor]:
        """In fp32 where fp64 does not fit into memory: 16-bit rows are judged by that as well."""
        images, labels = self.pool[0]
        try:
            # Searching for algorithms would take longer than the one step that they are for.
            with torch.backends.cudnn.flags(enabled=True, benchmark=False):
                return Step(copy.deepcopy(self.model).double()).gradients((images.double(), labels))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return Step(copy.deepcopy(self.model)).gradients((images, labels))

    def build(self, provider: Provider) -> tuple[Step, list[Any]]:
        """The provider's step, and the batches in the form that it wants."""
        model = provider.build(copy.deepcopy(self.model), self.pool[0][0])
        inputs = [(provider.prepare(x), labels) for x, labels in self.pool]
        return Step(cast(nn.Module, model), self.cast, provider.forced), inputs

    def judge(self, step: Step, batch: Batch) -> numerics.Bound:
        """Compares the loss and the gradients of the first batch with the reference."""
        return numerics.check_gradients(step.gradients(batch), *zip(*self.yard, strict=True), dtype=self.job.dtype)

    def saved(self, provider: Provider, step: Step, batch: Batch) -> float | None:
        """Megabytes that autograd keeps for backward; None where compiled code keeps them by itself."""
        return saved_bytes(lambda: step.loss(batch), step.model) / 2**20 if provider.counted else None
