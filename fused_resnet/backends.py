"""The one chooser: which kernel runs a problem, why the others do not, and whether it is trusted.

A problem runs on what was measured fastest for it on this machine, by `tuner`; else on what the table shipped for
this class of GPUs says about it or about its nearest neighbour; else by `HEURISTIC`. `Choice.label` says which.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import platform
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fused_resnet import judge, native, tape
from fused_resnet.judge import widen
from fused_resnet.problem import ConvProblem
from fused_resnet.settings import cache_folder, enabled, interpreting, setting
from fused_resnet.tape import all_finite
from fused_resnet.tuning import Cache, Table, same_tile

NAMES = ("cuda", "triton", "cudnn", "cpu", "reference")
# Without a measured row. On CUDA none of our kernels has been measured yet: cuDNN first, what it refuses is stock's.
HEURISTIC = {"cpu": ("cpu", "reference"), "cuda": ("cudnn", "reference")}
OLDEST_CAPABILITY = (8, 0)  # tensor cores with bf16 and TF32, asynchronous copies


@dataclass
class Choice:
    """A kernel bound to the problems that it was chosen for."""

    name: str
    forward: Callable[[ConvProblem, Any], Any]
    folded: bool = False
    needs_finite: bool = False
    trusted: bool = True
    tile: dict[str, Any] | None = None  # None: the kernel picks its own
    label: str = "heuristic"  # forced | tuned | shipped | nearest | heuristic
    tried: bool = False  # to be tuned, in this process


Visit = Callable[[str, ConvProblem, Any], None]
Way = tuple[str, dict[str, Any] | None, str]  # backend, tile, label


class _State(threading.local):
    forced: str | None = None
    last: str = ""  # what ran the last problem
    visit: Visit | None = None  # sees problems before they run
    once = False  # it need not see one again


_state = _State()
_references: dict[str, Callable[[Any, Any], Any]] = {}
_choices: dict[tuple[Any, ...], Choice] = {}
_broken: dict[str, str] = {}  # key of a verdict -> the verdict
_lock = threading.Lock()
_epoch = 0  # counts how often choices were dropped


def register(family: str, reference: Callable[[Any, Any], Any]) -> None:
    """Adds a kernel family with its plain-torch reference, which is also the last fallback."""
    _references[family] = reference


@functools.cache
def cache() -> Cache:
    """This user's verdicts and tuned rows."""
    return Cache(cache_folder())


def available() -> dict[str, str | None]:
    """Backend name -> None, or the reason why it cannot run anything on this machine."""
    return {name: _absence(name) for name in NAMES}


def _absence(name: str) -> str | None:
    if name == "reference":
        return None
    if name == "cpu":
        return None if torch.backends.mkldnn.is_available() else "this build of PyTorch has no oneDNN"
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if name == "triton" and interpreting():
        return None
    if not torch.cuda.is_available():
        return "no CUDA device is visible to PyTorch"
    if name == "cudnn":
        return None if torch.backends.cudnn.is_available() else "this build of PyTorch has no cuDNN"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_CAPABILITY:
        return "our kernels need a GPU of compute capability 8.0 or newer"
    return native.refusal("cuda", capability) if name == "cuda" else None


def explain(problem: ConvProblem, family: str = "conv_bn_act") -> list[tuple[str, str | None]]:
    """Every backend in order, with None where it could run `problem`, else the reason why not.
    `choose(family, problem)` says which of them does, with its tile and, as its label, by which rule."""
    found = {name: [_refusal(family, name, problem, tile) for _, tile, _ in _order(family, problem, name)]
             for name in NAMES}
    return [(name, None if None in reasons else reasons[0]) for name, reasons in found.items()]


@contextlib.contextmanager
def use(name: str | None) -> Iterator[None]:
    """Forces one backend in this thread; `None` lifts an outer `use`.

    Raises:
        ValueError: an unknown name; or, at the launch, a problem that the backend cannot run, with the reason.
    """
    if name is not None and name not in NAMES:
        raise ValueError(f"unknown backend {name!r}, expected one of {', '.join(NAMES)}")
    before, _state.forced = _state.forced, name
    try:
        yield
    finally:
        _state.forced = before


def forced() -> str | None:
    """The backend that `use` or FUSED_RESNET_BACKEND names for this thread, or None."""
    return _state.forced or setting("BACKEND") or None


@contextlib.contextmanager
def visited(visit: Visit, once: bool = False) -> Iterator[None]:
    """Calls `visit(family, problem, operands)` before problems that this thread runs inside: all, or `once` each."""
    before, _state.visit, _state.once = (_state.visit, _state.once), visit, once
    try:
        yield
    finally:
        _state.visit, _state.once = before


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


