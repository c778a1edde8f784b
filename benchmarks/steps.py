"""The launches of one training step of a ResNet, with operands for each: what the stages check and tune."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from benchmarks.layers import IMAGES
from fused_resnet import numerics
from fused_resnet.ops.bn_act import NormOperands
from fused_resnet.problem import ELEMENT_BYTES, ConvOperands, ConvProblem, GradOperands, NormProblem
from fused_resnet.testing import cases

FAMILIES = ("conv_bn_stats", "conv_dgrad", "conv_wgrad", "conv_bn_act", "bn_act", "bn_act_sums", "bn_act_grad")
Problem = ConvProblem | NormProblem


class Launch(NamedTuple):
    """One distinct launch of a step."""

    family: str
    problem: Any  # ConvProblem | NormProblem
    count: int
    through: bool = False  # a gradient that is taken through the norm behind the convolution

    @property
    def bytes(self) -> int:
        """Fewest bytes through memory, images only: what orders launches by their cost."""
        p = self.problem
        if isinstance(p, NormProblem):
            tensors = {"bn_act": 2 + bool(p.shortcut), "bn_act_sums": 2 + (p.shortcut == "norm"),
                       "bn_act_grad": 3 + 2 * (p.shortcut == "norm")}[self.family]
            return ELEMENT_BYTES[p.dtype] * tensors * p.N * p.H * p.W * p.C
        reads, writes = p.N * p.C * p.H * p.W, p.N * p.K * p.P * p.Q
        extra = (reads if self.family == "conv_dgrad" and p.prologue else 0) + writes * self.through
        return ELEMENT_BYTES[p.dtype] * (reads + writes + extra + p.K * p.depth)


def network(name: str, layers: list[tuple[ConvProblem, int]] | None = None, **changes: Any) -> list[Launch]:
    """The distinct launches of a step with recomputed block ends, and how often each occurs.

    Args:
        name: of a network of the catalogue.
        layers: its layers, by default those of the catalogue.
        changes: fields of every problem: device, dtype, N.
    """
    layers = [(p._replace(**changes), count) for p, count in layers or cases.LAYERS[name]]
    projected = {p.output_shape: count for p, count in layers if p.activation == "identity"}
    bottlenecks = any(p.residual and p.R == 1 for p, _ in layers)
    found: dict[tuple, int] = {}

    def add(family: str, problem: Problem, count: int, through: bool = False) -> None:
        if count:
            found[family, problem, through] = found.get((family, problem, through), 0) + count

    for index, (p, count) in enumerate(layers):
        shortcut = p.activation == "identity"
        inner = p.residual or bottlenecks and p.R > 1 and index > 0
        conv = p._replace(norm=False, bias=False, residual=False, activation="identity",
                          prologue="relu" if inner else "")
        ends = p.residual or shortcut
        add("conv_bn_stats", conv, count)
        add("conv_wgrad", conv, count, not ends and index > 0)
        if index:
            add("conv_dgrad", conv, count, not ends)
        if ends or index == 0:
            add("conv_bn_act", conv, count)
        if shortcut or index and not p.residual:
            continue
        with_norm = projected.get(p.output_shape, 0) if p.residual else 0
        norm = NormProblem(p.device, p.dtype, p.N, p.P, p.Q, p.K)
        for form, many in (("norm", with_norm), ("tensor" if p.residual else "", count - with_norm)):
            add("bn_act", norm._replace(shortcut=form), many)
            for family in ("bn_act_sums", "bn_act_grad"):
                # A shortcut that is the block's input gets its gradient from the first convolution's launch.
                add(family, norm._replace(shortcut="norm" if form == "norm" else ""), many)
    return [Launch(family, problem, count, through) for (family, problem, through), count in found.items()]


def key(launch: Launch, model: str, provider: str | None = None, **more: Any) -> dict[str, Any]:
    """The fields that name a launch's row; families share problems, so the family stands in front."""
    p = launch.problem
    named = {"provider": provider} if provider else {}
    problem = f"{launch.family} {p.id}{' through' * launch.through}"
    return {"level": "layer", "model": model, "problem": problem, "batch": p.N, "dtype": p.dtype, "autocast": False,
            "device": p.device, "mode": "training", "graph": False, **named, **more}


