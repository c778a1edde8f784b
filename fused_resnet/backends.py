"""The one chooser: which kernel runs a problem, why the others do not, and whether it is trusted.

The only reader of environment variables and device capability:

    FUSED_RESNET_BACKEND     force a backend, as `use` does
    FUSED_RESNET_DISABLE=1   run stock forwards everywhere
    FUSED_RESNET_SELF_CHECK  first (default) | always | off
    FUSED_RESNET_CACHE_DIR   where verdicts and tuned rows are kept (default ~/.cache/fused_resnet)
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import math
import os
import platform
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fused_resnet import numerics
from fused_resnet.problem import ConvProblem
from fused_resnet.tuning import Cache

NAMES = ("triton", "cudnn", "cpu", "reference")
# Without a tuned row. On CUDA no kernel of ours has been measured yet, so cuDNN stands first and
# what it refuses runs as stock does, until a tuned row says otherwise.
HEURISTIC = {"cpu": ("cpu", "reference"), "cuda": ("cudnn", "reference")}
SLACK = 4.0  # a self-check looks for broken kernels: it may meet unlucky data, a bug is off by orders of magnitude


@dataclass
class Choice:
    """A kernel bound to the problems that it was chosen for."""

    name: str
    forward: Callable[[ConvProblem, Any], Any]
    folded: bool = False
    needs_finite: bool = False
    trusted: bool = True


class _State(threading.local):
    forced: str | None = None
    last: str = ""  # what ran the last problem


_state = _State()
_references: dict[str, Callable[[ConvProblem, Any], torch.Tensor]] = {}
_choices: dict[tuple, Choice] = {}
_broken: dict[tuple, str] = {}
_lock = threading.Lock()


def register(family: str, reference: Callable[[ConvProblem, Any], torch.Tensor]) -> None:
    """Adds a kernel family with its plain-torch reference, which is also the last fallback."""
    _references[family] = reference


@functools.cache
def setting(name: str, default: str = "") -> str:
    """The environment variable FUSED_RESNET_<name>, read once."""
    return os.environ.get(f"FUSED_RESNET_{name}", default)


def enabled() -> bool:
    """False when FUSED_RESNET_DISABLE is set: every module then runs its stock forward."""
    return setting("DISABLE") in ("", "0")


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def cache() -> Cache:
    """This user's verdicts and tuned rows."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Cache(Path(setting("CACHE_DIR") or os.path.join(home, "fused_resnet")))


def available() -> dict[str, str | None]:
    """Backend name -> None, or the reason why it cannot run anything on this machine."""
    gpu = None if torch.cuda.is_available() else "no CUDA device is visible to PyTorch"
    triton = gpu
    if gpu is None and torch.cuda.get_device_capability() < (8, 0):
        triton = "the Triton kernels need a GPU of compute capability 8.0 or newer"
    if interpreting():
        triton = None
    if importlib.util.find_spec("triton") is None:
        triton = "the package triton is not installed"
    cudnn = gpu or (None if torch.backends.cudnn.is_available() else "this build of PyTorch has no cuDNN")
    cpu = None if torch.backends.mkldnn.is_available() else "this build of PyTorch has no oneDNN"
    return {"triton": triton, "cudnn": cudnn, "cpu": cpu, "reference": None}


def explain(problem: ConvProblem, family: str = "conv_bn_act") -> list[tuple[str, str | None]]:
    """Every backend in order, with None where it could run `problem`, else the reason why not."""
    return [(name, _refusal(family, name, problem)) for name in NAMES]


@contextlib.contextmanager
def use(name: str | None) -> Iterator[None]:
    """Forces one backend in this thread; `None` lifts an outer `use`.

    Raises:
        ValueError: an unknown name; or, at the launch, a problem that the backend cannot run, with
            the reason.
    """
    if name is not None and name not in NAMES:
        raise ValueError(f"unknown backend {name!r}, expected one of {', '.join(NAMES)}")
    before, _state.forced = _state.forced, name
    try:
        yield
    finally:
        _state.forced = before


