"""Writes the README's results section from the JSON in benchmarks/results/<machine>/.

`python -m benchmarks.tables` renews it; a test fails when the section and the JSON differ.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.sheet import ROOT
from fused_resnet.bench import results
from fused_resnet.bench.results import Results, Row

FOLDER = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
HEAD = ("provider", "ms", "images/s", "vs stock", "error", "launches", "peak MB", "saved MB")
# Their rows are of another kind; all other files are read as results.
OTHER_STAGES = {"check.json", "tune.json", "ground.json"}


def files(folder: Path = FOLDER) -> list[Path]:
    """Every results file with whole models, machine by machine."""
    return sorted(p for p in folder.glob("*/*.json") if p.name not in OTHER_STAGES and ".previous" not in p.suffixes)


def section(paths: Sequence[Path]) -> str:
    """The markdown between the two marks: one heading a machine, one table a model, dtype and batch."""
    machines = {path: results.load(path) for path in paths}
    parts = [part for path, data in machines.items() for part in _machine(path, data)]
    if not any(row.device == "cuda" and row.level == "model" for data in machines.values() for row in data.rows):
        parts.append("CUDA GPUs: not measured yet.")
    return "\n\n".join(parts)


def _machine(path: Path, data: Results) -> Iterable[str]:
    e = data.environment
    device = e.get("gpu") or f"{e.get('cpu')}, {e.get('threads')} threads"
    commit = f", commit {data.commit[:9]}" if data.commit else ""
    yield f"### {device}\n\ntorch {e.get('torch')}, `{path.parent.name}/{path.name}`{commit}."
    rows = [row for row in data.rows if row.level == "model"]
    for group in dict.fromkeys(row.group for row in rows):
        model, _, dtype, batch, mode = group
        table = [row for row in rows if row.group == group]
        cast = " autocast" if table[0].autocast else ""
        yield f"{model}, {dtype}{cast}, batch {batch}, {mode}:\n\n" + _table(table)


def _table(rows: Iterable[Row]) -> str:
    """One line a row; columns that nobody fills are left out."""
    columns = [c for c in zip(HEAD, *map(_cells, rows), strict=True) if any(c[1:])]
    head, *cells = zip(*columns, strict=True)
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(line) + " |" for line in cells])


def _cells(row: Row) -> list[str]:
    name = f"**{row.label}**" if row.provider.startswith("fused") else row.label
    if row.status != "ok":
        return [name, row.status, *[""] * (len(HEAD) - 2)]
    peak = row.peak_mem_mb if row.device == "cuda" else None  # on a CPU the growth of the process says little
    return [name, _number(row.ms_p50, ".1f"), _number(row.images_per_s, ".1f"), _number(row.vs_stock, ".2f", "x"),
            _number(row.rel_error, ".1e"), _number(row.launches, "d"), _number(peak, ".0f"),
            _number(row.saved_mb, ".0f")]


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def renewed(text: str, body: str) -> str:
    """`text` with `body` between the marks.

    Raises:
        ValueError: the marks are missing.
    """
    if BEGIN not in text or END not in text:
        raise ValueError(f"the README has no {BEGIN} ... {END}")
    head, rest = text.split(BEGIN, 1)
    return f"{head}{BEGIN}\n{body}\n{END}{rest.split(END, 1)[1]}"


def main() -> int:
    """Rewrites the README in place."""
    try:
        README.write_text(renewed(README.read_text(), section(files())))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
