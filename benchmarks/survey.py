"""What a network is made of and what runs fused of it: operators watched while they run, never the plan.

The stock network runs under a dispatch mode, which sees which convolution a batch norm stands behind or in front of.
The fused one runs under torch.profiler, which sees what every launch really executed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fused_resnet.bench import launches

aten = torch.ops.aten
CONVOLUTIONS = {aten.convolution.default, aten._convolution.default, aten.mkldnn_convolution.default}
NORMS = re.compile(r"(_?native_|cudnn_|_)?batch_norm\w*")
ACTIVATIONS = re.compile(r"(leaky_)?relu_?|clamp(_min|_max)?_?|hardtanh_?|silu_?|hardswish_?|gelu_?|elu_?")


@dataclass
class Survey:
    """Of one forward of a stock network."""

    convolutions: int = 0  # calls
    norms: int = 0  # calls that normalise with fixed statistics
    paired: dict[str, str] = field(default_factory=dict)  # convolution -> "behind", "in front": where its norm stands


class _Watch(TorchDispatchMode):
    """Follows tensors from operator to operator."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.found = Survey()
        self.names = {id(m.weight): name for name, m in model.named_modules()
                      if isinstance(m, nn.Conv2d) and isinstance(m.__dict__["_parameters"].get("weight"), nn.Parameter)}
        self.made: dict[int, tuple[str, str]] = {}  # a tensor -> (what made it, the convolution's name)
        self.alive: list[Any] = []  # so that no tensor takes the identity of another

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func in CONVOLUTIONS:
            self.convolution(args[0], args[1], out)
        elif NORMS.fullmatch(name):
            self.norm(args[0], out[0] if isinstance(out, tuple | list) else out)
        elif ACTIVATIONS.fullmatch(name):
            self.keep(out, self.made.get(id(args[0])))
        elif func is aten.mul.Tensor and _per_channel(args[1], args[0]):
            self.keep(out, ("scaled", self.source(args[0])))
        elif func is aten.add.Tensor and _per_channel(args[1], args[0]) and self.kind(args[0]) == "scaled":
            self.norm(args[0], out)  # a frozen norm: times scale, plus shift
        elif isinstance(out, torch.Tensor):
            self.keep(out, None)  # an operator in place answers with the tensor that it was given
        return out

    def convolution(self, x: Any, weight: Any, out: Any) -> None:
        self.found.convolutions += 1
        name = self.names.get(id(weight), "")
        if name and self.kind(x) == "norm":
            self.found.paired.setdefault(name, "in front")
        self.keep(out, ("convolution", name))

    def norm(self, x: Any, out: Any) -> None:
        self.found.norms += 1
        name = self.source(x)
        if name:
            self.found.paired[name] = "behind"
        self.keep(out, ("norm", ""))

    def kind(self, t: Any) -> str:
        return self.made.get(id(t), ("", ""))[0]

    def source(self, t: Any) -> str:
        return self.made.get(id(t), ("", ""))[1]

    def keep(self, t: Any, made: tuple[str, str] | None) -> None:
        self.alive.append(t)
        if made is None:
            self.made.pop(id(t), None)
        else:
            self.made[id(t)] = made


def _per_channel(t: Any, x: Any) -> bool:
    return isinstance(t, torch.Tensor) and x.dim() == 4 and t.dim() == 4 and t.shape == (1, x.shape[1], 1, 1)


@torch.no_grad()
def survey(model: nn.Module, x: Any) -> Survey:
    """Runs the stock `model` on x and says what it consists of."""
    with _Watch(model) as watch:
        model(x)
    return watch.found


@torch.no_grad()
def ran_fused(fused: nn.Module, x: Any) -> tuple[set[str], int]:
    """(launches behind whose convolution no norm and no add ran, batch norms that ran as operators of their own).

    Call the model before, so that nothing is packed or checked now. What runs in front of the convolution is a
    prologue: kernels for it are one launch with the convolution on a GPU, on a CPU it is a pass of its own.
    """
    order = launches.order_per_label(lambda: fused(x))
    found = {name for name, kinds in order.items()
             if "conv" in kinds and not {"norm", "add"}.intersection(kinds[kinds.index("conv"):])}
    return found, launches.count(lambda: fused(x))["norm"]
