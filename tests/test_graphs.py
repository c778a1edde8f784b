"""capture: buckets, static buffers and re-recording, with graphs that replay on a CPU."""

import copy
import threading

import pytest
import torch
from torch import nn

import fused_resnet as fr
from fused_resnet import backends, graphs
from fused_resnet.kernels import packing
from tests.nets import randomize


class Fake:
    """Replays by running the call again, and writes into the same output tensors, as a CUDA graph does."""

    def __init__(self):
        self.recordings = self.warmups = self.drained = self.followed = 0
        self.seen = []  # the static inputs at each replay

    def record(self, call, warmup):
        for _ in range(warmup):
            call()
        self.warmups, self.recordings = self.warmups + warmup, self.recordings + 1
        static = call()
        leaves = torch.utils._pytree.tree_leaves(static)

        def replay():
            for buffer, value in zip(leaves, torch.utils._pytree.tree_leaves(call()), strict=True):
                if isinstance(buffer, torch.Tensor):
                    buffer.copy_(value)

        return static, replay

    def follow(self):
        self.followed += 1

    def drain(self):
        self.drained += 1


def captured(model, sample, batches=None, warmup=1):
    fake = Fake()
    return graphs.Captured(model, sample, batches, warmup, fake), fake


class Net(nn.Module):
    """Rows do not depend on each other; keeps the batches that it was called with."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.batches = []

    def forward(self, x):
        self.batches.append(x.clone())
        return self.bn(self.conv(x)).relu().mean((2, 3))


@pytest.fixture
def net():
    return randomize(Net()).eval()


def rows(n, seed=0):
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def eager(model, *x):
    with torch.no_grad():
        return model(*x)


def test_any_batch_gives_what_the_model_gives(net):
    call, fake = captured(net, rows(6))
    assert call.batches == (1, 2, 4, 6) and tuple(call.buckets) == (6,)
    for n in (1, 2, 3, 4, 5, 6, 7, 12, 13, 20):
        assert torch.allclose(call(rows(n, n)), eager(net, rows(n, n)), atol=1e-6), n
    assert tuple(call.buckets) == (1, 2, 4, 6) and fake.recordings == 4 and fake.warmups == 4


def test_the_smallest_bucket_runs_with_zeros_behind_the_rows(net):
    call, _ = captured(net, rows(8), batches=[8, 4, 4])
    assert call.batches == (4, 8) and tuple(call.buckets) == (4, 8)
    for n, size in ((8, 8), (5, 8), (7, 8), (6, 8), (3, 4), (4, 4), (1, 4), (2, 4)):
        call(rows(n, n))
        seen = net.batches[-1]
        assert seen.shape[0] == size and torch.equal(seen[:n], rows(n, n)) and not seen[n:].any(), n


def test_batches_beyond_the_largest_bucket_run_in_pieces(net):
    call, _ = captured(net, rows(4), batches=[2, 4])
    before = len(net.batches)
    result = call(rows(11), copy=False)
    assert [b.shape[0] for b in net.batches[before:]] == [4, 4, 4]  # the last holds three rows and a zero
    assert torch.equal(torch.cat([b for b in net.batches[before:]])[:11], rows(11))
    again = result.clone()
    call(rows(4, 1))
    assert torch.equal(result, again) and torch.allclose(result, eager(net, rows(11)), atol=1e-6)


def test_results_are_copies_unless_views_are_asked_for(net):
    call, _ = captured(net, rows(4))
    for n in (3, 4):
        kept, view = call(rows(n)), call(rows(n), copy=False)
        expected = kept.clone()
        assert torch.equal(view, kept) and view.data_ptr() == call.buckets[4].outputs[0].data_ptr()
        call(rows(n, 9))
        assert torch.equal(kept, expected) and not torch.equal(view, expected)


def test_the_callers_input_is_only_read(net):
    class Clips(nn.Module):
        def forward(self, x):
            return x.clamp_(0).sum((1, 2, 3))

    call, _ = captured(Clips().eval(), rows(2))
    x = rows(2, 3)
    assert torch.equal(call(x), rows(2, 3).clamp(0).sum((1, 2, 3))) and torch.equal(x, rows(2, 3))


def change_in_place(net):
    with torch.no_grad():
        net.conv.weight.mul_(2)


def change_by_loading(net):
    net.load_state_dict({k: v * 2 if v.is_floating_point() else v for k, v in net.state_dict().items()})


def change_by_assigning(net):
    net.load_state_dict({k: (v * 2 if v.is_floating_point() else v).clone() for k, v in net.state_dict().items()},
                        assign=True)


def change_by_a_step(net):
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    net(rows(2)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def change_by_training(net):
    net.train()
    eager(net, rows(4) * 3 + 1)
    net.eval()


def change_storage(net):
    net.conv.weight.data = net.conv.weight.data * 2


def change_module(net):
    net.conv = nn.Conv2d(3, 4, 3).eval()


@pytest.mark.parametrize("change", [change_in_place, change_by_loading, change_by_assigning, change_by_a_step,
                                    change_by_training, change_storage, change_module])
@pytest.mark.parametrize("fused", [False, True])
def test_a_changed_model_is_recorded_afresh(net, change, fused):
    model = fr.fuse(net, inplace=True) if fused else net
    call, fake = captured(model, rows(4))
    call(rows(4))
    call(rows(3))
    assert fake.recordings == 1
    before = call(rows(4, 1))
    change(net)
    after = call(rows(4, 1))
    assert torch.allclose(after, eager(net, rows(4, 1)), atol=1e-6) and not torch.allclose(after, before, atol=1e-3)
    assert fake.recordings == 2 and fake.drained == 1
    call(rows(4))
    assert fake.recordings == 2


def test_a_moved_model_is_recorded_afresh(net):
    call, fake = captured(net, rows(2))
    net.to(torch.float64)
    net.to(torch.float32)
    call(rows(2))
    assert fake.recordings == 2


def test_another_autocast_or_backend_is_recorded_afresh(net):
    call, fake = captured(net, rows(2))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(rows(2)), eager(net, rows(2))) and fake.recordings == 2
    call(rows(2))
    assert fake.recordings == 3
    with backends.use("reference"):
        call(rows(2))
    assert fake.recordings == 4


def test_refresh_and_memory_of_packed_weights():
    block = randomize(fr.nn.BasicBlock(4, 4)).eval().to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    call, fake = captured(block, x)
    held = call.buckets[2]._held
    assert held.current() and len(held._values) == 2
    call(x)
    assert fake.recordings == 1
    assert fr.refresh(block) == 2 and not held.current()
    block.conv1.weight.data.zero_()  # no new version: only refresh says so
    assert torch.equal(call(x), eager(block, x)) and fake.recordings == 2
    fr.refresh(copy.deepcopy(block))
    call(x)
    assert fake.recordings == 2


def test_a_graph_keeps_the_memory_that_it_reads(net):
    call, _ = captured(net, rows(2))
    (_, snapshot, _) = call._recorded[2]
    before = {t.data_ptr() for t in net.state_dict().values()}
    net.to(torch.float64)
    assert before == {t.data_ptr() for t in snapshot._alive}


def test_models_loaded_under_inference_mode():
    with torch.inference_mode():
        net = randomize(Net()).eval()
        call, fake = captured(net, rows(2))
        inside = call(rows(2))
    assert torch.equal(call(rows(2)), inside) and fake.recordings == 1
    assert not call.buckets[2].inputs[0].is_inference()


class Claims(torch.Tensor):
    is_cuda = True


def test_nothing_is_packed_for_good_while_a_graph_is_recorded(monkeypatch):
    weight = torch.randn(3).as_subclass(Claims)
    recording = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: recording)
    first = packing.packed("test", (weight,), lambda: weight * 2)
    assert packing.packed("test", (weight,), lambda: weight * 2) is not first and not packing.drop([weight])
    recording = False
    kept = packing.packed("test", (weight,), lambda: weight * 2)
    recording = True
    assert packing.packed("test", (weight,), lambda: weight * 2) is kept


def test_inside_another_recording_the_model_itself_runs(net, monkeypatch):
    call, fake = captured(net, rows(2))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    call(rows(2).as_subclass(Claims))
    assert fake.followed == 1


class Branches(nn.Module):
    def forward(self, x, y):
        return {"sum": x + y, "rest": (x * 2, [y, None], 7)}


def test_several_inputs_and_structured_results():
    call, _ = captured(Branches().eval(), (torch.ones(4, 2), torch.ones(4, 2)))
    for n in (3, 4, 9):
        x, y = torch.randn(n, 2), torch.randn(n, 2)
        result, expected = call(x, y), Branches()(x, y)
        assert torch.utils._pytree.tree_structure(result) == torch.utils._pytree.tree_structure(expected)
        torch.testing.assert_close(result, expected)
    with pytest.raises(ValueError, match="with one N, got"):
        call(torch.ones(4, 2), torch.ones(3, 2))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_all_buckets_have_the_memory_format_of_the_sample(layout):
    model = nn.Conv2d(3, 4, 1).eval()
    call, _ = captured(model, rows(8).to(memory_format=layout))
    other = {torch.channels_last: torch.contiguous_format, torch.contiguous_format: torch.channels_last}[layout]
    for n in (3, 2, 5, 8, 9, 17):
        x = rows(n).to(memory_format=layout)
        result = call(x.to(memory_format=other))
        assert result.stride() == eager(model, x).stride() and torch.allclose(result, eager(model, x), atol=1e-6), n


class Mixes(nn.Module):
    def forward(self, x):
        return x - x.mean(0, keepdim=True)


class Scalar(nn.Module):
    def forward(self, x):
        return x, x.sum()


@pytest.mark.parametrize(("model", "why"), [
    (Mixes(), "mixes the rows"), (Scalar(), "whose first dimension is not the batch"),
    (nn.BatchNorm2d(3, track_running_stats=False), "mixes the rows")])
def test_a_model_that_mixes_rows_runs_in_whole_buckets_only(model, why):
    model = model.eval()
    call, _ = captured(model, rows(4), batches=[4, 2])
    for n in (2, 4):
        torch.testing.assert_close(call(rows(n, n)), model(rows(n, n)))
    for n in (1, 3, 8):
        with pytest.raises(ValueError, match=f"a batch of {min(n, 4)} cannot run as a part of .*{why}"):
            call(rows(n))


@pytest.mark.parametrize(("inputs", "message"), [
    ((torch.zeros(2, 3, 6, 7),), r"expected inputs of \('N', 3, 6, 6\) with one N, got \(2, 3, 6, 7\)"),
    ((torch.zeros(3, 6, 6),), r"got \(3, 6, 6\)"), ((torch.zeros(()),), r"got \(\)"),
    ((torch.zeros(2, 3, 6, 6, dtype=torch.float64),), "got torch.float64 on cpu"),
    ((torch.zeros(2, 3, 6, 6, device="meta"),), "got torch.float32 on meta"),
    (("x",), "expected a tensor, got a str"), ((), "captured with 1 inputs, got 0"),
    ((torch.zeros(2, 3, 6, 6), torch.zeros(2)), "captured with 1 inputs, got 2"),
    ((torch.zeros(2, 3, 6, 6, requires_grad=True),), "requires a gradient")])
@pytest.mark.parametrize("fake", [False, True])
def test_inputs_that_do_not_fit_are_refused(net, inputs, message, fake):
    call = captured(net, rows(2))[0] if fake else fr.capture(net, rows(2))
    with pytest.raises(ValueError, match=message):
        call(*inputs)


@pytest.mark.parametrize("fake", [False, True])
def test_training_mode_is_refused(net, fake):
    call = captured(net, rows(2))[0] if fake else fr.capture(net, rows(2))
    net.bn.train()
    with pytest.raises(ValueError, match="training mode"):
        call(rows(2))
    with pytest.raises(ValueError, match="training mode"):
        fr.capture(net, rows(2))


@pytest.mark.parametrize(("arguments", "message"), [
    ({"sample": torch.zeros(0, 3)}, r"must be tensors with rows, got \(0, 3\)"), ({"sample": 3}, "got int"),
    ({"sample": ()}, "got NoneType"), ({"sample": torch.zeros(2, 3), "batches": []}, r"got \[\]"),
    ({"sample": torch.zeros(2, 3), "batches": [2, 0]}, r"got \[2, 0\]"),
    ({"sample": torch.zeros(2, 3), "warmup": 0}, "got 0"),
    ({"sample": torch.zeros(2, 3), "model": len}, "got builtin_function_or_method")])
def test_arguments_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fr.capture(**{"model": nn.Identity().eval(), **arguments})


def test_results_of_unknown_types_are_refused():
    class Odd(nn.Module):
        def forward(self, x):
            return {x}

    with pytest.raises(ValueError, match="returns a set"):
        captured(Odd().eval(), rows(2))


def test_an_empty_batch_and_no_gradients(net):
    call, _ = captured(net, rows(2))
    assert call(rows(0)).shape == (0, 4) and not call(rows(2)).requires_grad and not call(rows(0)).requires_grad


def test_threads_share_the_static_buffers(net):
    call, _ = captured(net, rows(4))
    expected = {n: eager(net, rows(n, n)) for n in range(1, 9)}
    wrong, start = [], threading.Barrier(4)

    def work(offset):
        start.wait()
        for i in range(24):
            n = (i + offset) % 8 + 1
            if not torch.allclose(call(rows(n, n)), expected[n], atol=1e-6):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(3 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_close_frees_the_graphs(net):
    with captured(net, rows(2))[0] as call:
        assert repr(call) == ("Captured(Net, torch.float32 ('N', 3, 6, 6) on cpu, batches=(1, 2), recorded=(2,))")
        view = call(rows(2), copy=False)
    assert not call.buckets and "closed" in repr(call) and view.shape == (2, 4)
    with pytest.raises(ValueError, match="closed"):
        call(rows(2))


def test_without_a_gpu_the_model_itself_runs():
    model = randomize(fr.models.cifar_resnet(8)).eval()
    fused, x = fr.fuse(model), torch.randn(3, 3, 16, 16)
    with fr.capture(fused, x[:2]) as call:
        assert call.batches == (1, 2) and not call.buckets and "without graphs" in repr(call)
        for n in (1, 2, 3):
            assert torch.equal(call(x[:n]), eager(fused, x[:n])) and not call(x[:n]).requires_grad


def test_a_fused_network_in_buckets():
    model = randomize(fr.models.cifar_resnet(8)).eval()
    fused = fr.fuse(model)
    call, _ = captured(fused, torch.randn(4, 3, 16, 16))
    for n in range(1, 10):
        x = torch.randn(n, 3, 16, 16)
        torch.testing.assert_close(call(x), eager(fused, x), rtol=1e-5, atol=1e-5)
