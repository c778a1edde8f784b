"""Ranges of the values of a plan, seen while samples run through it: what their scales are made from."""

from __future__ import annotations

import math
from typing import Any

import torch

from fused_resnet import int8
from fused_resnet.fusing.steps import Call, Launch

METHODS = ("minmax", "percentile", "mse")
PERCENTILE = 99.99  # of the numbers of a tensor that keep their size, above and below alike
KEPT = 1 << 16  # numbers of each tensor and sample that the methods other than minmax look at
SHRUNK = 64  # candidates of the method mse: the range times 1, 63/64, ..., 1/64
LOOKED_AT = 1 << 14  # numbers on which they are compared


class Range:
    """What one value of a plan was in all samples."""

    def __init__(self, keep: bool) -> None:
        self.low, self.high = math.inf, -math.inf
        self.keep, self.kept = keep, []  # type: tuple[bool, list[torch.Tensor]]

    def see(self, t: torch.Tensor) -> None:
        """Takes in one tensor that is not empty."""
        low, high = t.aminmax()
        self.low, self.high = min(self.low, low.item()), max(self.high, high.item())
        if self.keep:
            flat = t.detach().flatten()
            self.kept.append(flat[torch.randint(flat.numel(), (min(KEPT, flat.numel()),))].float())

    @property
    def finite(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)

    def affine(self, method: str) -> int8.Affine:
        """The scale and zero point: `method` is one of METHODS."""
        if method == "minmax":
            return int8.affine(self.low, self.high)
        values = torch.cat(self.kept)
        if method == "percentile":
            rank = max(1, round(values.numel() * (1 - PERCENTILE / 100)))
            low, high = values.kthvalue(rank).values, values.kthvalue(values.numel() + 1 - rank).values
            return int8.affine(min(low.item(), 0.0), max(high.item(), 0.0))
        values = values[::-(-values.numel() // LOOKED_AT)]
        found = [int8.affine(self.low * i / SHRUNK, self.high * i / SHRUNK) for i in range(SHRUNK, 0, -1)]
        return min(found, key=lambda a: (int8.dequantize(int8.quantize(values, a), a) - values).square().sum().item())


class Watched:
    """A step of a plan that shows its values to a watcher."""

    def __init__(self, step: Any, seen: dict[int, Range], keep: bool, made: set[int]) -> None:
        self.step, self.seen, self.keep, self.made = step, seen, keep, made

    def __getattr__(self, name: str) -> Any:
        return getattr(self.step, name)

    def run(self, values: list, tidy: bool, finite: bool = True) -> Any:
        if isinstance(self.step, Launch):
            for slot in (self.step.x, self.step.residual):
                if slot is not None and slot not in self.made:
                    self._see(slot, values[slot])
        out = self.step.run(values, tidy, finite)
        if isinstance(self.step, Launch):
            self._see(self.step.out, out)
        return out

    def _see(self, slot: int, value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
            self.seen.setdefault(slot, Range(self.keep)).see(value)


def watched(steps: list, seen: dict[int, Range], keep: bool) -> list:
    """The steps of a plan so that what launches read and make is seen.

    Args:
        steps: of the plan.
        seen: slot -> its range; filled at every call.
        keep: keep some of the numbers, too.
    """
    made = {step.out for step in steps if isinstance(step, Launch)}
    return [Watched(step, seen, keep, made) if isinstance(step, Launch | Call) else step for step in steps]