def run(family: str, problem: Any, operands: Any, finite: bool = False) -> Any:
    """Runs `problem` on the chosen kernel, after its self-check where that is due.

    Args:
        family: the kernel family.
        problem, operands: what to run, and its tensors, whose layout is the family's contract.
        finite: the caller has made sure that the operands hold neither NaN nor Inf.
    """
    if _state.visit is not None:
        _state.visit(family, problem, operands)
    choice = choose(family, problem)
    _state.last = choice.name
    result = NotImplemented
    if not choice.trusted:
        tape.spoil()
        operands = operands._replace(reuse=False)  # the self-check reads the residual again
    if finite or not choice.needs_finite or all_finite(operands.x, operands.residual):
        result = choice.forward(problem, operands)
    if result is NotImplemented:
        _state.last = "reference"
        return _references[family](problem, operands)
    if not choice.trusted:
        return _self_check(family, choice, problem, operands, result)
    return result


def regime() -> tuple[Any, ...] | None:
    """What choices depend on besides problems: while it is the same, the same are made. None: somebody watches."""
    return None if _state.visit is not None and not _state.once else (forced(), _epoch)


def last() -> str:
    """The backend that ran this thread's last problem."""
    return _state.last


def forget(tensors: Iterable[torch.Tensor]) -> int:
    """Drops every packed or folded weight made from `tensors`; returns how many there were."""
    return importlib.import_module("fused_resnet.kernels.packing").drop(tensors)


def watch(packs: Iterable[torch.Tensor]) -> Any:
    """A `kernels.packing.Watch` over packed weights."""
    return importlib.import_module("fused_resnet.kernels.packing").Watch(packs)


def reset() -> None:
    """Forgets choices and broken kernels of this process; the cache file stays."""
    _drop(list(_choices))
    _broken.clear()
    setting.cache_clear()
    cache.cache_clear()


def kernels(family: str, problem: ConvProblem) -> dict[str, Any]:
    """Backend -> kernel module of all that can compute `problem` on this machine, whatever their verdicts."""
    return {name: _kernel(family, name) for name in NAMES if name != "reference"
            and _inability(family, name, problem) is None}


def tiles(kernel: Any, problem: Any) -> list[Any]:
    """The tiles worth measuring, the shipped one first; none where the kernel has no tiles, or none that fits.

    None among them stands for the kernel's own choice, where it has tiles that cannot be named.
    """
    try:
        return kernel.candidates(problem) if hasattr(kernel, "candidates") else []
    except ValueError:  # no tile can run `problem` on this GPU
        return []


def reference(family: str) -> Callable[[Any, Any], Any]:
    """Stock PyTorch's answer to problems of the family."""
    return _references[family]


def adopt(family: str, problem: ConvProblem, row: dict[str, Any]) -> None:
    """Makes {"backend", "tile", ...} this user's choice for `problem` on this device, from now on."""
    cache().set(tuned_key(family, problem), row)
    _drop([k for k in _choices if k[:2] == (family, problem)])


def tuned_key(family: str, problem: ConvProblem) -> str:
    """Where the cache keeps what tuning found for `problem` on this device."""
    return f"tuned {family} {problem.id} {device_name(problem.device)}"


def _drop(keys: list[tuple[Any, ...]]) -> None:
    global _epoch
    _epoch += 1
    for key in keys:
        _choices.pop(key, None)


def _choose(family: str, problem: ConvProblem) -> Choice:
    name = forced()
    if name not in (None, *NAMES):
        raise ValueError(f"FUSED_RESNET_BACKEND={name!r} is unknown, expected one of {', '.join(NAMES)}")
    for backend, tile, label in _order(family, problem, name):
        reason = _refusal(family, backend, problem, tile)
        if reason is None:
            return _bind(family, backend, problem, tile, label)
    raise ValueError(f"backend {name!r} cannot run {problem.id}: {reason}")


def _order(family: str, problem: ConvProblem, wanted: str | None) -> Iterator[Way]:
    """What is asked first, next, and so on; of one backend only if it is `wanted`."""
    for name, tile, label in _measured(family, problem):
        if wanted in (None, name):
            yield name, tile, "forced" if wanted else label
    for name in (wanted,) if wanted else HEURISTIC.get(problem.device, ("reference",)):
        for tile in _by_rule(family, name, problem):
            yield name, tile, "forced" if wanted else "heuristic"


def _by_rule(family: str, name: str, problem: ConvProblem) -> Iterator[dict[str, Any] | None]:
    """The tile of a kernel's own rule and, should that be caught with wrong results, its others; None: unnamed."""
    able = name != "reference" and _inability(family, name, problem) is None
    kernel: Any = _kernel(family, name) if able else None
    if not hasattr(kernel, "default"):
        yield None
        return
    first = kernel.default(problem)
    yield first
    yield from (tile for tile in map(asdict, filter(None, tiles(kernel, problem))) if tile != first)


def _measured(family: str, problem: ConvProblem) -> Iterator[Way]:
    """What measurements say about `problem`, the most telling first."""
    table = _table(problem.device)
    rows = [("tuned", cache().get(tuned_key(family, problem))), ("shipped", table.exact(family, problem)),
            *(("nearest", row) for row in table.near(family, problem))]
    for label, row in rows:
        if row is None:
            continue
        fault = _fault(family, problem, row)
        if fault is None:
            yield row["backend"], row.get("tile"), label
        elif label != "nearest":  # a neighbour's tile need not fit
            warnings.warn(f"fused_resnet ignores the {label} row of {problem.id}: {fault}", stacklevel=6)


