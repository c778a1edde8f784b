"""Everything that can run a model, under one interface: stock PyTorch, its compilers, the peers and us.

A provider says why it is unavailable, turns a stock model into a callable, and turns a batch into the
form that it likes best (memory format, numpy); that preparation is not timed, as a data loader would
do it. Weights and input are rounded to the row's dtype before any provider sees them.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fused_resnet import backends, native
from fused_resnet.bench import peers
from fused_resnet.bench.stock import in_memory_format
from fused_resnet.fusing import fuse, report
from fused_resnet.fusing.quantize import quantize

Call = Callable[[Any], Any]


def _always(device: str, dtype: str) -> str | None:
    return None


def _same(batch: torch.Tensor) -> Any:
    return batch


def channels_last(batch: torch.Tensor) -> Any:
    """The batch in channels_last memory."""
    return batch.to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Provider:
    """One way to run a model."""

    name: str
    # (stock model, sample batch) -> callable; for training, of a copy in train mode -> what has its parameters
    build: Callable[[nn.Module, torch.Tensor], Call]
    reason: Callable[[str, str], str | None] = _always  # (device, dtype) -> why it cannot run here, or None
    prepare: Callable[[torch.Tensor], Any] = _same
    cost: float = 0.3  # seconds that building takes, roughly, for a ResNet-50: for planning a budget
    counted: bool = True  # whether the profiler sees its launches on a CPU
    capturable: bool = True  # whether its launches on CUDA can be recorded as a graph, for a second row
    own_graphs: bool = False  # on CUDA it replays graphs of its own
    mode: str = "inference"
    forced: str | None = None  # training: the backend that our kernels have to be of

    def takes(self, dtype: str) -> bool:
        """Whether its rows are of this dtype: quantised models have rows of their own, beside eager ones in fp32."""
        return (dtype == "int8") is self.name.endswith("_int8") or self.name.startswith("eager")

    @property
    def ours(self) -> bool:
        return self.name.split("_")[0] == "fused"

    def backend(self, call: Call) -> str | None:
        """The backends that a fused callable uses, most frequent first; None for the others."""
        return getattr(call, "backend", None)


def _copy_channels_last(model: nn.Module) -> nn.Module:
    return in_memory_format(copy.deepcopy(model), torch.channels_last)


def _eager(model: nn.Module, sample: torch.Tensor) -> Call:
    return model


def _eager_channels_last(model: nn.Module, sample: torch.Tensor) -> Call:
    return _copy_channels_last(model)


def _compiled(freezing: bool = False, **options: Any) -> Callable[[nn.Module, torch.Tensor], Call]:
    """torch.compile, with inductor's freezing on or off.

    Freezing needs both: inductor's config while it compiles, for the option alone changes nothing (torch 2.13: 13.9 ms
    against 9.8 ms for a ResNet-18); and the option, for two callables with equal options share dynamo's cache, and the
    frozen one would run the code of the other.
    """
    if freezing:
        options["options"] = {"freezing": True}

    def build(model: nn.Module, sample: torch.Tensor) -> Call:
        from torch._inductor import config

        call = torch.compile(_copy_channels_last(model), **options)
        with config.patch(freezing=freezing):
            call(channels_last(sample))
        return call

    return build


class Fused:
    """A fused copy of a model, on the chooser's backends or on a forced one."""

    def __init__(self, model: nn.Module, forced: str | None) -> None:
        self.model = fuse(model, memory_format=torch.channels_last)
        self.forced = forced

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        if self.forced is None:
            return self.model(batch)
        with backends.use(self.forced):
            return self.model(batch)

    @property
    def backend(self) -> str:
        """The forced backend, else those that the report names, most frequent first."""
        return self.forced or fused_backends(self.model)


class FusedInt8(Fused):
    """A quantised copy of a model, calibrated on the first batch."""

    def __init__(self, model: nn.Module, sample: torch.Tensor) -> None:
        self.model = quantize(model, sample, memory_format=torch.channels_last)
        self.forced = None


def _int8_reason(device: str, dtype: str) -> str | None:
    return "quantised models run on the CPU" if device != "cpu" else native.refusal("cpu")


def _fused_in_training(recompute: bool | None) -> Callable[[nn.Module, torch.Tensor], Call]:
    return lambda model, sample: fuse(_copy_channels_last(model), inplace=True, memory_format=torch.channels_last,
                                      recompute=recompute)


def _compiled_in_training(model: nn.Module, sample: torch.Tensor) -> Call:
    return torch.compile(_copy_channels_last(model))


def _recompute_reason(device: str, dtype: str) -> str | None:
    return "fused recomputes by default on CUDA" if device == "cuda" else None


