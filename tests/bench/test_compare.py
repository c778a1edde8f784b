"""Two results files beside each other: what changed is told from noise by a rule, not by a look."""

import math
import random

import pytest

from fused_resnet.bench import compare, results
from fused_resnet.bench.results import Row


def row(ms, *, spread=0.02, samples=None, **fields):
    return Row(**{"level": "model", "model": "resnet50", "batch": 8, "dtype": "fp32", "device": "cpu",
                  "provider": "fused", "ms_p20": ms * (1 - spread), "ms_p50": ms, "ms_p80": ms * (1 + spread),
                  "samples": samples, **fields})


def noisy(ms, seed, count=15):
    draw = random.Random(seed)
    return [ms * draw.lognormvariate(0, 0.03) for _ in range(count)]


def file(*rows, **environment):
    return results.Results({"cpu": "any", "torch": "2", **environment}, "abc", list(rows))


@pytest.mark.parametrize(("old", "new", "verdict"), [(10.0, 10.1, "within noise"), (10.0, 11.0, "slower"),
                                                     (10.0, 9.0, "faster"), (10.0, 10.0, "within noise")])
def test_percentiles_decide_where_there_are_no_samples(old, new, verdict):
    change = compare.change(row(old), row(new))
    assert change.verdict == verdict and change.ratio == new / old
    assert change.rule == f"p20 .. p80 {'overlap' if verdict == 'within noise' else 'apart'}"
    assert change.low < change.ratio < change.high


def test_samples_decide_where_both_rows_have_them():
    old, same, slower = (row(10.0, spread=0.3, samples=noisy(10.0, 1)), row(10.0, samples=noisy(10.0, 2)),
                         row(11.0, spread=0.3, samples=noisy(11.0, 3)))
    assert compare.change(old, same).verdict == "within noise"
    change = compare.change(old, slower)
    assert change.verdict == "slower" and change.rule.startswith("rank test, p = "), "although p20 .. p80 overlap"
    assert 1 < change.low < change.ratio < change.high < 1.2
    assert compare.change(old, row(11.0, spread=0.3)).verdict == "within noise", "one file has no samples"
    few = compare.change(row(10.0, samples=[10.0, 10.1, 10.2]), row(20.0, samples=[20.0, 20.1, 20.2]))
    assert few.verdict == "within noise", "three rounds can prove nothing at this level"


def test_without_percentiles_nothing_is_claimed():
    change = compare.change(row(10.0, ms_p20=None), row(20.0))
    assert (change.verdict, change.low, change.ratio) == ("within noise", None, 2.0)


def brute_force(a, b):
    """Two-sided p over all ways to split the joint samples."""
    from itertools import combinations

    joint = [*a, *b]
    def u(first):
        second = [v for i, v in enumerate(joint) if i not in first]
        return sum(joint[i] > y for i in first for y in second)

    middle, seen = len(a) * len(b) / 2, abs(u(tuple(range(len(a)))) - len(a) * len(b) / 2)
    ways = [abs(u(first) - middle) >= seen for first in combinations(range(len(joint)), len(a))]
    return sum(ways) / len(ways)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 4), (5, 5), (6, 3)])
def test_the_rank_test_is_exact(n, m):
    draw = random.Random(n * m)
    for shift in (0.0, 1.0, 5.0):
        a, b = [draw.gauss(0, 1) for _ in range(n)], [draw.gauss(shift, 1) for _ in range(m)]
        assert compare.rank_test(a, b) == pytest.approx(brute_force(a, b))
        assert compare.rank_test(a, b) == pytest.approx(compare.rank_test(b, a))


def test_the_rank_test_with_ties_is_the_corrected_approximation():
    a, b = [1.0, 2.0, 2.0, 3.0, 4.0], [2.5, 3.0, 5.0, 6.0, 1.0]
    variance = 25 / 12 * (11 - (3 * 6) / 90)
    u = sum((x > y) + 0.5 * (x == y) for x in a for y in b)
    assert compare.rank_test(a, b) == pytest.approx(math.erfc((12.5 - u - 0.5) / math.sqrt(2 * variance)))
    assert compare.rank_test([1.0] * 5, [1.0] * 6) == 1.0


def test_false_alarms_are_as_rare_as_stated_and_changes_are_seen():
    def alarms(scale):
        draw = random.Random(0)
        return sum(compare.rank_test([draw.lognormvariate(0, 0.05) for _ in range(15)],
                                     [scale * draw.lognormvariate(0, 0.05) for _ in range(15)]) < compare.ALPHA
                   for _ in range(300)) / 300

    assert alarms(1.0) <= 2.5 * compare.ALPHA and alarms(1.1) > 0.95


def test_the_bootstrap_covers_the_ratio():
    low, high = compare.bootstrap(noisy(10.0, 1, 40), noisy(12.0, 2, 40))
    assert low < 1.2 < high and high - low < 0.1
    assert compare.bootstrap([1.0], [2.0]) == (2.0, 2.0)


def test_rows_are_matched_by_their_key():
    old = file(row(10.0), row(5.0, batch=1), row(7.0, dtype="bf16"), row(20.0, provider="eager"),
               row(3.0, level="layer", problem="a"))
    new = file(row(20.0, provider="eager"), row(10.0), row(5.0, batch=1, mode="training"), row(9.0, graph=True),
               row(3.0, level="layer", problem="b"), threads=3)
    found = compare.compare(old, new)
    assert [(c.row.provider, c.ratio) for c in found.changes] == [("eager", 1.0), ("fused", 1.0)]
    assert len(found.gone) == 3 and len(found.added) == 3
    assert found.differs == {"threads": (None, 3)} and found.stock == 1.0
    assert [c.row.provider for c in compare.compare(old, new, ["fused"]).changes] == ["fused"]
    assert {"changes", "gone", "added", "environment", "stock_ratio"} == set(found.to_dict())


@pytest.mark.parametrize(("new", "providers", "message"), [
    (file(row(1.0, batch=2)), (), "the files have no row in common"),
    (file(row(1.0)), ("eager",), "neither file has rows of 'eager'; they have fused")])
def test_files_without_a_common_row_are_an_error(new, providers, message):
    with pytest.raises(ValueError, match=message):
        compare.compare(file(row(1.0)), new, providers)


def test_what_no_longer_runs_counts_as_slower():
    broken = compare.change(row(10.0), Row("model", "resnet50", 8, "fp32", "cpu", "fused", status="wrong"))
    assert broken.verdict == "ok to wrong" and broken.broke and broken.slower_than(50.0)
    mended = compare.change(broken.row, row(10.0))
    assert mended.verdict == "wrong to ok" and not mended.slower_than(0.0)
    slower = compare.change(row(10.0), row(11.0))
    assert slower.slower_than(5.0) and not slower.slower_than(15.0)
    assert not compare.change(row(10.0, spread=0.5), row(11.0)).slower_than(5.0)
