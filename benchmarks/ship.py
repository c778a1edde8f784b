"""Turns the winners of a tuning run into the table that the package ships for that class of GPUs.

`python -m benchmarks.ship` reads benchmarks/results/h200/tune.json and rewrites fused_resnet/tables/sm_90.json.
All rows of such a file were measured with the same sources and versions: see `benchmarks.sheet`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.sheet import ROOT
from fused_resnet.tuning import TABLE_VERSION, TABLES, Table

SOURCE = ROOT / "benchmarks" / "results" / "h200" / "tune.json"
ENVIRONMENT = ("gpu", "gpu_capability", "cuda", "cudnn", "torch", "triton")


def table(results: dict[str, Any]) -> dict[str, Any]:
    """The table of a results file: one row for each problem, its winner; stock where the winner lost against it.

    Raises:
        ValueError: the file has no winners, or does not say on what GPU they were measured.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for row in results["rows"]:
        if not row.get("winner"):
            continue
        family = row.get("family") or ("stem" if row["problem"].endswith("-pool") else "conv_bn_act")
        backend, tile, ms = row["backend"], row["tile"], row["ms_p50"]
        if (row.get("vs_stock") or 1.0) < 1.0:
            backend, tile, ms = "stock", None, ms * row["vs_stock"]
        rows[family, row["problem"]] = {
            "family": family, "problem": row["problem"], "backend": "reference" if backend == "stock" else backend,
            "tile": tile, "ms": ms, "label": "measured"}
    if not rows or not results["environment"].get("gpu_capability"):
        raise ValueError("it holds no winners that were measured on a GPU")
    environment = {name: results["environment"].get(name) for name in ENVIRONMENT}
    return {"version": TABLE_VERSION, "environment": environment | {"commit": results.get("commit")},
            "rows": [rows[key] for key in sorted(rows)]}


def main(argv: list[str] | None = None) -> int:
    """Writes the table; 2 where there is nothing to make it of."""
    parser = argparse.ArgumentParser(prog="benchmarks.ship", description="ships the winners of a tuning run")
    parser.add_argument("source", type=Path, nargs="?", default=SOURCE)
    parser.add_argument("--out", type=Path, default=TABLES, help="folder of the tables")
    args = parser.parse_args(argv)
    try:
        made = table(json.loads(args.source.read_text()))
        capability = "".join(map(str, made["environment"]["gpu_capability"]))
        path = args.out / f"sm_{capability}.json"
        path.write_text(json.dumps(made, indent=1) + "\n")
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"cannot ship {args.source}: {error}", file=sys.stderr)
        return 2
    Table.load(path.stem, args.out)  # warns of what the package would not read
    print(f"{len(made['rows'])} rows in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
