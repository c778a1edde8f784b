"""What a training step costs: time against another model's step, and the bytes that it keeps for backward."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fused_resnet import timing

Step = Callable[[nn.Module], torch.Tensor]  # forward up to the loss


@dataclass(frozen=True)
class Cost:
    """Of one training step. `saved_mb` counts what autograd keeps, without parameters; `peak_mb` is CUDA's."""

    ms: float
    saved_mb: float
    peak_mb: float | None


def saved_bytes(forward: Callable[[], object], besides: nn.Module | None = None) -> int:
    """Bytes that the graph of `forward()` keeps for backward; a storage that is kept twice counts once.

    Args:
        besides: its parameters and buffers are not counted: they are there anyway.
    """
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        held = forward()  # its graph holds the storages, so that none is given out twice
    own = [] if besides is None else [*besides.parameters(), *besides.buffers()]
    for t in own:
        kept.pop(t.untyped_storage().data_ptr(), None)
    del held
    return sum(kept.values())


def costs(nets: Mapping[str, nn.Module], loss: Step, device: str, budget: float) -> tuple[dict[str, Cost], float]:
    """Times forward, loss, backward and SGD of two models against each other, on copies.

    Args:
        nets: "stock" and "fused" in train mode.
        loss: of one batch that both are given.
        device: "cpu" or "cuda".
        budget: seconds.

    Returns:
        (name -> cost, how many times faster fused is: the median of paired ratios).
    """
    nets = {name: copy.deepcopy(net) for name, net in nets.items()}

    def step(net: nn.Module) -> Callable[[object], object]:
        sgd = torch.optim.SGD(net.parameters(), lr=1e-6, momentum=0.9)

        def once(_: object) -> None:
            sgd.zero_grad(set_to_none=True)
            loss(net).backward()
            sgd.step()

        return once

    calls = {name: step(net) for name, net in nets.items()}
    found = {}
    samples = timing.measure(calls, {name: [None] for name in calls}, device=device, budget=budget)
    for name, net in nets.items():
        saved = saved_bytes(lambda net=net: loss(net), net)  # type: ignore[misc]
        peak = None
        if device == "cuda":
            with timing.PeakMemory(device) as memory:
                calls[name](None)
            peak = memory.mb
        found[name] = Cost(statistics.median(samples[name]), saved / 2**20, peak)
    return found, timing.paired_ratio(samples["stock"], samples["fused"])
