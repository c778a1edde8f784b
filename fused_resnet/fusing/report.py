"""The report: what was fused, what was not, and why."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from torch import nn

from fused_resnet.fusing.apply import NOTES, Notes, plans


@dataclass(frozen=True)
class Row:
    """One convolution of the model."""

    name: str
    pattern: str  # such as "conv+norm+add+act"; "+maxpool" where the last call gave it to a kernel; "" when skipped
    status: str  # "fused" | "skipped"
    backend: str  # that ran it last; "" before the first call
    reason: str  # why it was skipped; "" when fused


@dataclass(frozen=True)
class Report:
    """Rows in the order of the model, and notes on calls that ran the stock forward."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __bool__(self) -> bool:
        """True when every convolution is fused."""
        return all(row.status == "fused" for row in self.rows)

    @property
    def fused(self) -> int:
        return sum(row.status == "fused" for row in self.rows)

    def to_json(self) -> str:
        """{"rows": [...], "notes": [...]}"""
        return json.dumps({"rows": [asdict(row) for row in self.rows], "notes": list(self.notes)}, indent=1)

    def __str__(self) -> str:
        head = ("name", "pattern", "status", "backend", "reason")
        table = [head, *((r.name, r.pattern, r.status, r.backend, r.reason) for r in self.rows)]
        widths = [max(len(line[i]) for line in table) for i in range(4)]
        lines = ["  ".join([*(line[i].ljust(widths[i]) for i in range(4)), line[4]]).rstrip() for line in table]
        lines.append(f"{self.fused} of {len(self)} convolutions fused")
        return "\n".join([*lines, *self.notes])


def report(model: nn.Module) -> Report:
    """What `fuse` did to `model`.

    Raises:
        ValueError: `model` was not returned by `fuse`.
    """
    notes: Notes | None = model.__dict__.get(NOTES)
    if notes is None:
        raise ValueError("report() takes a model that fuse() returned")
    attached = plans(model)
    launches = {}
    for plan in reversed(attached.values()):  # the outermost plan has the last word
        if plan.broken is None:
            launches.update({id(step.conv): step for step in plan.launches})
    rows = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        step = launches.get(id(module))
        if step is not None:
            rows.append(Row(name, step.pattern, "fused", step.backend, ""))
        else:
            rows.append(Row(name, "", "skipped", "", _why(name, notes)))
    lines = [f"{name or 'the model'} ran stock {count} times: {reason}" for name, plan in attached.items()
             for reason, count in plan.fallbacks.items() if "." not in name]
    lines += [f"{name or 'the model'}: {plan.broken}" for name, plan in attached.items() if plan.broken]
    return Report(tuple(rows), tuple(lines))


def _why(name: str, notes: Notes) -> str:
    if name in notes.convs:
        return notes.convs[name]
    path = name
    while True:
        if path in notes.modules:
            return notes.modules[path] if path in ("", name) else f"{path}: {notes.modules[path]}"
        if not path:
            return "no plan covers it"
        path = path.rpartition(".")[0]