def choose(family: str, problem: ConvProblem) -> Choice:
    """The kernel that runs `problem` here and now.

    Raises:
        ValueError: the forced backend cannot run `problem`.
    """
    key = (family, problem, _state.forced)
    choice = _choices.get(key)
    if choice is None:
        choice = _choices[key] = _choose(family, problem)
    return choice


def run(family: str, problem: ConvProblem, operands: Any, finite: bool = False) -> torch.Tensor:
    """Runs `problem` on the chosen kernel, after its self-check where that is due.

    Args:
        family: the kernel family.
        problem: what to run.
        operands: the tensors; the layout is the family's contract.
        finite: the caller has made sure that the operands hold neither NaN nor Inf.
    """
    choice = choose(family, problem)
    _state.last = choice.name
    result = NotImplemented
    if operands.reuse and not choice.trusted:
        operands = operands._replace(reuse=False)  # the self-check reads the residual again
    if finite or not choice.needs_finite or all_finite(operands.x, operands.residual):
        result = choice.forward(problem, operands)
    if result is NotImplemented:
        _state.last = "reference"
        return _references[family](problem, operands)
    if not choice.trusted:
        return _self_check(family, choice, problem, operands, result)
    return result


def last() -> str:
    """The backend that ran this thread's last problem."""
    return _state.last


def all_finite(*tensors: torch.Tensor | None) -> bool:
    """Whether no tensor holds NaN or Inf, at the price of one sum each."""
    return all(t is None or math.isfinite(t.sum(dtype=torch.float32).item()) for t in tensors)


def forget(tensors: Iterable[torch.Tensor]) -> int:
    """Drops every packed or folded weight made from `tensors`; returns how many there were."""
    return importlib.import_module("fused_resnet.kernels.packing").drop(tensors)


def reset() -> None:
    """Forgets choices and broken kernels of this process; the cache file stays."""
    _choices.clear()
    _broken.clear()
    setting.cache_clear()
    cache.cache_clear()


def _choose(family: str, problem: ConvProblem) -> Choice:
    forced = _state.forced or setting("BACKEND") or None
    if forced is not None:
        if forced not in NAMES:
            raise ValueError(f"FUSED_RESNET_BACKEND={forced!r} is unknown, expected one of {', '.join(NAMES)}")
        reason = _refusal(family, forced, problem)
        if reason is not None:
            raise ValueError(f"backend {forced!r} cannot run {problem.id}: {reason}")
        return _bind(family, forced, problem)
    order = HEURISTIC.get(problem.device, ("reference",))
    row = _tuned(family, problem)
    if row.get("backend") in NAMES:
        order = (row["backend"], *order)
    name = next(name for name in order if _refusal(family, name, problem) is None)
    return _bind(family, name, problem)


def _bind(family: str, name: str, problem: ConvProblem) -> Choice:
    if name == "reference":
        return Choice(name, _references[family])
    kernel = _kernel(family, name)
    forward = kernel.forward
    tile = _tuned(family, problem).get("tile")
    if tile is not None and hasattr(kernel, "with_tile"):
        forward = kernel.with_tile(tile)
    mode = setting("SELF_CHECK", "first")
    trusted = mode == "off" or (mode == "first" and cache().get(_verdict_key(family, name, problem)) == "ok")
    return Choice(name, forward, kernel.FOLDED, kernel.needs_finite(problem), trusted)


def _refusal(family: str, name: str, problem: ConvProblem) -> str | None:
    if name == "reference":
        return None
    if 0 in problem.output_shape or problem.C == 0:
        return "there is nothing to compute"
    reason = available()[name] or (_kernel(family, name).refuse(problem) if _offers(name, family) else
                                   f"it has no kernel of the family {family}")
    if reason is None and (family, name, problem.layer) in _broken:
        reason = _broken[family, name, problem.layer]
    elif reason is None and setting("SELF_CHECK", "first") == "first":
        verdict = cache().get(_verdict_key(family, name, problem))
        reason = verdict if verdict not in (None, "ok") else None
    return reason


