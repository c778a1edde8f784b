"""capture on a CUDA GPU: the bits of eager, batch by batch, after changes, on two streams, without growing memory."""

import copy
import gc
import threading

import pytest
import torch

import fused_resnet as fr
from fused_resnet import backends, graphs, numerics
from fused_resnet.kernels import packing
from tests.gpu.conftest import here
from tests.nets import randomize


def network(dtype=torch.float16):
    model = randomize(fr.models.cifar_resnet(8)).eval().to("cuda", dtype, memory_format=torch.channels_last)
    return fr.fuse(model, memory_format=torch.channels_last)


def rows(n, seed=0, dtype=torch.float16):
    x = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return x.to("cuda", dtype, memory_format=torch.channels_last)


@torch.no_grad()
def eager(model, x, size):
    """The bits that a bucket of `size` gives: rows do not depend on each other, kernels depend on the batch."""
    padded = torch.zeros(size, *x.shape[1:], dtype=x.dtype, device="cuda").contiguous(memory_format=torch.channels_last)
    padded[:len(x)] = x
    return model(padded)[:len(x)]


@pytest.mark.parametrize("backend", [None, "cudnn", "triton", "cuda", "reference"])
def test_every_batch_gives_the_bits_of_eager(backend):
    here(backend)
    model = network()
    with backends.use(backend), fr.capture(model, rows(8)) as call:
        for n in range(1, 10):
            x, pieces = rows(n, n), [8, 1] if n == 9 else [n]
            expected = torch.cat([eager(model, part, next(s for s in call.batches if s >= len(part)))
                                  for part in x.split(pieces)])
            assert torch.equal(call(x), expected), n


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stock_model(dtype):
    model = fr.unfuse(network(dtype))
    call = fr.capture(model, rows(4, dtype=dtype))
    for n in range(1, 5):
        assert torch.equal(call(rows(n, n, dtype)), eager(model, rows(n, n, dtype), next(
            s for s in call.batches if s >= n)))


def test_after_load_state_dict_a_step_and_a_move():
    model = network(torch.float32)
    call, x = fr.capture(model, rows(4, dtype=torch.float32)), rows(4, 1, torch.float32)

    def agrees():
        assert torch.equal(call(x), eager(model, x, 4))

    agrees()
    model.load_state_dict(randomize(copy.deepcopy(model), seed=1).state_dict())
    agrees()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)
    agrees()
    model.cpu()
    torch.cuda.empty_cache()
    model.to("cuda")
    agrees()
    model.conv1.weight.data.mul_(2)
    fr.refresh(model)
    agrees()


def test_two_streams_and_threads():
    model = network()
    call, wrong = fr.capture(model, rows(4)), []
    expected = {n: eager(model, rows(n, n), 4) for n in (3, 4)}
    torch.cuda.synchronize()

    def work(n):
        with torch.cuda.stream(torch.cuda.Stream()):
            x = rows(n, n)
            results = [call(x) for _ in range(50)]
            torch.cuda.current_stream().synchronize()
            wrong.extend(r for r in results if not torch.equal(r, expected[n]))

    threads = [threading.Thread(target=work, args=(n,)) for n in (3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_models_captured_by_two_threads_at_once():
    models, results = [network(), network(torch.float32)], {}

    def work(i):
        dtype = next(models[i].parameters()).dtype
        with fr.capture(models[i], rows(8, dtype=dtype), batches=[1, 2, 4, 8]) as call:
            results[i] = call(rows(5, i, dtype)), eager(models[i], rows(5, i, dtype), 8)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(*results[i]) for i in range(2))


def test_a_hundred_replays_allocate_nothing_that_stays():
    call, x = fr.capture(network(), rows(8)), rows(8)
    call(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(100):
        call(x)
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
    allocations = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(100):
        call(x, copy=False)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocations


def test_close_gives_the_memory_back():
    def allocated():
        torch.cuda.synchronize()
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()  # cuBLAS keeps one for each stream
        return torch.cuda.memory_allocated()

    model, x = network(), rows(64)
    with torch.no_grad():
        model(x)
    before = allocated()
    with fr.capture(model, x) as call:
        call(x)
        assert torch.cuda.memory_allocated() > before
    assert allocated() == before


def test_nothing_is_checked_or_packed_while_recording(monkeypatch):
    """With an empty cache all of that happens in the warm-up runs."""
    def outside(function):
        def guarded(*args, **kwargs):
            assert not torch.cuda.is_current_stream_capturing()
            return function(*args, **kwargs)

        return guarded

    backends.cache().clear()
    backends.reset()
    monkeypatch.setattr(numerics, "check", outside(numerics.check))
    kept = packing._packs.copy()
    call = fr.capture(network(), rows(4))
    fresh = [value for key, (_, _, value) in packing._packs.items() if key not in kept]
    assert torch.isfinite(call(rows(4))).all()
    low, high = zip(*[(s["address"], s["address"] + s["total_size"]) for s in torch.cuda.memory_snapshot()
                      if tuple(s["segment_pool_id"]) == tuple(call._recorder.pool)], strict=True)
    for value in fresh:
        for t in value if isinstance(value, tuple) else (value,):
            assert t is None or not any(a <= t.data_ptr() < b for a, b in zip(low, high, strict=True))


def test_inside_another_graph_the_model_becomes_part_of_it():
    model, x = network(), rows(4)
    call = fr.capture(model, x)
    expected = call(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call(x)
    result.zero_()
    graph.replay()
    assert torch.equal(result, expected)


def test_buckets_of_a_plain_callable():
    model, x = network(), rows(4)
    bucket = graphs.Bucket(model, (x,), graphs.CudaRecorder(x.device))
    assert torch.equal(bucket.run((rows(4, 2),), copy=False), eager(model, rows(4, 2), 4))
