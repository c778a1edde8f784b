"""What a warm model keeps alive, what other threads may do meanwhile, and what reports and profiles say of replays."""

import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet as fr
from fused_resnet import backends
from fused_resnet.fusing import plans
from fused_resnet.fusing.steps import Launch
from fused_resnet.kernels import packing
from tests.fusing.helpers import agree
from tests.fusing.replays import image, needs_library, played, step_by_step, stock_net, stretches, warm, warmed
from tests.fusing.test_replay import hidden_write
from tests.nets import randomize

pytestmark = needs_library
__all__ = ["played"]  # a fixture that runs by itself


def packs():
    """Weak references to all packed weights."""
    gc.collect()
    return [weakref.ref(entry[2]) for entry in packing._packs.values() if isinstance(entry[2], torch.Tensor)]


def test_packed_weights_die_with_a_warm_model():
    gc.collect()
    before = len(packs())
    _, fused = warmed()
    own = packs()[before:]
    assert len(own) >= 5 and stretches(fused)
    del fused
    gc.collect()
    assert not any(ref() is not None for ref in own)


def test_packed_weights_die_with_the_weights_they_were_made_from(played):
    gc.collect()
    before = len(packs())
    stock, fused = warmed()
    old, weights = packs()[before:], [weakref.ref(p) for p in fused.parameters()]
    assert len(old) >= 5
    state = stock_net().state_dict()
    for model in (stock, fused):
        model.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
        model.requires_grad_(False)
    agree(stock, fused, image())
    gc.collect()
    assert not any(ref() is not None for ref in (*old, *weights))
    warm(fused, image())
    assert played


def test_nothing_is_packed_twice(played):
    """Every kind of call plays the same packed weights."""
    _, fused = warmed()
    count = len(packs())
    for x in (image(seed=3), image(2), image(3), image(2, 28)):
        warm(fused, x)
    assert len(packs()) == count and max(played) >= len(plans(fused)[""].launches) - 1


class Long(nn.Module):
    """Behind a step that nobody records, a map that is read at the start of a long stretch only."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(5))

    def forward(self, x):
        x = F.relu(self.convs[0](x))
        x = x * torch.tanh(x)
        for conv in self.convs[1:]:
            x = F.relu(conv(x))
        return x


@pytest.mark.parametrize("make", [stock_net, Long], ids=["blocks", "chain"])
def test_recording_keeps_no_results_alive(monkeypatch, make):
    """As many results are alive at each step of a call that is recorded as where nothing is."""
    stock = randomize(make()).eval().requires_grad_(False)
    fused = fr.fuse(stock)
    x = image(channels=3 if make is stock_net else 16)
    fused(x)
    alive, made, run = [], [], Launch.run

    def count(self, values, tidy, finite):
        made.extend(weakref.ref(v) for v in values[-20:] if isinstance(v, torch.Tensor) and v is not x)
        alive.append(len({id(v) for ref in made if (v := ref()) is not None}))
        return run(self, values, tidy, finite)

    monkeypatch.setattr(Launch, "run", count)
    with step_by_step():
        fused(x)
    expected = list(alive)
    del alive[:], made[:]
    fused(x)
    assert alive == expected and stretches(fused)
    del made[:], alive[:]
    fused(x)
    assert len(alive) < len(expected)  # it was played


def test_two_threads_with_inputs_of_their_own(played):
    stock, fused = warmed()
    kinds = [image(seed=1), image(seed=2), image(2, seed=3), image(size=24, seed=4)]
    expected = [stock(x) for x in kinds]
    wrong, start = [], threading.Barrier(4)

    def work(i):
        torch.set_num_threads(1)
        start.wait()
        for turn in range(24):
            at = (i * (turn % 3 == 0) + turn) % len(kinds)
            if not torch.allclose(fused(kinds[at]), expected[at], rtol=1e-4, atol=1e-4):
                wrong.append((i, turn))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(played) > 20


def test_weights_that_another_thread_still_reads_are_not_played_again(played):
    """`refresh` drops them; whoever was in the middle of a call keeps them alive a while."""
    stock, fused = warmed()
    reading = [entry[2] for entry in packing._packs.values()]
    for model in (stock, fused):
        hidden_write(model)
    for _ in range(3):
        agree(stock, fused, image())
    assert reading and played


def test_a_watch_sees_what_the_cache_lost():
    a, b = torch.randn(4), torch.randn(4)
    made = [packing.packed("watched", (t,), lambda t=t: t * 2) for t in (a, b)]
    seen = packing.Watch(made)
    assert [v is w for v, w in zip(seen.values(), made, strict=True)] == [True, True]
    a.add_(1)
    assert seen.values() is not None  # the cache has not been asked
    packing.packed("watched", (a,), lambda: a * 2)
    assert seen.values() is None and packing.Watch([torch.ones(1)]).values() is None
    seen = packing.Watch(made[1:])
    backends.forget((b,))
    assert seen.values() is None and packing.Watch([]).values() == []


def test_an_address_that_was_given_back_is_another_one(played):
    """Identity, version and address may all be those of earlier values: conversions and loaders come back to them."""
    stock = stock_net()
    fused = fr.fuse(stock)
    for model in (stock, fused):
        memory = model.layer1.conv1.weight.numpy().copy()
        model.layer1.conv1.weight.data = torch.from_numpy(memory)
        warm(model, image())
        weight = model.layer1.conv1.weight
        before = weight.data_ptr(), weight._version
        weight.data = torch.ones(1)
        memory *= 1.5
        weight.data = torch.from_numpy(memory)
        assert (weight.data_ptr(), weight._version) == before
    assert played
    for _ in range(3):
        agree(stock, fused, image())


def rows(model):
    return [(row.name, row.pattern, row.ran_on, row.problem, row.flops, row.bytes, row.dtype)
            for row in fr.report(model)]


@pytest.mark.parametrize("make", [lambda m: fr.fuse(m), lambda m: fr.quantize(m, image())], ids=["fused", "quantised"])
def test_a_report_tells_of_the_call_that_was_replayed(played, make):
    model = make(stock_net("pool"))
    kinds, expected = [image(), image(2), image(size=28)], []
    for x in kinds:
        warm(model, x)
        with step_by_step():
            model(x)
        expected.append(rows(model))
    assert len({row[3] for found in expected for row in found}) > 2 * len(expected[0])
    for at in (0, 2, 1, 0):
        del played[:]
        model(kinds[at])
        assert played and rows(model) == expected[at]
        assert all(row[2].startswith("cpu") for row in rows(model))


def test_a_profile_shows_every_launch(played):
    stock, fused = warmed("pool")
    expected = fused(image())
    del played[:]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = fused(image())
    names = [event.name for event in profile.events()]
    labels = [name for name in names if name.startswith("fused_resnet::") and "::_" not in name]
    assert sorted(labels) == sorted(f"fused_resnet::{n}" for n, m in stock.named_modules() if isinstance(m, nn.Conv2d))
    assert not played and "fused_resnet::_play" not in names and torch.equal(result, expected)
    fused(image())
    assert played
