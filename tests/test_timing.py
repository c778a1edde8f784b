"""Rounds in random order, paired ratios, percentiles, peak memory."""

import subprocess
import sys
import time

import pytest
import torch

from fused_resnet import timing


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(timing, "PAUSE", 0.0)


def measure(calls, **options):
    return timing.measure(calls, {name: list(range(4)) for name in calls}, **options)


def test_every_provider_is_timed_once_a_round_after_an_untimed_call():
    seen = {"a": [], "b": []}
    samples = measure({name: seen[name].append for name in seen}, max_rounds=5)
    assert {name: len(times) for name, times in samples.items()} == {"a": 5, "b": 5}
    assert seen["a"] == seen["b"] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]  # two calls a round, the batches rotate


def test_the_order_is_random_and_the_seed_decides_it():
    def order(seed):
        found = []
        measure({name: lambda _, name=name: found.append(name) for name in "abcd"}, max_rounds=6, seed=seed)
        return found[::2]

    rounds = [order(0)[i:i + 4] for i in range(0, 24, 4)]
    assert all(sorted(names) == list("abcd") for names in rounds) and len(set(map(tuple, rounds))) > 1
    assert order(0) == order(0) != order(1)


def test_the_budget_ends_the_rounds_but_not_before_the_third():
    calls = {"a": lambda _: time.sleep(0.01)}
    assert len(measure(calls, budget=0.0)["a"]) == timing.MIN_ROUNDS
    assert 3 <= len(measure(calls, budget=0.15, max_rounds=100)["a"]) < 12


def test_progress_ends_at_one():
    shares = []
    measure({"a": lambda _: None}, max_rounds=4, on_round=shares.append)
    assert shares == sorted(shares) and shares[-1] == 1.0


def test_percentiles_interpolate():
    assert timing.percentiles([5.0, 1.0, 2.0, 3.0, 4.0]) == pytest.approx((1.8, 3.0, 4.2))
    assert timing.percentiles([7.0]) == (7.0, 7.0, 7.0)


def test_ratios_are_paired_so_that_a_slow_round_cancels():
    assert timing.paired_ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == 2.0


def test_a_pool_exceeds_the_cache():
    cache = timing.cache_bytes()
    assert cache > 0
    assert timing.pool_size(cache, most=64) == 2 and timing.pool_size(1, most=64) == 64


def test_peak_memory_sees_what_was_freed_inside():
    program = """if True:
        import torch
        from fused_resnet import timing
        with timing.PeakMemory("cpu") as peak:
            held = torch.ones(64 << 18)
            del held
        print(peak.mb)"""
    # A process of its own: what earlier tests left in this one's heap may be freed at any time.
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    if printed == "None":
        pytest.skip("this kernel does not let a process reset its peak resident set")
    assert 60 < float(printed) < 200


def test_matmul_peak_is_positive():
    assert timing.matmul_peak(torch.float32) > 0


def test_copy_bandwidth_counts_both_directions(monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 0)
    monkeypatch.setattr(timing, "_best_rate", lambda call, work, device: call(None) is not None and work)
    assert timing.copy_bandwidth() == 2 << 27
