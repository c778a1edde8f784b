"""What the kernels are meant to reach on one H200, 224x224 pixels, bf16, and what they fell short of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fused_resnet.testing import cases

# Names of convolution kernels, and of their helpers, that cuDNN brings.
CUDNN = re.compile(r"cudnn|fprop|convolve|winograd|nchwToNhwc|nhwcToNchw|implicit_gemm", re.I)
IMAGES, LATENCY, OVER_EAGER, OVER_COMPILE, FOREIGN = (
    "images/s", "ms", "x eager channels_last", "x the best torch.compile", "kernels of cuDNN")
LAUNCH_BY_LAUNCH = "x the best stock eager, both without graphs"
HOST = "us of a forward for each fused convolution"  # at batch 1 the host is what a forward waits for
OVER_STOCK, MEMORY, LARGEST_BATCH = (
    "x the best of eager channels_last and torch.compile", "x the peak memory of eager", "x the largest batch of eager")
AT_MOST = (LATENCY, HOST, FOREIGN, MEMORY)
LARGEST = "largest batch"  # the "problem" of a row that took the largest batch that fits
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """One figure; `provider` "" stands for whichever of ours is fastest."""

    model: str
    batch: int
    figure: str
    value: float
    provider: str = ""
    graph: bool | None = None  # None: with or without
    mode: str = "inference"

    def __str__(self) -> str:
        who = " ".join(filter(None, (self.provider or "fused", {True: "graph", False: "eager", None: ""}[self.graph],
                                     self.mode if self.mode == "training" else "")))
        return f"{self.model} batch {self.batch}, {who}: {'<=' if self.figure in AT_MOST else '>='} {self.value:g} " \
               f"{self.figure}"

    def found(self, rows: Sequence[Row]) -> float | None:
        """The figure of the fastest row that the target speaks of; None where it was not measured."""
        wanted = ("model", "ok", self.model, "bf16", self.mode)
        rows = [r for r in rows if r.get("ms_p50")
                and tuple(r.get(k) for k in ("level", "status", "model", "dtype", "mode")) == wanted]
        if self.figure == LARGEST_BATCH:
            most = {r["provider"]: r["batch"] for r in rows if r.get("problem") == LARGEST}
            ours = max((n for name, n in most.items() if name.startswith("fused")), default=None)
            return None if ours is None or "eager" not in most else ours / most["eager"]
        rows = [r for r in rows if r["batch"] == self.batch and r.get("problem") != LARGEST]
        ours = _fastest([r for r in rows if (r["provider"] == self.provider if self.provider else
                                             r["provider"].startswith("fused"))
                         and self.graph in (None, r["graph"])])
        if ours is None:
            return None
        if self.figure in (IMAGES, LATENCY):
            return float(ours["images_per_s" if self.figure == IMAGES else "ms_p50"])
        if self.figure == HOST:
            return float(1e3 * ours["ms_p50"] / sum(count for _, count in cases.LAYERS[self.model]))
        if self.figure == FOREIGN:
            names = ours.get("kernels")
            return None if names is None else float(sum(n for name, n in names.items() if CUDNN.search(name)))
        if self.figure == MEMORY:
            peer = next((r for r in rows if r["provider"] == "eager" and r.get("peak_mem_mb")), None)
            return None if peer is None or not ours.get("peak_mem_mb") else ours["peak_mem_mb"] / peer["peak_mem_mb"]
        who = {OVER_EAGER: ("eager_channels_last",), OVER_COMPILE: ("compile", "inductor"),
               OVER_STOCK: ("eager_channels_last", "compile"), LAUNCH_BY_LAUNCH: ("eager",)}[self.figure]
        peers = [r for r in rows if r["provider"].startswith(who)
                 and not (self.figure == LAUNCH_BY_LAUNCH and r["graph"])]
        peer = _fastest(peers)
        return None if peer is None else peer["ms_p50"] / ours["ms_p50"]

    def met(self, value: float) -> bool:
        return value <= self.value if self.figure in AT_MOST else value >= self.value


TARGETS = (
    Target("resnet50", 256, IMAGES, 45_000), Target("resnet50", 256, OVER_EAGER, 2.5),
    Target("resnet50", 256, OVER_COMPILE, 1.5), Target("resnet50", 256, IMAGES, 36_000, "fused_triton"),
    Target("resnet50", 256, FOREIGN, 0, "fused_triton"), Target("resnet18", 256, IMAGES, 105_000),
    Target("resnet34", 256, IMAGES, 55_000), Target("resnext50_32x4d", 128, OVER_EAGER, 3.0),
    Target("resnet50", 1, LATENCY, 0.20, graph=True),
    Target("resnet50", 256, IMAGES, 36_000, "fused_cuda"), Target("resnet50", 256, FOREIGN, 0, "fused_cuda"),
    Target("resnet50", 1, LAUNCH_BY_LAUNCH, 2.0, graph=False), Target("resnet50", 1, HOST, 8.0, graph=False),
    Target("resnet50", 256, OVER_STOCK, 1.25, mode="training"), Target("resnet50", 256, IMAGES, 6_000, mode="training"),
    Target("resnet50", 256, MEMORY, 0.6, mode="training"), Target("resnet50", 256, LARGEST_BATCH, 1.6, mode="training"),
)


def _fastest(rows: Sequence[Row]) -> Row | None:
    return min(rows, key=lambda r: r["ms_p50"], default=None)


def report(rows: Sequence[Row]) -> list[str]:
    """A line for each target, met, missed by so much, or not measured; then what fell short, once more."""
    lines, short = [], []
    for target in TARGETS:
        value = target.found(rows)
        if value is None:
            lines.append(f"not measured  {target}")
        elif target.met(value):
            lines.append(f"met           {target}: {value:.4g}")
        else:
            lines.append(f"MISSED        {target}: {value:.4g}")
            short.append(f"{target.model} batch {target.batch} {target.figure} {value:.4g} of {target.value:g}")
    return [*lines, "fell short: " + "; ".join(short) if short else "nothing that was measured fell short"]
