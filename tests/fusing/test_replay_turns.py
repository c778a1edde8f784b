"""Replayed calls and whatever comes in turns: inputs, modes, backends, threads, watchers, changes meanwhile."""

import pytest
import torch
import torch.nn.functional as F

import fused_resnet as fr
from fused_resnet import backends, tuner
from fused_resnet.fusing import plans, replay
from fused_resnet.kernels.cpu import conv_bn_act
from tests.fusing.helpers import agree
from tests.fusing.replays import Two, image, needs_library, played, step_by_step, stock_net, warm, warmed
from tests.fusing.test_replay import hidden_write, in_place, scale_weight, set_attribute, trained
from tests.nets import randomize

pytestmark = needs_library
__all__ = ["played"]  # a fixture that runs by itself


def test_two_inputs_that_were_one_tensor_when_recorded(played):
    """Which of them a launch read is said by its place in the plan."""
    stock = randomize(Two()).eval().requires_grad_(False)
    fused = fr.fuse(stock)
    a, b = (image(channels=16, seed=seed).contiguous(memory_format=torch.channels_last) for seed in (1, 2))
    warm(fused, a, a)
    for pair in ((a, b), (b, a), (b, b), (a, b)):
        torch.testing.assert_close(fused(*pair), stock(*pair), rtol=1e-4, atol=1e-4)
    del played[:]
    fused(a, b)
    assert played == [3]  # although two steps have one convolution


def test_what_a_step_in_front_gave_may_lie_otherwise(monkeypatch, played):
    """And may hold NaN, which Winograd's F(4x4, 3x3) would carry to other pixels."""
    monkeypatch.setattr(conv_bn_act, "_default", lambda problem: "winograd4")
    stock, fused = warmed("opaque")
    x = image(channels=16)
    kinds = [t for t in (x, 3 * x, x + 1, x - 1, 0.1 * x, x.flip(1))]
    hole = x.clone()
    hole[0, :, 5, 5] = 1000  # makes NaN in the middle
    assert {stock.whim(F.relu(stock.convs[0](t))).is_contiguous() for t in kinds} == {True, False}
    assert 0 < stock(hole).isnan().sum() < 2000
    for _ in range(4):
        for t in (*kinds, x, x, x, hole):  # the last one finds a recording that fits
            torch.testing.assert_close(fused(t), stock(t), rtol=1e-4, atol=1e-4, equal_nan=True)
    assert played and not plans(fused)[""].fallbacks


def test_a_change_while_a_call_is_recorded(monkeypatch, played):
    """As by another thread that loads weights: what was packed before is not taken for what is seen behind."""
    for change in (scale_weight, hidden_write, in_place("layer1.bn1", "running_mean"), trained,
                   set_attribute("layer1.bn1", "eps", 0.5)):
        stock = stock_net()
        fused, saw, seen = fr.fuse(stock), replay.Recorder.saw, []
        fused(image())

        def between(self, step, values, fused=fused, change=change, saw=saw, seen=seen):
            seen.append(step)
            if getattr(step, "conv", None) is fused.layer1.conv1:
                torch.manual_seed(5)
                change(fused)
            saw(self, step, values)

        with monkeypatch.context() as patch:
            patch.setattr(replay.Recorder, "saw", between)
            fused(image())
        assert len(seen) > 4
        torch.manual_seed(5)
        change(stock)
        for _ in range(4):
            agree(stock, fused, image())
        assert played


def test_many_kinds_in_turns(played):
    stock, fused = warmed()
    kinds = [image(size=size) for size in range(12, 12 + replay.MOST + 2)]
    for _ in range(2):
        for x in kinds:
            agree(stock, fused, x)
    assert len(plans(fused)[""].replays._known) <= replay.MOST
    for x in (kinds[0], image(3, 16), kinds[-1]):
        warm(fused, x)
        del played[:]
        agree(stock, fused, x)
        assert played


def test_sizes_layouts_and_views_in_turns(played):
    stock, fused = warmed()
    x = image(2, 24)
    last = x.contiguous(memory_format=torch.channels_last)
    wide = image(2, 48)
    for _ in range(4):
        for given in (x, last, wide[..., ::2, ::2], wide[..., :24, 3:27], x[:1], last[:1], x.flip(0)):
            agree(stock, fused, given)
    assert played


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_inputs_that_are_not_finite(played, value):
    stock, fused = warmed()
    x = image()
    x[0, 1, 5, 7] = value
    for given in (x, image(), x, image(seed=2)):
        agree(stock, fused, given)
    assert len(played) >= 3


def test_modes_in_turns(played):
    stock, fused = warmed()
    for _ in range(3):
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad, torch.inference_mode):
            with mode():
                result = agree(stock, fused, image())
                assert result.is_inference() is (mode is torch.inference_mode) and not result.requires_grad
        assert played
        del played[:]
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(2):
                assert fused(image()).dtype is torch.bfloat16
        assert not played
        for m in (stock, fused):
            m.requires_grad_(True)
        assert fused(image()).requires_grad
        with torch.no_grad():
            agree(stock, fused, image())
        for m in (stock, fused):
            m.requires_grad_(False)


def test_weights_of_inference_mode_are_not_replayed(played):
    with torch.inference_mode():
        stock = stock_net()
        fused = fr.fuse(stock)
        warm(fused, image())
        for m in (stock, fused):
            m.layer1.conv1.weight.mul_(1.5)
        agree(stock, fused, image())
    assert not played


def test_backends_in_turns(played):
    stock, fused = warmed()
    for _ in range(3):
        with backends.use("reference"):
            del played[:]
            agree(stock, fused, image())
            assert not played and {row.backend for row in fr.report(fused)} == {"reference"}
        agree(stock, fused, image())
        assert played and {row.backend for row in fr.report(fused)} == {"cpu"}


def test_numbers_of_threads_in_turns(played):
    stock, fused = warmed()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2) * 4:
            torch.set_num_threads(threads)
            agree(stock, fused, image(2))
            result = fused(image(2))
            with step_by_step():
                assert torch.equal(fused(image(2)), result)
        assert len(played) >= 4
    finally:
        torch.set_num_threads(before)


def test_nothing_is_recorded_while_kernels_are_checked(monkeypatch, played):
    stock, fused = warmed()
    monkeypatch.setenv("FUSED_RESNET_SELF_CHECK", "always")
    backends.reset()
    del played[:]
    known = dict(plans(fused)[""].replays._known)
    for _ in range(4):
        agree(stock, fused, image())
    assert not played and plans(fused)[""].replays._known == known
    monkeypatch.undo()


def test_a_first_call_that_is_checked_is_recorded_later(played):
    """Kernels look at each shape once: an image of another size is replayed all the same."""
    stock, fused = warmed()
    for size in (41, 43):
        warm(fused, image(size=size))
        del played[:]
        agree(stock, fused, image(size=size))
        assert played


def test_whoever_watches_launches_sees_them(played):
    _, fused = warmed()
    del played[:]
    with tuner.recorded() as seen:
        for _ in range(3):
            fused(image())
    assert not played and sum(seen.values()) >= 3 * len(plans(fused)[""].launches)
    fused(image())
    assert len(played) == 1
