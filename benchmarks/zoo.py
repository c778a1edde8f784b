"""Every ResNet that people load: what fuse() makes of it, beside the stock network.

`python -m benchmarks.zoo` goes through them all and writes benchmarks/results/zoo.json and docs/coverage.md; it goes
on where it stopped. `--only REGEX` picks names, `--again` does them over, `--time` measures speed, too.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import fused_resnet as fr
from benchmarks import zoos
from benchmarks.survey import ran_fused, survey
from fused_resnet import numerics, timing

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "zoo.json"
PAGE = ROOT / "docs" / "coverage.md"
BATCH = 2
CHAOS = 1e-3  # a random network that turns its own rounding into more judges nothing: its norms are made tamer
LARGEST = 150e6  # parameters; a random model of that size takes 1.2 GB with its fp64 copy, and says nothing new
EXACT = ("convolutions", "norms", "pairs", "fused", "norms_left", "skipped", "status")  # equal on every machine


def lively(model: nn.Module, gain: float = 1.0, seed: int = 0) -> nn.Module:
    """Norms that do something, in place: random statistics, gains of both signs."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if getattr(module, "running_mean", None) is None:
            continue
        for name, low, high in (("weight", 0.5, 1.5), ("bias", -0.5, 0.5), ("running_mean", -0.5, 0.5),
                                ("running_var", 0.5, 2.0)):
            vector = getattr(module, name)
            if vector is not None:
                values = torch.rand(vector.shape, generator=generator) * (high - low) + low
                vector.data.copy_(values * gain if name == "weight" else values)
        if module.weight is not None:
            module.weight.data[::4] *= -1
    return model


@torch.no_grad()
def measure(name: str, timed: bool = False) -> dict[str, Any]:
    """One row of the table.

    Args:
        name: a key of `zoos.models()`.
        timed: measure the speed, too.

    Returns:
        what was counted, the errors, and a status: "ok", "wrong" with what is wrong, or "left out" with the reason.
    """
    entry = zoos.models()[name]
    millions = _millions(entry)
    row: dict[str, Any] = {"model": name, "size": entry.size, "parameters_m": round(millions, 1)}
    if millions * 1e6 > LARGEST:
        return {**row, "status": "left out", "why": f"more than {LARGEST / 1e6:.0f}M parameters"}
    torch.manual_seed(0)
    stock, x = entry.make().eval(), torch.randn(BATCH, 3, entry.size, entry.size)
    for gain in (1.0, 0.5, 0.25):
        if _own_error(lively(stock, gain), x) < CHAOS:
            break
    row["batch_norm"] = any(isinstance(m, nn.BatchNorm2d) for m in stock.modules())
    fused = fr.fuse(stock)
    found = survey(stock, x)
    wrong = mismatch(stock, fused, x)
    launched, left = ran_fused(fused, x)
    why = {r.name: _plain(r.reason, fused) for r in fr.report(fused) if r.status != "fused"}
    pairs = set(found.paired)
    skipped = Counter(why.get(n) or _aside(n, fused) for n in pairs - launched)
    alone = Counter(reason for n, reason in why.items() if n not in pairs)
    verdict = fr.verify(stock, fused, x)
    if wrong is None and not verdict:
        wrong = str(verdict)
    row.update(convolutions=found.convolutions, norms=found.norms, pairs=len(pairs), fused=len(pairs & launched),
               norms_left=left, skipped=dict(sorted(skipped.items())), alone=dict(sorted(alone.items())),
               error=_share(verdict.fused), stock_error=_share(verdict.stock),
               status="ok" if wrong is None else "wrong", why=wrong or "")
    if timed:
        row["speedup"] = round(speedup(stock, fused, x), 2)
    return row


def _millions(entry: zoos.Entry) -> float:
    """How many million parameters a network has, without memory for them where its constructor allows that."""
    try:
        with torch.device("meta"):
            model = entry.make()
    except (RuntimeError, NotImplementedError):  # it computes with tensors while it is made
        model = entry.make()
    return sum(p.numel() for p in model.parameters()) / 1e6


def _own_error(stock: nn.Module, x: torch.Tensor) -> float:
    exact = [t for t in tree_leaves(copy.deepcopy(stock).double()(x.double())) if isinstance(t, torch.Tensor)]
    found = [t for t in tree_leaves(stock(x)) if isinstance(t, torch.Tensor)]
    return max(numerics.measure(a, b).rel for a, b in zip(found, exact) if a.is_floating_point())


def _share(error: Any) -> float:
    return float(f"{error.max / error.ref_max if error.ref_max else error.max:.1e}")