@functools.cache
def _offers(name: str, family: str) -> bool:
    return importlib.util.find_spec(f"fused_resnet.kernels.{name}.{family}") is not None


@functools.cache
def _kernel(family: str, name: str) -> Any:
    return importlib.import_module(f"fused_resnet.kernels.{name}.{family}")


@functools.cache
def device_name(device: str) -> str:
    """The device and every version that a kernel's speed and correctness may depend on."""
    if device == "cuda":
        chip = f"{torch.cuda.get_device_name()} sm_{''.join(map(str, torch.cuda.get_device_capability()))}"
        return f"{chip} cuda {torch.version.cuda} torch {torch.__version__}"
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} torch {torch.__version__}"


def _tuned(family: str, problem: ConvProblem) -> dict[str, Any]:
    """What tuning found for this problem on this device: {"backend", "tile", ...}, or nothing."""
    row = cache().get(f"tuned {family} {problem.id} {device_name(problem.device)}")
    return row if isinstance(row, dict) else {}


def _verdict_key(family: str, name: str, problem: ConvProblem) -> str:
    tile = _tuned(family, problem).get("tile")
    if tile and hasattr(_kernel(family, name), "with_tile"):
        name = f"{name} {json.dumps(tile, sort_keys=True)}"
    return f"verdict {family} {name} {problem.layer.id} {device_name(problem.device)}"


def _self_check(family: str, choice: Choice, problem: ConvProblem, operands: Any, result: torch.Tensor) -> torch.Tensor:
    """Compares the first and last image with the reference before the kernel is believed."""
    if result.is_cuda and torch.cuda.is_current_stream_capturing():
        return result
    ends = [0, problem.N - 1] if problem.N > 1 else [0]
    try:
        few = operands._replace(**{f: getattr(operands, f)[ends] for f in ("x", "residual")
                                   if getattr(operands, f) is not None})
        small = problem._replace(N=len(ends))
        stock = _references[family](small, few)
        exact = _references[family](small._replace(dtype="fp64"), _widen(few))
        bound = numerics.check(result[ends], stock, exact, dtype=problem.dtype, depth=problem.depth,
                               folded=choice.folded)
    except torch.OutOfMemoryError:
        return result  # unchecked; tried again at the next launch
    if not math.isfinite(exact.sum().item()):
        return result  # says nothing about the kernel
    fine = bound.error.max <= SLACK * bound.max_allowed and bound.error.rms <= SLACK * bound.rms_allowed
    keep = setting("SELF_CHECK", "first") == "first"
    if fine and bound.error.nonfinite_match:
        choice.trusted = keep
        if keep:
            cache().set(_verdict_key(family, choice.name, problem), "ok")
        return result
    verdict = f"failed its self-check on this machine: {bound}"
    with _lock:
        _broken[family, choice.name, problem.layer] = verdict
        for key in [k for k, c in _choices.items() if c.name == choice.name and k[1].layer == problem.layer]:
            del _choices[key]
    cache().set(_verdict_key(family, choice.name, problem), verdict)
    warnings.warn(f"fused_resnet disables {choice.name} for {problem.id} on {device_name(problem.device)}: {verdict}. "
                  f"The reference runs instead; please report this line.", stacklevel=2)
    return _references[family](problem, operands)


def _widen(operands: Any) -> Any:
    return type(operands)(*[v.double() if isinstance(v, torch.Tensor) else v for v in operands])


__all__ = ["NAMES", "Choice", "all_finite", "available", "cache", "choose", "device_name", "enabled", "explain",
           "forget", "interpreting", "last", "register", "reset", "run", "setting", "use"]