def depth(family: str, problem: Any) -> int:
    """Terms of the longest sum behind one result."""
    if family == "conv_wgrad":
        return problem.N * problem.P * problem.Q
    return problem.K // problem.groups * problem.R * problem.S if family == "conv_dgrad" else problem.depth


def operands(launch: Launch, seed: int = 0) -> Any:
    """Random operands of any batch, at the price of drawing `IMAGES` pictures."""
    return _Maker(launch.problem, seed).make(launch)


class _Maker:
    """Draws tensors for one problem."""

    def __init__(self, problem: Any, seed: int) -> None:
        self.problem, self.generator = problem, torch.Generator().manual_seed(seed)
        self.dtype = numerics.DTYPES[problem.dtype]

    def image(self, c: int, h: int, w: int) -> torch.Tensor:
        """Multiples of 1/8: `norm` takes means between them, so that no rounding decides what a ReLU lets pass."""
        n = self.problem.N
        few = (torch.randn(min(n, IMAGES), c, h, w, generator=self.generator) * 8).round() / 8
        few = few.to(self.problem.device, self.dtype)
        return few.repeat(-(-n // IMAGES), 1, 1, 1)[:n].contiguous(memory_format=torch.channels_last)

    def vector(self, c: int, low: float, high: float, *shape: int) -> torch.Tensor:
        return (torch.rand(*shape, c, generator=self.generator) * (high - low) + low).to(self.problem.device)

    def norm(self, c: int, prefix: str = "", beta: bool = True) -> dict[str, torch.Tensor]:
        gamma = self.vector(c, 0.5, 1.5) * (1 - 2 * (self.vector(c, 0, 1) < 0.25).float())
        mean = (self.vector(c, -4, 4).round() * 2 + 1) / 16
        found = {"gamma": gamma, "mean": mean, "var": self.vector(c, 0.5, 2.0)}
        if beta:
            found["beta"] = torch.zeros_like(gamma)
        return {prefix + name: value for name, value in found.items()}

    def mask(self, c: int, h: int, w: int) -> torch.Tensor:
        size = -(-self.problem.N * c * h * w // 8)
        return torch.randint(256, (size,), generator=self.generator, dtype=torch.uint8).to(self.problem.device)

    def make(self, launch: Launch) -> Any:
        p = self.problem
        if isinstance(p, NormProblem):
            size = (p.C, p.H, p.W)
            parts = self.norm(p.C) | {"dy": self.image(*size), "mask": self.mask(*size),
                                      "means": self.vector(p.C, -0.3, 0.3, 2)}
            if p.shortcut:
                parts["residual"] = self.image(*size)
            if p.shortcut == "norm":
                parts |= self.norm(p.C, "r_") | {"r_means": self.vector(p.C, -0.3, 0.3, 2)}
            return NormOperands(self.image(*size), **parts)
        weight = torch.randn(p.K, p.C // p.groups, p.R, p.S, generator=self.generator) * p.depth**-0.5
        x, weight = self.image(p.C, p.H, p.W), weight.to(p.device, self.dtype)
        before = self.norm(p.C, "pre_") if p.prologue else {}
        if launch.family in ("conv_bn_stats", "conv_bn_act"):
            pivot = {"mean": self.vector(p.K, -0.5, 0.5)} if launch.family == "conv_bn_stats" else {}
            return ConvOperands(x, weight, **before, **pivot)
        parts = dict(before)
        if launch.through:
            parts |= self.norm(p.K, beta=False) | {"u": self.image(p.K, p.P, p.Q),
                                                   "means": self.vector(p.K, -0.3, 0.3, 2)}
        elif launch.family == "conv_dgrad" and not p.prologue:
            parts |= {"residual": self.image(p.C, p.H, p.W), "mask": self.mask(p.C, p.H, p.W)}
        return GradOperands(self.image(p.K, p.P, p.Q), weight, x=x, **parts)


