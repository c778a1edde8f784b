"""Two results files row by row: what became faster, what slower, and what is only noise.

Rows that hold their samples are compared by the Mann-Whitney rank test, two-sided, exact where no two samples are
equal; the interval of the ratio is the bootstrap's. Older rows hold percentiles only: they differ where the intervals
from p20 to p80 do not touch. Both rules know the noise inside of a run, not what changed between two runs (clocks,
neighbours, temperature): the stock rows, which no change of ours moves, show how much that is.

Source: Mann, Whitney, "On a test of whether one of two random variables is stochastically larger than the other",
Annals of Mathematical Statistics 18(1), 1947; Efron, Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fused_resnet.bench.results import EAGER, Results, Row

ALPHA = 0.01  # of files with 50 rows that did not change, four in ten show a false alarm; five samples can reach it
INTERVAL = 0.95
RESAMPLES = 2000
FASTER, SLOWER, NOISE = "faster", "slower", "within noise"
MACHINE = ("cpu", "cores", "threads", "gpu", "cuda", "cudnn", "torch", "triton", "onednn", "python", "input", "weights")


@dataclass(frozen=True)
class Change:
    """One row in both files."""

    row: Row  # of the new file
    old_ms: float | None
    new_ms: float | None
    ratio: float | None  # new time over old: above 1 is slower
    low: float | None  # interval of the ratio
    high: float | None
    verdict: str  # faster | slower | within noise, or how a status changed: "ok to wrong"
    rule: str  # "rank test, p = 0.003" | "p20 .. p80 apart" | ...

    @property
    def broke(self) -> bool:
        """It was timed before, and is wrong or fails now."""
        return self.verdict.startswith("ok to")

    def slower_than(self, percent: float) -> bool:
        """Whether it is slower by more than so much, and by more than noise; or broken."""
        return self.broke or self.verdict == SLOWER and self.ratio is not None and self.ratio > 1 + percent / 100


@dataclass(frozen=True)
class Comparison:
    """Both files beside each other."""

    changes: list[Change]
    gone: list[Row]  # in the old file only
    added: list[Row]  # in the new file only
    differs: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # of the environments: key -> (old, new)
    stock: float | None = None  # median ratio of the eager rows: what the machine did

    def to_dict(self) -> dict[str, Any]:
        changes = [{**key_of(c.row), **{k: v for k, v in asdict(c).items() if k != "row"}} for c in self.changes]
        return {"changes": changes, "gone": [key_of(row) for row in self.gone],
                "added": [key_of(row) for row in self.added],
                "environment": {name: list(pair) for name, pair in self.differs.items()}, "stock_ratio": self.stock}


KEY = ("level", "model", "problem", "batch", "dtype", "autocast", "device", "mode", "graph", "provider")


def key_of(row: Row) -> dict[str, Any]:
    """What two rows must have in common to be compared."""
    return {name: getattr(row, name) for name in KEY}


def compare(old: Results, new: Results, providers: Sequence[str] = ()) -> Comparison:
    """Matches the rows of two files by `KEY`.

    Args:
        providers: only rows of these; all of them by default.

    Raises:
        ValueError: a provider that neither file has, or no row is in both files.
    """
    known = {row.provider for row in (*old.rows, *new.rows)}
    for name in providers:
        if name not in known:
            raise ValueError(f"neither file has rows of {name!r}; they have {', '.join(sorted(known)) or 'none'}")
    before, after = ({tuple(key_of(row).values()): row for row in each.rows
                      if not providers or row.provider in providers} for each in (old, new))
    changes = [change(before[key], row) for key, row in after.items() if key in before]
    if not changes:
        raise ValueError(f"the files have no row in common: {len(before)} rows and {len(after)} rows")
    differs = {name: (old.environment.get(name), new.environment.get(name)) for name in MACHINE
               if old.environment.get(name) != new.environment.get(name)}
    stock = [c.ratio for c in (change(a, b) for a, b in _pairs(old, new)) if c.ratio is not None]
    return Comparison(changes, [row for key, row in before.items() if key not in after],
                      [row for key, row in after.items() if key not in before], differs,
                      statistics.median(stock) if stock else None)


def _pairs(old: Results, new: Results) -> list[tuple[Row, Row]]:
    """The stock rows of both files."""
    before = {tuple(key_of(row).values()): row for row in old.rows if row.provider in EAGER}
    return [(before[key], row) for row in new.rows if (key := tuple(key_of(row).values())) in before]


def change(old: Row, new: Row) -> Change:
    """How one row changed."""
    if old.ms_p50 is None or new.ms_p50 is None:
        verdict = f"{old.status} to {new.status}" if old.status != new.status else new.status
        return Change(new, old.ms_p50, new.ms_p50, None, None, None, verdict, "")
    ratio = new.ms_p50 / old.ms_p50
    if old.samples and new.samples:
        p = rank_test(old.samples, new.samples)
        low, high = bootstrap(old.samples, new.samples)
        apart, rule = p < ALPHA, f"rank test, p = {p:.2g}"
    elif None in (old.ms_p20, old.ms_p80, new.ms_p20, new.ms_p80):
        return Change(new, old.ms_p50, new.ms_p50, ratio, None, None, NOISE, "one run each, no percentiles")
    else:
        spans = (old.ms_p20 or 0.0, old.ms_p80 or 0.0), (new.ms_p20 or 0.0, new.ms_p80 or 0.0)
        low, high = spans[1][0] / spans[0][1], spans[1][1] / spans[0][0]
        apart = low > 1 or high < 1
        rule = f"p20 .. p80 {'apart' if apart else 'overlap'}"
    verdict = NOISE if not apart or ratio == 1 else SLOWER if ratio > 1 else FASTER
    return Change(new, old.ms_p50, new.ms_p50, ratio, low, high, verdict, rule)


def rank_test(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p of the Mann-Whitney test that `a` and `b` come from one distribution.

    Exact without ties, else by the normal approximation with correction for ties and continuity.
    """
    n, m = len(a), len(b)
    u = sum((x > y) + 0.5 * (x == y) for x in a for y in b)
    u = min(u, n * m - u)
    joint = [*a, *b]
    ties = [joint.count(value) for value in set(joint)]
    if max(ties) == 1:
        ways = _ways(n, m)
        return min(1.0, 2 * sum(ways[:int(u) + 1]) / sum(ways))
    total = n + m
    variance = n * m / 12 * (total + 1 - sum(t**3 - t for t in ties) / (total * (total - 1)))
    if variance == 0:
        return 1.0
    return min(1.0, math.erfc(max(0.0, n * m / 2 - u - 0.5) / math.sqrt(2 * variance)))


def _ways(n: int, m: int) -> list[int]:
    """How many orders of n and m samples give each U: the coefficients of the Gaussian binomial (n + m over n)."""
    ways = [1] + [0] * (n * m)
    for i in range(1, n + 1):
        for u in range(n * m, m + i - 1, -1):  # times 1 - q^(m+i)
            ways[u] -= ways[u - m - i]
        for u in range(i, n * m + 1):  # over 1 - q^i
            ways[u] += ways[u - i]
    return ways


def bootstrap(old: Sequence[float], new: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The percentile interval of median(new) / median(old), of samples drawn anew from both."""
    draw = random.Random(seed)
    ratios = sorted(statistics.median(draw.choices(new, k=len(new))) / statistics.median(draw.choices(old, k=len(old)))
                    for _ in range(RESAMPLES))
    edge = int((1 - INTERVAL) / 2 * RESAMPLES)
    return ratios[edge], ratios[-1 - edge]
