"""_bn_finalise: the CPU's operator and the CUDA kernels on the emulation, beside the statistics of the elements."""

import pytest
import torch

VECTORS = ("mean", "var", "inverse_std", "running_mean", "running_var")
EPS, MOMENTUM = 1e-3, 0.3
# fp32 results are rounded once from fp64 sums; parts were rounded before: 4 units in the last place.
TOLERANCE = {torch.float32: 4 * 2.0**-24, torch.float64: 1e-12}


def moments_of(values, pivot, span):
    """means - pivot and squares [tiles, K] of values [count, K], each in the dtype of values."""
    exact, tiles = values.double() - pivot.double(), range(0, len(values), span)
    means = torch.stack([exact[t:t + span].mean(0) for t in tiles])
    squares = torch.stack([(exact[t:t + span] - exact[t:t + span].mean(0)).square().sum(0) for t in tiles])
    return means.to(values.dtype), squares.to(values.dtype)


def operands(count, K, span, dtype=torch.float32, offset=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(count, K, generator=generator, dtype=torch.float64) + offset).to(dtype)
    pivot = torch.full((K,), offset, dtype=dtype)
    means, squares = moments_of(values, pivot, span)
    running = [torch.rand(K, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]
    return values, (means, squares, pivot, *running)


def expected(values, running_mean, running_var, weight):
    """Five vectors in fp64, running statistics by PyTorch's own batch norm."""
    wide, mean, var = values.double(), running_mean.double().clone(), running_var.double().clone()
    torch.nn.functional.batch_norm(wide, mean, var, training=True, momentum=weight)
    biased = wide.var(0, correction=0)
    return wide.mean(0), biased, 1 / (biased + EPS).sqrt(), mean, var


def native(_, given, count, span, momentum=MOMENTUM, batches=None):
    means, squares, pivot, mean, var = given
    mean, var = mean.clone(), var.clone()
    found = torch.ops.fused_resnet._bn_finalise(means, squares, count, span, pivot, mean, var, batches, momentum, EPS)
    return (*found, mean, var)


def emulated(emulation, given, count, span, momentum=MOMENTUM, batches=None, seed=0):
    means, squares, pivot, mean, var = given
    out = dict(zip(VECTORS, (*(torch.empty_like(mean) for _ in range(3)), mean.clone(), var.clone()), strict=True))
    tensors = {"means": means, "squares": squares, "pivot": pivot, "num_batches_tracked": batches, **out}
    addresses = {name: t.data_ptr() for name, t in tensors.items() if t is not None}
    emulation.finalise("fp64" if means.dtype == torch.float64 else "fp32", addresses, count, span, means.shape[1],
                       -1.0 if momentum is None else momentum, EPS, seed)
    return tuple(out.values())


def agree(found, exact):
    for name, mine, theirs in zip(VECTORS, found, exact, strict=True):
        slack = TOLERANCE[mine.dtype] * theirs.abs().max().item()
        assert (mine.double() - theirs).abs().max().item() <= slack, name


@pytest.fixture(params=[native, emulated], ids=["cpu", "cuda"])
def finalise(request, library, emulation):
    return lambda *args, **options: request.param(emulation, *args, **options)


SIZES = [(1000, 33, 128), (128, 8, 128), (5, 3, 2), (129, 1, 64), (1537, 40, 1), (2, 70, 7)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("count", "K", "span"), SIZES)
def test_statistics_are_those_of_the_elements(finalise, count, K, span, dtype):
    values, given = operands(count, K, span, dtype)
    agree(finalise(given, count, span), expected(values, *given[3:], MOMENTUM))


@pytest.mark.parametrize("momentum", [0.0, 1.0, None])
def test_momentum(finalise, momentum):
    """None is the cumulative average: the batch counts 1 / num_batches_tracked."""
    values, given = operands(300, 9, 64)
    found = finalise(given, 300, 64, momentum=momentum, batches=torch.tensor(4))
    agree(found, expected(values, *given[3:], 0.25 if momentum is None else momentum))
    if momentum == 0.0:
        assert torch.equal(found[3], given[3]) and torch.equal(found[4], given[4])


def test_a_mean_far_from_zero_costs_no_digits_of_the_variance(finalise):
    values, given = operands(700, 5, 128, offset=1000.0)
    found = finalise(given, 700, 128)
    torch.testing.assert_close(found[0].double(), values.double().mean(0), rtol=2.0**-22, atol=0)
    torch.testing.assert_close(found[1].double(), values.double().var(0, correction=0), rtol=1e-5, atol=0)


def test_one_element_has_no_unbiased_variance(finalise):
    values, given = operands(1, 4, 16)
    found = finalise(given, 1, 16)
    assert torch.equal(found[0], values[0]) and not found[1].any() and found[4].isnan().all()


def test_nan_stays_in_its_channel(finalise):
    _values, given = operands(40, 6, 8)
    given[0][2, 3] = float("nan")
    found = finalise(given, 40, 8)
    assert all(vector.isnan().tolist() == [k == 3 for k in range(6)] for vector in (found[0], found[1], found[4]))


def test_every_order_of_the_threads_gives_the_same_bits(emulation):
    _, given = operands(1537, 40, 1)
    found = [emulated(emulation, given, 1537, 1, seed=seed) for seed in range(3)]
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_vectors_may_be_absent(library):
    values, (means, squares, *_) = operands(64, 4, 16)
    mean, var, _ = torch.ops.fused_resnet._bn_finalise(means, squares, 64, 16, None, None, None, None, None, EPS)
    torch.testing.assert_close(mean, values.mean(0))
    torch.testing.assert_close(var, values.var(0, correction=0))


def test_the_operator_passes_opcheck(library):
    _, (means, squares, pivot, mean, var) = operands(64, 4, 16)
    for args in ((means, squares, 64, 16, pivot, mean, var, torch.tensor(3), None, EPS),
                 (means, squares, 64, 16, None, None, None, None, 0.1, EPS)):
        torch.library.opcheck(torch.ops.fused_resnet._bn_finalise.default, args,
                              test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("change", "message"), [
    ({2: 65}, "do not make 4 tiles"), ({2: 0}, "do not make"), ({8: None}, "needs num_batches_tracked"),
    ({8: 1.5}, "not between 0 and 1"), ({4: torch.zeros(3)}, "pivot must be dense"),
    ({5: torch.zeros(4).double()}, "running_mean must have the dtype"), ({7: torch.zeros(())}, "must be int64")])
def test_what_does_not_fit_is_refused(library, change, message):
    _, (means, squares, pivot, mean, var) = operands(64, 4, 16)
    args = {**dict(enumerate((means, squares, 64, 16, pivot, mean, var, None, 0.1, EPS))), **change}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fused_resnet._bn_finalise(*args.values())