def fused_backends(model: nn.Module) -> str:
    """The backends that a fused model's report names, most frequent first, joined by "+"."""
    used = Counter(row.backend for row in report(model) if row.status == "fused" and row.backend)
    return "+".join(name for name, _ in used.most_common()) or "none"


def _fused(forced: str | None) -> Callable[[nn.Module, torch.Tensor], Call]:
    return lambda model, sample: Fused(model, forced)


def _backend_reason(name: str) -> Callable[[str, str], str | None]:
    def reason(device: str, dtype: str) -> str | None:
        if (name == "cpu") != (device == "cpu") and not (name == "triton" and backends.interpreting()):
            return f"backend {name} does not run on {device}"
        return backends.available()[name]

    return reason


def _needs_cuda(device: str, dtype: str) -> str | None:
    return None if device == "cuda" else "runs on CUDA only"


def _needs_compiler(device: str, dtype: str) -> str | None:
    if device == "cuda":
        return None
    from torch._inductor import config
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception:
        return f"inductor needs a C++ compiler ({config.cpp.cxx[1]})"
    return None


# In order of value: a budget that runs out drops the later ones.
PROVIDERS = {p.name: p for p in (
    Provider("eager", _eager),
    Provider("eager_channels_last", _eager_channels_last, prepare=channels_last),
    Provider("fused", _fused(None), prepare=channels_last),
    Provider("inductor_freezing", _compiled(freezing=True), _needs_compiler, channels_last, 11.0, False),
    Provider("openvino", peers.build_openvino, peers.openvino_reason, peers.to_numpy, 3.0, False, False),
    Provider("onnxruntime", peers.build_onnxruntime, peers.onnxruntime_reason, peers.to_numpy, 2.0, False, False),
    Provider("tensorrt", peers.build_tensorrt, peers.tensorrt_reason, cost=60.0),
    Provider("compile", _compiled(), _needs_compiler, channels_last, 9.0, False),
    Provider("compile_max_autotune", _compiled(mode="max-autotune"), _needs_cuda, channels_last, 90.0,
             capturable=False, own_graphs=True),
    Provider("fused_int8", FusedInt8, _int8_reason, channels_last, 2.0),
    Provider("onnxruntime_int8", peers.build_onnxruntime_int8, peers.onnxruntime_reason, peers.to_numpy, 8.0, False,
             False),
    Provider("openvino_int8", peers.build_openvino_int8, peers.openvino_int8_reason, peers.to_numpy, 9.0, False, False),
    *(Provider(f"fused_{name}", _fused(name), _backend_reason(name), channels_last)
      for name in backends.NAMES if name != "reference"),
)}


# The same for training. Compiling forward and backward takes thrice as long.
TRAINING = {p.name: replace(p, mode="training") for p in (
    Provider("eager", _eager),
    Provider("eager_channels_last", _eager_channels_last, prepare=channels_last),
    Provider("fused", _fused_in_training(None), prepare=channels_last),
    Provider("fused_recompute", _fused_in_training(True), _recompute_reason, channels_last),
    Provider("compile", _compiled_in_training, _needs_compiler, channels_last, 30.0, False),
    Provider("fused_triton", _fused_in_training(None), _backend_reason("triton"), channels_last, forced="triton"),
)}


def select(names: list[str] | None, device: str, mode: str = "inference") -> list[Provider]:
    """The providers to run, in order of value.

    Without names: all, save a forced backend where it is the only one, for that would repeat `fused`.

    Args:
        names: some of them; those that the mode does not have are passed over.
        device: "cpu" or "cuda".
        mode: "inference" or "training".

    Raises:
        ValueError: a name that no mode knows, or none that this one has.
    """
    if names:
        known, here = list(dict.fromkeys([*PROVIDERS, *TRAINING])), TRAINING if mode == "training" else PROVIDERS
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"unknown provider {unknown[0]!r}, expected some of {', '.join(known)}")
        if not set(names) & here.keys():
            raise ValueError(f"provider {names[0]!r} does not do {mode}, expected some of {', '.join(here)}")
        return [here[name] for name in here if name in names]
    if mode == "training":
        return [p for p in TRAINING.values() if p.forced is None or p.reason(device, "fp32") is None]
    always = ("fused", "fused_int8")
    forced = [p for p in PROVIDERS.values() if p.ours and p.name not in always and p.reason(device, "fp32") is None]
    return [p for p in PROVIDERS.values() if not p.ours or p.name in always or (p in forced and len(forced) > 1)]


def forget_compiled() -> None:
    """Drops torch.compile's caches: many models through one code object would meet its recompile limit."""
    torch.compiler.reset()
