"""docs/coverage.md from benchmarks/results/zoo.json: how much of each network runs fused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

FAMILY = ("resnet", "resnext", "wide_resnet", "seresnet")
HEAD = ("model", "convolutions", "pairs", "fused", "skipped, and why", "other convolutions left alone",
        "norms left", "error (stock's)")
INTRO = """# What fuses in which network

`python -m benchmarks.zoo` writes this page and `benchmarks/results/zoo.json`. It builds every network with random
weights and lively norms, fuses it, and runs {batch} images through both, fp32, on a CPU, at the size given in the JSON.

- **pairs**: convolutions behind which or in front of which a batch norm stands, found by watching the operators of the
  stock network.
- **fused**: those of the pairs that torch.profiler saw in a launch behind whose convolution no norm and no add ran. The
  plan is not asked. oneDNN has no activation but ReLU behind an add: any other then runs in place, as an operator.
- **norms left**: batch norms that the fused network still runs by themselves. In front of a convolution a norm is part
  of the launch on a GPU only; oneDNN has no such prologue, so that on a CPU it is a pass of its own.
- **error**: the largest difference from an fp64 run over the largest value, beside that of the stock network.
- **speed**: over stock in channels_last, one thread, the median of paired rounds; the fused network was built from
  contiguous weights and is given contiguous images, so that what does not fuse runs in contiguous memory. At such sizes
  Python counts, too: a plan of a thousand elementwise steps around a few launches is slower than stock.

"Wrong" would be any other result, shape, stride, dtype, exception, buffer or state-dict key than stock's, or a plan
that was dropped at its first call. The layouts are contiguous and channels_last; the bad inputs lack a dimension, a
channel, all rows, or have another dtype."""


def page(rows: dict[str, dict[str, Any]], batch: int = 2) -> str:
    """The whole page."""
    parts = [INTRO.format(batch=batch), _totals(rows)]
    for source in dict.fromkeys(name.partition(":")[0] for name in rows):
        found = [row for name, row in rows.items() if name.startswith(f"{source}:")]
        parts += [f"## {source}", _table(found)]
        left = [row for row in found if row["status"] == "left out"]
        parts += ["Left out: " + ", ".join(f"`{_bare(r)}` ({r['parameters_m']:.0f}M parameters)" for r in left)
                  + "."] if left else []
    return "\n\n".join(parts) + "\n"


def _bare(row: dict[str, Any]) -> str:
    return str(row["model"]).partition(":")[2]


def _totals(rows: dict[str, dict[str, Any]]) -> str:
    run = [row for row in rows.values() if row["status"] != "left out"]
    classic = [row for row in run if row["model"].startswith("torchvision:") and _bare(row).startswith(FAMILY)
               and "FrozenBatchNorm2d" not in row["model"]]
    family = [row for row in run if row["model"].startswith("timm:") and _bare(row).startswith(FAMILY)
              and row["batch_norm"]]
    good = [row for row in family if row["status"] == "ok" and row["fused"] >= 0.9 * row["pairs"] > 0]
    wrong = [row["model"] for row in run if row["status"] == "wrong"]
    return "\n".join([
        f"- {len(run)} networks ran, {len(wrong)} wrong{': ' + ', '.join(wrong) if wrong else ''}.",
        f"- torchvision's ResNet family: {sum(r['fused'] for r in classic)} of {sum(r['pairs'] for r in classic)} "
        f"pairs fused.",
        f"- timm's `resnet*`, `resnext*`, `wide_resnet*` and `seresnet*` with batch norms: {len(good)} of "
        f"{len(family)} names run at least 90 % of their pairs fused."])


def _table(rows: Iterable[dict[str, Any]]) -> str:
    lines = [HEAD, ("---", "---:", "---:", "---:", "---", "---", "---:", "---:")]
    for row in rows:
        if row["status"] != "left out":
            name = f"`{_bare(row)}`" if row["status"] == "ok" else f"`{_bare(row)}` WRONG: {row['why']}"
            lines.append((name, *(str(row.get(key, "")) for key in ("convolutions", "pairs", "fused")),
                          _reasons(row.get("skipped", {})), _reasons(row.get("alone", {})),
                          str(row.get("norms_left", "")),
                          f"{row.get('error', 0):.0e} ({row.get('stock_error', 0):.0e})"))
    if any("speedup" in row for row in rows):
        lines = [(*lines[0], "speed"), (*lines[1], "---:"),
                 *((*line, f"{row['speedup']:.2f}x" if "speedup" in row else "") for line, row in
                   zip(lines[2:], [r for r in rows if r["status"] != "left out"]))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _reasons(found: dict[str, int]) -> str:
    return "; ".join(f"{count}: {reason}" for reason, count in found.items()).replace("|", "\\|")