def _fault(family: str, problem: ConvProblem, row: Any) -> str | None:
    """What is wrong with a measured row, or None. A tile must be one that would be measured today."""
    if not isinstance(row, dict) or row.get("backend") not in NAMES:
        return f"it names none of {', '.join(NAMES)}: {row!r:.80}"
    name, tile = row["backend"], row.get("tile")
    if tile is None or _inability(family, name, problem) is not None:
        return None  # nothing to look at, or nothing that could run
    known = () if name == "reference" else filter(None, tiles(_kernel(family, name), problem))
    return None if any(same_tile(tile, asdict(t)) for t in known) else f"{name} has no such tile for it: {tile!r:.200}"


def _bind(family: str, name: str, problem: ConvProblem, tile: dict[str, Any] | None, label: str) -> Choice:
    if name == "reference":
        return Choice(name, _references[family], label=label)
    kernel = _kernel(family, name)
    forward = kernel.forward if tile is None else kernel.with_tile(tile)
    mode = setting("SELF_CHECK", "first")
    trusted = mode == "off" or (mode == "first" and cache().get(_verdict_key(family, name, problem, tile)) == "ok")
    return Choice(name, forward, kernel.FOLDED, kernel.needs_finite(problem), trusted, tile, label)


def _refusal(family: str, name: str, problem: ConvProblem, tile: dict[str, Any] | None = None) -> str | None:
    """Why `name` must not run `problem` with `tile` here, or None: it cannot, or it was caught with wrong results."""
    reason = _inability(family, name, problem)
    if reason is not None or name == "reference":
        return reason
    key = _verdict_key(family, name, problem, tile)
    if key in _broken:
        return _broken[key]
    verdict = cache().get(key) if setting("SELF_CHECK", "first") == "first" else None
    return verdict if verdict != "ok" else None


def _inability(family: str, name: str, problem: ConvProblem) -> str | None:
    if name == "reference":
        return None
    if 0 in problem.output_shape or problem.C == 0:
        return "there is nothing to compute"
    return _absence(name) or (_kernel(family, name).refuse(problem) if _offers(name, family) else
                                 f"it has no kernel of the family {family}")


@functools.cache
def _offers(name: str, family: str) -> bool:
    return importlib.util.find_spec(f"fused_resnet.kernels.{name}.{family}") is not None


@functools.cache
def _kernel(family: str, name: str) -> Any:
    return importlib.import_module(f"fused_resnet.kernels.{name}.{family}")


@functools.cache
def device_name(device: str) -> str:
    """The device and every version that a kernel's speed and correctness may depend on."""
    if device == "cuda" and torch.cuda.is_available():
        chip = f"{torch.cuda.get_device_name()} sm_{''.join(map(str, torch.cuda.get_device_capability()))}"
        return f"{chip} cuda {torch.version.cuda} torch {torch.__version__}"
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} torch {torch.__version__}"


@functools.cache
def _table(device: str) -> Table:
    """The rows that are shipped for this class of devices; read when the first problem is chosen for."""
    if device != "cuda" or not torch.cuda.is_available():
        return Table()
    return Table.load(f"sm_{''.join(map(str, torch.cuda.get_device_capability()))}")


def _verdict_key(family: str, name: str, problem: ConvProblem, tile: dict[str, Any] | None) -> str:
    if tile is not None:
        name = f"{name} {json.dumps(tile, sort_keys=True)}"
    return f"verdict {family} {name} {problem.layer.id} {device_name(problem.device)}"


def _self_check(family: str, choice: Choice, problem: Any, operands: Any, result: Any) -> Any:
    """Compares a result, its first and last image if that will do, with the reference before the kernel is believed."""
    if problem.device == "cuda" and torch.cuda.is_current_stream_capturing():
        return result
    verdict = judge.verdict(_references[family], problem, operands, result, choice.folded)
    if verdict is None:
        return result  # unchecked; tried again at the next launch
    key, keep = _verdict_key(family, choice.name, problem, choice.tile), setting("SELF_CHECK", "first") == "first"
    if verdict == "ok":
        choice.trusted = keep
        if keep:
            cache().set(key, verdict)
        return result
    with _lock:
        _broken[key] = verdict
        _drop([k for k, c in _choices.items() if (c.name, c.tile, k[0]) == (choice.name, choice.tile, family)
               and k[1].layer == problem.layer])
    cache().set(key, verdict)
    name = choice.name if choice.tile is None else f"{choice.name} {json.dumps(choice.tile, sort_keys=True)}"
    warnings.warn(f"fused_resnet disables {name} for {problem.id} on {device_name(problem.device)}: {verdict}. "
                  f"What is next in order runs from now on; please report this line.", stacklevel=2)
    return _references[family](problem, operands)


__all__ = ["NAMES", "Choice", "adopt", "all_finite", "available", "cache", "choose", "device_name", "enabled",
           "explain", "forced", "forget", "interpreting", "kernels", "last", "reference", "regime", "register", "reset",
           "run", "setting", "tiles", "tuned_key", "use", "visited", "watch", "widen"]
