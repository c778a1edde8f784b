"""The report: what was fused, what was not, and why; as a table, as JSON, as a page."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fused_resnet import backends
from fused_resnet.fusing.apply import NOTES, Notes, plans
from fused_resnet.fusing.int8_steps import Int8Launch, Int8Plan
from fused_resnet.fusing.steps import Launch
from fused_resnet.ops import conv_int8, stem
from fused_resnet.problem import ConvProblem

if TYPE_CHECKING:
    from torch.export import ExportedProgram

COLUMNS = ("name", "pattern", "status", "backend", "reason")
UNWRAPPED = 10_000  # columns of a table that is not printed on a terminal


@dataclass(frozen=True)
class Row:
    """One convolution of the model. What is known after the first call only is empty, or 0, before it."""

    name: str
    pattern: str  # such as "conv+norm+add+act"; "+maxpool" where the last call gave it to a kernel; "" when skipped
    status: str  # "fused" | "skipped"
    backend: str  # that ran it last
    reason: str  # why it was skipped; "" when fused, or in a quantised model why it stays in float
    label: str = ""  # the rule by which the backend was chosen: forced | tuned | shipped | nearest | heuristic
    problem: str = ""  # the id of the problem that the last call gave it
    flops: int = 0  # of that problem
    bytes: int = 0  # the fewest that it moves
    dtype: str = ""  # "int8" where `quantize` made it a convolution of 8-bit values

    @property
    def ran_on(self) -> str:
        """The backend with the rule that chose it: `cpu (heuristic)`, `cpu int8 (heuristic)`."""
        where = f"{self.backend} {self.dtype}".strip()
        return f"{where} ({self.label})" if self.label else where


@dataclass
class Node:
    """A module of the network that is a convolution or holds some."""

    name: str  # the last part of its qualified name; "" for the model
    kind: str  # its class
    row: Row | None = None  # of a convolution
    children: list[Node] = field(default_factory=list)

    def rows(self) -> Iterator[Row]:
        """Of all convolutions at and below this module."""
        if self.row is not None:
            yield self.row
        for child in self.children:
            yield from child.rows()


@dataclass(frozen=True, repr=False)
class Report:
    """Rows in the order of the model, and notes on calls that ran the stock forward.

    It prints as a table, laid out by rich where that is installed; `show()` prints it in colours.
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    modules: Mapping[str, str] = field(default_factory=dict)  # qualified name -> class; "" is the model
    problems: Mapping[str, ConvProblem] = field(default_factory=dict)  # id -> problem

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

    @property
    def counted(self) -> str:
        """`53 of 53 convolutions fused`"""
        return f"{self.fused} of {len(self)} convolutions fused"

    def skipped(self) -> dict[str, list[str]]:
        """Reason -> names of the convolutions that were skipped for it, the most frequent reason first."""
        found: dict[str, list[str]] = {}
        for row in self.rows:
            if row.status != "fused":
                found.setdefault(row.reason, []).append(row.name)
        return dict(sorted(found.items(), key=lambda item: -len(item[1])))

    def tree(self) -> Node:
        """The network as modules that hold convolutions; every convolution is a leaf with its row."""
        root = Node("", self.modules.get("", ""))
        nodes = {"": root}
        for row in self.rows:
            path = ""
            for part in row.name.split(".") if row.name else ():
                above, path = path, f"{path}.{part}" if path else part
                if path not in nodes:
                    nodes[path] = Node(part, self.modules.get(path, ""))
                    nodes[above].children.append(nodes[path])
            nodes[path].row = row
        return root

    def to_json(self) -> str:
        """{"rows": [...], "notes": [...]}"""
        return json.dumps({"rows": [asdict(row) for row in self.rows], "notes": list(self.notes)}, indent=1)

    def to_html(self, path: str | os.PathLike[str] | None = None, timings: Any = None, *, title: str = "",
                launches: Mapping[str, Mapping[str, int]] | None = None,
                environment: Mapping[str, Any] | None = None) -> str:
        """One HTML page that needs nothing beside it: summary, what was skipped, launches, roofline, network.

        Without `timings` the page shows the FLOPs and bytes of each launch, which are computed, not measured; those
        are known once the fused model has been called.

        Args:
            path: a file to write the page to.
            timings: `fusing.Timings`: measured milliseconds of the launches, and the machine's measured ceilings.
            title: the model's name; default: its class.
            launches: {"stock": {...}, "fused": {...}}, operators of one forward by kind, counted by a profiler;
                default: what the patterns say.
            environment: what the page says about the machine; default: versions and the device.

        Returns:
            The page.

        Raises:
            ValueError: jinja2 is not installed, or `path` cannot be written.
        """
        from fused_resnet.fusing import page

        text = page.render(self, timings, title=title, launches=launches, environment=environment)
        if path is not None:
            try:
                Path(path).write_text(text, encoding="utf-8")
            except OSError as error:
                raise ValueError(f"cannot write {path}: {error.strerror or error}") from error
        return text

    def show(self) -> None:
        """Prints the table on stdout, in colours where rich is installed and stdout is a terminal."""
        if (table := self.__rich__()) is None:
            print(self)
            return
        from rich.console import Console

        console = Console(highlight=False, width=None if sys.stdout.isatty() else UNWRAPPED)
        console.print(table)
        for line in (self.counted, *self.notes):
            console.print(line, markup=False, soft_wrap=True)

    def __rich__(self) -> Any:
        """The table for `rich.print`; None where rich is not installed."""
        try:
            from rich import box
            from rich.table import Table
            from rich.text import Text
        except ModuleNotFoundError:
            return None
        shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in COLUMNS:
            shown.add_column(column, overflow="fold")
        for row in self.rows:
            style = "green" if row.status == "fused" else "yellow"
            shown.add_row(Text(row.name), row.pattern, Text(row.status, style), row.ran_on, Text(row.reason))
        return shown

    def __str__(self) -> str:
        table = self.__rich__() if "utf" in (getattr(sys.stdout, "encoding", "") or "").lower() else None
        if table is None:
            return "\n".join([*_plain(self.rows), self.counted, *self.notes])
        from rich.console import Console

        wide = shutil.get_terminal_size().columns if sys.stdout.isatty() else UNWRAPPED
        text = io.StringIO()
        Console(file=text, width=wide, color_system=None).print(table)
        lines = [line.rstrip() for line in text.getvalue().splitlines()]
        return "\n".join([*(line for line in lines if line), self.counted, *self.notes])

    __repr__ = __str__


