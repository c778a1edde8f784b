"""`fused-resnet bench --compare OLD NEW`: two results files row by row."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from fused_resnet.bench import compare as rule
from fused_resnet.bench import results
from fused_resnet.cli import console

STYLES = {rule.FASTER: "green", rule.SLOWER: "red", rule.NOISE: "dim"}
SPARE = ("interval", "old ms", "new ms")  # columns that a narrow terminal goes without
DRIFT = 0.03  # of the stock rows, from which on the machine is said to have changed


def run(files: tuple[Path, Path], providers: str | None, fail_slower: float | None, as_json: bool, quiet: bool) -> int:
    """Prints the comparison.

    Returns:
        1 where `fail_slower` is given and a row is slower by more percent than that and by more than noise, or was
        timed in the old file and is wrong or failed in the new one; else 0.
    """
    old, new = (results.load(path) for path in files)
    found = rule.compare(old, new, console.split(providers))
    slower = [] if fail_slower is None else [c for c in found.changes if c.slower_than(fail_slower)]
    if as_json:
        console.emit({"old": str(files[0]), "new": str(files[1]), **found.to_dict(),
                      "fail_slower": fail_slower, "failed": [rule.key_of(c.row) for c in slower]})
    else:
        console.show(table(found, f"{files[1]} against {files[0]}"), SPARE)
    for note in notes(found):
        console.say(note, quiet)
    if slower:
        console.say(f"{len(slower)} of {len(found.changes)} rows are slower by more than {fail_slower:g} %, or broke")
    return 1 if slower else 0


def table(found: rule.Comparison, title: str) -> Table:
    """A line for each row of both files, the slowest change first."""
    shown = Table(title=title, title_justify="left", title_style="bold")
    shown.add_column("model", overflow="fold", min_width=8)
    shown.add_column("provider", overflow="fold", min_width=8)
    for head in ("old ms", "new ms", "ratio", "interval"):
        shown.add_column(head, justify="right", no_wrap=True)
    shown.add_column("verdict", overflow="fold", min_width=10)
    for change in sorted(found.changes, key=lambda c: -(c.ratio or float("inf"))):
        row = change.row
        what = row.problem or f"{row.model} {row.dtype} batch {row.batch} {row.device}" + (
            "" if row.mode == "inference" else f" {row.mode}")
        interval = "" if change.low is None else f"{change.low:.3f} .. {change.high:.3f}"
        style = "red" if change.broke else STYLES.get(change.verdict, "")
        verdict = change.verdict + (f" ({change.rule})" if change.rule else "")
        shown.add_row(Text(what), row.label, _ms(change.old_ms), _ms(change.new_ms),
                      "" if change.ratio is None else f"{change.ratio:.3f}", interval, Text(verdict), style=style)
    return shown


def notes(found: rule.Comparison) -> list[str]:
    """What a reader must know besides the rows."""
    counts = [f"{sum(c.verdict == v for c in found.changes)} {v}" for v in (rule.SLOWER, rule.FASTER, rule.NOISE)]
    lines = [", ".join(counts) + f"; ratio = new time / old time, p < {rule.ALPHA:g} counts"]
    if found.gone or found.added:
        lines.append(f"{len(found.gone)} rows are in the old file only, {len(found.added)} in the new one only")
    lines += [f"another {name}: {old or '-'} became {new or '-'}" for name, (old, new) in found.differs.items()]
    if found.stock is not None and abs(found.stock - 1) > DRIFT:
        lines.append(f"the stock rows changed by a factor of {found.stock:.3f}: that is the machine or its PyTorch")
    return lines


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