def _aside(name: str, fused: nn.Module) -> str:
    """Why a launch that is planned did not run."""
    for at, plan in reversed(fr.fusing.plans(fused).items()):
        if plan.fallbacks and name.startswith(f"{at}." if at else ""):
            return next(iter(plan.fallbacks))
    return "a norm or an add ran as an operator of its own"


def _plain(reason: str, model: nn.Module) -> str:
    """A reason without the name of the module that it stands for, so that equal ones are counted together."""
    name, colon, rest = reason.partition(": ")
    return rest if colon and name in dict(model.named_modules()) else reason


def mismatch(stock: nn.Module, fused: nn.Module, x: torch.Tensor) -> str | None:
    """What the fused network does otherwise than stock, or None: results, exceptions, buffers, keys, dropped plans."""
    before = {key: value.clone() for key, value in fused.state_dict().items()}
    for given in (x, x, x.contiguous(memory_format=torch.channels_last)):
        a, b = (tree_leaves(model(given)) for model in (fused, stock))
        if [_like(t) for t in a] != [_like(t) for t in b]:
            return "its results have other types, shapes or strides"
    for bad in (x[0], x[:, :2], x.double(), x[:, :, :0]):
        errors = [_error(model, bad) for model in (fused, stock)]
        if errors[0] != errors[1]:
            return f"{errors[0]} in place of {errors[1]}"
    after = fused.state_dict()
    if list(after) != list(stock.state_dict()) or any(not torch.equal(after[k], v) for k, v in before.items()):
        return "its state dict changed"
    broken = [plan.broken for plan in fr.fusing.plans(fused).values() if plan.broken]
    return broken[0] if broken else None


def _like(t: Any) -> Any:
    return (t.shape, t.dtype, t.stride()) if isinstance(t, torch.Tensor) else t


def _error(model: nn.Module, x: torch.Tensor) -> str:
    try:
        model(x)
    except Exception as error:  # whatever a model raises, to be compared
        return f"{type(error).__name__}: {error}"
    return "no exception"


def speedup(stock: nn.Module, fused: nn.Module, x: torch.Tensor) -> float:
    """How many times faster than stock in channels_last, the median of paired rounds. On a quiet machine only."""
    best = copy.deepcopy(stock)
    with contextlib.suppress(RuntimeError):  # weights of five sizes have no such layout
        best.to(memory_format=torch.channels_last)
    calls: dict[str, Callable] = {"stock": best, "fused": fused}
    inputs = {"stock": [x.contiguous(memory_format=torch.channels_last)], "fused": [x]}
    samples = timing.measure(calls, inputs, budget=3.0)
    return timing.paired_ratio(samples["stock"], samples["fused"])


def load(path: Path = RESULTS) -> dict[str, dict]:
    return {row["model"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}


def save(rows: dict[str, dict], path: Path = RESULTS) -> None:
    """Writes all rows, in the order of the zoo."""
    order = list(zoos.models())
    known = sorted((row for name, row in rows.items() if name in order), key=lambda row: order.index(row["model"]))
    text = ",\n".join(json.dumps(row) for row in known)
    versions = json.dumps({"torch": torch.__version__.split("+")[0], **zoos.versions()})
    path.write_text(f'{{"environment": {versions},\n"rows": [\n{text}\n]}}\n')


def run(names: list[str], again: bool, timed: bool) -> None:
    rows = load()
    for name in names:
        if name in rows and not again and (not timed or "speedup" in rows[name]):
            continue
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                rows[name] = measure(name, timed)
        except Exception as error:  # the sweep goes on; the row says so
            traceback.print_exc()
            rows[name] = {"model": name, "status": "wrong", "why": f"{type(error).__name__}: {error}"[:300]}
        save(rows)
        row = rows[name]
        print(f"{name}: {row['status']} {row.get('fused', '')}/{row.get('pairs', '')} {row.get('why', '')} "
              f"{row.get('skipped') or ''} [{time.perf_counter() - start:.0f} s]", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="names in which this regular expression is found")
    parser.add_argument("--again", action="store_true", help="also those that are in the results")
    parser.add_argument("--time", action="store_true", help="measure the speed, too; needs a quiet machine")
    options = parser.parse_args()
    torch.set_num_threads(1)
    run([n for n in zoos.models() if re.search(options.only, n)], options.again, options.time)
    with contextlib.suppress(FileExistsError):
        PAGE.parent.mkdir()
    from benchmarks import coverage

    PAGE.write_text(coverage.page(load()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