def _plain(rows: tuple[Row, ...]) -> list[str]:
    table = [COLUMNS, *((r.name, r.pattern, r.status, r.ran_on, r.reason) for r in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(4)]
    return ["  ".join([*(line[i].ljust(widths[i]) for i in range(4)), line[4]]).rstrip() for line in table]


def report(model: nn.Module | ExportedProgram) -> Report:
    """What `fuse` did to a model, or `lower` to an exported program.

    Raises:
        ValueError: `model` was not returned by `fuse`, and is no exported program.
    """
    if not isinstance(model, nn.Module):
        from fused_resnet.fusing.rewrite import listed  # torch.export takes its time to import

        return listed(model)
    notes: Notes | None = model.__dict__.get(NOTES)
    if notes is None:
        raise ValueError("report() takes a model that fuse() returned")
    attached = plans(model)
    launches: dict[int, Launch] = {}
    kept: dict[str, str] = {}  # name of a convolution -> why it stays in float
    for plan in reversed(attached.values()):  # the outermost plan has the last word
        if plan.broken is None:
            launches.update({id(getattr(step.conv, "whole", step.conv)): step for step in plan.launches})
            kept.update(plan.reasons if isinstance(plan, Int8Plan) else {})
    rows, problems = [], {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        step = launches.get(id(module))
        if step is None:
            rows.append(Row(name, "", "skipped", "", _why(name, notes)))
            continue
        problem = _problem(step)
        rows.append(_row(name, step, problem, kept.get(step.name, "")))
        if problem is not None:
            problems[problem.id] = problem
    lines = [f"{name or 'the model'} ran stock {count} times: {reason}" for name, plan in attached.items()
             for reason, count in plan.fallbacks.items() if "." not in name]
    lines += [f"{name or 'the model'}: {plan.broken}" for name, plan in attached.items() if plan.broken]
    return Report(tuple(rows), tuple(lines), {name: type(m).__name__ for name, m in model.named_modules()}, problems)


def _problem(step: Launch) -> ConvProblem | None:
    """What the last call of a launch solved, or None before it."""
    if isinstance(step, Int8Launch) and step.solved is not None:
        return step.solved.conv
    problem = step.memo.problem
    return stem.StemProblem(*problem) if problem is not None and step.pooled else problem


def _row(name: str, step: Launch, problem: ConvProblem | None, reason: str) -> Row:
    int8 = step.solved if isinstance(step, Int8Launch) else None
    dtype = "int8" if isinstance(step, Int8Launch) and (int8 or problem is None) else ""
    if problem is None:
        return Row(name, step.pattern, "fused", step.backend, reason, dtype=dtype)
    label = ""
    family = conv_int8.FAMILY if int8 else stem.FAMILY if step.pooled else "conv_bn_act"
    with contextlib.suppress(ValueError):  # a backend is forced now that cannot run it
        choice = backends.choose(family, int8 or problem)  # type: ignore[arg-type]
        label = choice.label if choice.name == step.backend else ""  # else it was chosen under other rules
    return Row(name, step.pattern, "fused", step.backend, reason, label, problem.id, problem.flops,
               (int8 or problem).bytes, dtype)


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
