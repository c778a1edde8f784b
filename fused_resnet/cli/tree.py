"""A fused network as a tree of modules and launches, for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby

from rich.text import Text
from rich.tree import Tree

from fused_resnet.fusing import Report, page
from fused_resnet.fusing.report import Node

DEEP = 1_000  # more than modules ever nest


def of(report: Report, title: str, launches: Mapping[str, str], depth: int | None = None) -> Tree:
    """The tree of a report.

    Neighbours that do not differ stand in one line, such as `1 .. 5`.

    Args:
        title: the model's name.
        launches: of a convolution's name: what the profiler saw it launch.
        depth: levels of modules that are spelled out; deeper ones are summed up.
    """
    root = report.tree()
    shown = Tree(_line([root], title))
    if root.row is None:
        _grow(shown, root, report, launches, DEEP if depth is None else depth)
    else:
        _leaf(shown, [root], report, launches)
    return shown


def _grow(tree: Tree, node: Node, report: Report, launches: Mapping[str, str], depth: int) -> None:
    if depth <= 0:
        tree.label = Text.assemble(tree.label, "  ", (_sum(node), "dim"))  # type: ignore[arg-type]
        return
    for _, alike in groupby(node.children, key=lambda child: _signature(child, report, launches)):
        group = list(alike)
        if group[0].row is not None:
            _leaf(tree, group, report, launches)
        else:
            _grow(tree.add(_line(group)), group[0], report, launches, depth - 1)


def _signature(node: Node, report: Report, launches: Mapping[str, str]) -> tuple:
    """What two neighbours must share to stand in one line."""
    row = node.row
    if row is not None:
        return (row.pattern, row.status, row.ran_on, row.reason, launches.get(row.name), _shape(report, row.problem))
    return (node.kind, *((child.name, _signature(child, report, launches)) for child in node.children))


def _names(nodes: Sequence[Node]) -> str:
    return nodes[0].name if len(nodes) == 1 else f"{nodes[0].name} .. {nodes[-1].name}"


def _line(nodes: Sequence[Node], title: str = "") -> Text:
    """A module, or several that do not differ."""
    rows = list(nodes[0].rows())
    fused = sum(row.status == "fused" for row in rows)
    counted = f"{fused} of {len(rows)} fused" + (", each" if len(nodes) > 1 else "")
    return Text.assemble((title or _names(nodes), "bold"), f" {nodes[0].kind}  ",
                         (counted, "green" if fused == len(rows) else "yellow"))


def _leaf(tree: Tree, nodes: Sequence[Node], report: Report, launches: Mapping[str, str]) -> None:
    """A convolution with what its launch computes, or why it has none."""
    row = nodes[0].row
    assert row is not None
    name = (_names(nodes) or "(the model)", "bold")
    if row.status != "fused":
        tree.add(Text.assemble(name, "  ", ("skipped", "yellow"), f"  {row.reason}"))
        return
    seen = launches.get(row.name, "")
    ran = ("  one launch" if seen == "1 conv" else f"  launches {seen}" if seen else "") + (
        f" on {row.ran_on}" if row.backend else "")
    tree.add(Text.assemble(name, "  ", (row.pattern, "green"), ran, (f"  {_shape(report, row.problem)}", "dim")))


def _shape(report: Report, problem: str) -> str:
    return page.shape(report.problems[problem]) if problem in report.problems else ""


def _sum(node: Node) -> str:
    """`3 x conv+norm+act, 1 x skipped: the reason`"""
    counts = Counter(row.pattern if row.status == "fused" else f"skipped: {row.reason}" for row in node.rows())
    return ", ".join(f"{n} x {what}" for what, n in counts.most_common())
