"""`_conv_pack` and `_conv_packed`: every method on every instruction set of the processor, beside the reference."""

import functools
import itertools

import pytest
import torch

from fused_resnet import numerics
from fused_resnet.testing import inputs
from fused_resnet.testing.cases import conv
from fused_resnet.testing.memory import BAND, Guards

pytestmark = pytest.mark.usefixtures("library")
OPS = torch.ops.fused_resnet
DTYPES = ("fp32", "bf16")
PIXELS = {"winograd2": 2, "winograd4": 4}
NAN = float("nan")

DIRECT = [
    conv(1, 1, 1, 1, n=1), conv(1, 3, (5, 4), 2, padding=0), conv(3, 17, (9, 7), residual=True, activation="relu6"),
    conv(17, 24, (4, 5), 1, bias=True, activation="identity"), conv(24, 48, (6, 5), 3, stride=(2, 1), residual=True),
    conv(48, 3, 5, 4, activation="silu", residual=True), conv(3, 24, 12, 7, stride=2, n=1),
    conv(16, 40, 9, 5, stride=(3, 2), padding=(0, 4), bias=True, norm=False, activation="hardswish"),
    conv(17, 17, (3, 8), 6, padding=(4, 3), n=1), conv(3, 5, 7, 2, dilation=(2, 3), padding=1, activation="hardswish"),
    conv(17, 48, (7, 5), (1, 3), padding=(0, 1), residual=True, activation="identity"),
    conv(48, 17, (5, 7), (3, 1), padding=(1, 0), stride=(1, 2)), conv(5, 6, 6, (1, 3), dilation=2, padding=(1, 2)),
    # Strips: several images, few channels and many, strides longer than the kernel, padding that covers it, odd pairs,
    # weights that stay at hand and others, several bands.
    conv(3, 40, (9, 11), 7, stride=2, n=3, residual=True), conv(1, 16, (12, 5), n=2, activation="identity"),
    conv(16, 33, (4, 6), (16, 2), padding=(15, 1)), conv(15, 20, (5, 9), (2, 5), stride=(5, 7), padding=(1, 4)),
    conv(2, 48, 30, 5, stride=(4, 3), bias=True), conv(5, 70, (3, 40), n=3, residual=True, activation="silu"),
    conv(21, 24, 5, residual=True), conv(24, 40, (5, 12), residual=True), conv(33, 70, (13, 10), (3, 5), padding=2),
    conv(48, 17, (25, 31), stride=2, n=3), conv(130, 80, (4, 11), residual=True), conv(200, 16, (12, 40), n=1),
    # Groups: one channel each, fewer filters than a vector, more than a panel, several panels that do not divide.
    conv(24, 24, 6, groups=24, residual=True), conv(17, 34, 5, groups=17, stride=2, activation="relu6"),
    conv(12, 20, 6, groups=4, dilation=2, n=1), conv(6, 102, (4, 3), groups=3, residual=True, activation="silu"),
    conv(48, 64, 5, 1, groups=2, bias=True, activation="identity"),
    # Depth: one chunk in place, a chunk and a rest, several steps that leave sums behind, odd pairs of bf16.
    conv(64, 33, (5, 9), 1, residual=True), conv(128, 48, 5, 1, residual=True, activation="silu"),
    conv(65, 50, 6, 1, stride=2, activation="identity"), conv(130, 24, (3, 5), residual=True),
    conv(7, 96, 2, 7, padding=3), conv(600, 17, 3, 1, n=1, residual=True), conv(70, 80, 4, 5, n=1, padding=(3, 1)),
    # Rows: more than one tile, more than one block, a single pixel; nothing at all.
    conv(4, 8, (37, 29), 1, n=3, residual=True), conv(16, 16, 1, n=3), conv(8, 40, 4, n=0, residual=True),
]
WINOGRAD = [
    conv(16, 16, 1, n=1), conv(16, 32, (2, 3), residual=True), conv(32, 16, (5, 9), bias=True),
    conv(48, 80, (8, 6), residual=True, activation="relu6"), conv(80, 48, (7, 13), n=1, padding=(0, 2)),
    conv(64, 64, 11, n=3, residual=True, activation="identity"), conv(16, 16, 5, n=0),
    conv(16, 48, 6, activation="silu", residual=True, norm=False),
    conv(16, 32, (9, 4), padding=(3, 0), activation="hardswish", n=1), conv(304, 32, (4, 5), n=1, residual=True),
    conv(128, 32, (6, 30), n=1, activation="silu"),
]
CASES = [("direct", problem) for problem in DIRECT] + [(method, problem) for method in PIXELS for problem in WINOGRAD]
BOTH = [("direct", conv(24, 40, (5, 7), residual=True)), ("winograd2", conv(32, 48, (5, 7), residual=True)),
        ("winograd4", conv(32, 48, (5, 7), residual=True))]


@functools.cache
def known(problem):
    """Operands, what stock makes of them, and the answer in fp64."""
    o = inputs.make(problem)
    return o, inputs.stock(problem, o), inputs.stock(problem, o, torch.float64)


def pack(p, o, method, isa=""):
    return OPS._conv_pack(o.weight, *o[2:7], o.eps, p.dilation, p.groups, method, isa)


def launch(p, y, x, packed, residual, method):
    OPS._conv_packed(y, x, packed, residual, (p.R, p.S), p.stride, p.padding, p.dilation, p.groups, p.activation,
                     method)
    return y


def image(p):
    return torch.full(p.output_shape, NAN, dtype=numerics.DTYPES[p.dtype]).to(memory_format=torch.channels_last)


def run(p, o, method, isa=""):
    return launch(p, image(p), o.x, pack(p, o, method, isa), o.residual, method)


def among_nan(t):
    """A copy of `t` (dense, any strides) with nothing but NaN around it: what is read there shows."""
    buffer = t.new_full((t.numel() + 2 * BAND,), NAN)
    return buffer.as_strided(t.shape, t.stride(), BAND).copy_(t)


def judge(p, result, method):
    _, stock, exact = known(p)
    bound = numerics.check(result, stock, exact, dtype=p.dtype, depth=p.depth)
    assert bound.ok, f"{method} {p.id}: {bound}"
    if method in PIXELS and p.dtype == "fp32":
        assert bound.error.max <= numerics.WINOGRAD * bound.error.ref_max, f"{method} {p.id}: {bound}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("method", "problem"), CASES, ids=[f"{method}-{problem.id}" for method, problem in CASES])
def test_results_are_right_and_memory_around_them_is_left_alone(method, problem, dtype, isa):
    """Out of place and into the residual; y is full of NaN before, x and the residual lie among NaN."""
    p = problem._replace(dtype=dtype)
    o, _, _ = known(p)
    guards, packed, residual = Guards(), pack(p, o, method, isa), o.residual
    before = packed.clone()
    y = guards.empty(image(p))
    x = among_nan(o.x)
    launch(p, y, x, packed, None if residual is None else among_nan(residual), method)
    judge(p, y, method)
    if residual is not None:
        own = guards.copy(residual)
        assert torch.equal(launch(p, own, x, packed, own, method), y), "into the residual the result differs"
    assert guards.touched() == 0 and torch.equal(x, o.x) and torch.equal(packed, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("method", "problem"), BOTH, ids=[method for method, _ in BOTH])
@pytest.mark.parametrize("activation", ["identity", "relu", "relu6", "silu", "hardswish"])
def test_activations_with_and_without_a_residual(method, problem, dtype, activation, isa):
    for residual in (False, True):
        p = problem._replace(dtype=dtype, activation=activation, residual=residual)
        judge(p, run(p, known(p)[0], method, isa), method)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("method", "problem"), BOTH, ids=[method for method, _ in BOTH])
def test_vectors_may_be_absent(method, problem, dtype, isa):
    """No gamma and beta; no norm; neither norm nor bias: what is absent multiplies with 1 or adds 0."""
    p = problem._replace(dtype=dtype, activation="identity")
    o = inputs.make(p)
    for change in ({"gamma": None}, {"beta": None}, {"gamma": None, "beta": None, "mean": None, "var": None}):
        few = o._replace(**change)
        bound = numerics.check(run(p, few, method, isa), inputs.stock(p, few), inputs.stock(p, few, torch.float64),
                               dtype=dtype, depth=p.depth)
        assert bound.ok, f"{sorted(change)}: {bound}"


SPECIAL = [conv(17, 24, (6, 5), residual=True), conv(128, 33, 5, 1, residual=True), conv(8, 8, 6, 3, groups=8),
           conv(24, 32, 7, 3, stride=2), conv(7, 40, (6, 9), 3, residual=True),
           conv(24, 40, (6, 12), residual=True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", SPECIAL, ids=lambda p: p.id)
def test_nan_and_inf_stand_exactly_where_stock_has_them(problem, dtype, isa):
    """Of the direct method; Winograd's spreads them over a tile, which is why the chooser looks for them first.

    Stock in fp64: in bf16 oneDNN multiplies Inf with its padding, which leaves NaN in other pixels.
    """
    for activation in ("identity", "relu", "relu6", "silu", "hardswish"):
        p = problem._replace(dtype=dtype, activation=activation)
        o = inputs.make(p)
        o.x[0, 3, 1, 2], o.x[1, 0, 4, 4], o.x[1, 5, 0, 0] = NAN, float("inf"), -float("inf")
        if p.residual:
            o.residual[0, 1, 3, 3], o.residual[1, 2, 2, 1] = NAN, -float("inf")
        found, stock = run(p, o, "direct", isa), inputs.stock(p, o, torch.float64)
        assert torch.isnan(stock).any() and torch.equal(torch.isnan(found), torch.isnan(stock))
        infinite = torch.isinf(stock)
        assert torch.equal(torch.isinf(found), infinite) and torch.equal(found[infinite].double(), stock[infinite])


@pytest.mark.parametrize("method", PIXELS)
def test_winograd_keeps_nan_in_every_pixel_that_stock_has_it_in(method, isa):
    p = conv(16, 32, (9, 10), activation="relu")
    o = inputs.make(p)
    o.x[0, 3, 4, 5] = NAN
    found, stock = run(p, o, method, isa), inputs.stock(p, o)
    assert bool((torch.isnan(found) | ~torch.isnan(stock)).all()) and bool(torch.isfinite(found[1]).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("method", "size", "channels"), [
    ("direct", (23, 19), 40), ("direct", (3, 4), 144), ("winograd2", (23, 19), 48), ("winograd4", (23, 19), 48),
    ("winograd4", (70, 50), 16), ("winograd2", (6, 7), 272), ("winograd4", (6, 7), 272)])
def test_results_do_not_depend_on_the_number_of_threads(method, size, channels, dtype):
    """Threads divide rows and panels, never a sum. Each count has its own tiles."""
    p = conv(channels, channels, size, residual=True)._replace(dtype=dtype)
    o, found, before = inputs.make(p), [], torch.get_num_threads()
    packed = pack(p, o, method)
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(launch(p, image(p), o.x, packed, o.residual, method))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_instruction_sets_agree_and_a_pack_serves_every_batch_size(isa):
    for (method, p), dtype in itertools.product(BOTH, DTYPES):
        p = p._replace(dtype=dtype)
        o = known(p)[0]
        packed, many = pack(p, o, method, isa), p._replace(N=5, H=9, W=4, residual=False)
        x = inputs.make(many).x
        whole = launch(many, image(many), x, packed, None, method)
        alone = many._replace(N=1)
        parts = [launch(alone, image(alone), x[i:i + 1], packed, None, method) for i in range(5)]
        assert torch.equal(whole, torch.cat(parts)), f"{method} {dtype}"


def test_images_may_start_at_any_element(isa):
    """A view into a larger tensor: bf16 at an odd multiple of two bytes."""
    for channels, dtype in ((128, "bf16"), (64, "fp32"), (24, "bf16")):
        p = conv(channels, 32, 5, 1, residual=True)._replace(dtype=dtype)
        o = known(p)[0]
        x, residual, y = (t.new_empty(t.numel() + 1).as_strided(t.shape, t.stride(), 1).copy_(t)
                          for t in (o.x, o.residual, image(p)))
        judge(p, launch(p, y, x, pack(p, o, "direct", isa), residual, "direct"), "direct")


def test_weights_of_any_strides_make_the_same_pack(isa):
    for method, p in BOTH:
        o = known(p)[0]
        strided = o.weight.to(memory_format=torch.channels_last), o.weight.flip(3).flip(3), o.weight[:, :, :, :].mT.mT
        assert all(torch.equal(pack(p, o._replace(weight=w), method, isa), pack(p, o, method, isa)) for w in strided)


REFUSED = {
    "method": (lambda p, o: {"method": "winograd4"}, "another convolution, method or processor"),
    "unknown method": (lambda p, o: {"method": "fft"}, "unknown method 'fft'"),
    "unknown activation": (lambda p, o: {"p": p._replace(activation="gelu")}, "unknown activation 'gelu'"),
    "kernel": (lambda p, o: {"p": p._replace(R=1, padding=(0, 1))}, "another convolution, method or processor"),
    "groups": (lambda p, o: {"p": p._replace(groups=8)}, "another convolution, method or processor"),
    "filters": (lambda p, o: {"packed": pack(p, inputs.make(p._replace(K=24)), "direct")}, "another convolution"),
    "channels": (lambda p, o: {"packed": pack(p, inputs.make(p._replace(C=8)), "direct")}, "another convolution"),
    "dtype of the weights": (lambda p, o: {"packed": pack(p, inputs.make(p._replace(dtype="bf16")), "direct")},
                             "another convolution"),
    "truncated": (lambda p, o: {"packed": pack(p, o, "direct")[:-4]}, "packed weights are not whole"),
    "too long": (lambda p, o: {"packed": torch.cat([pack(p, o, "direct"), torch.zeros(4, dtype=torch.uint8)])},
                 "packed weights are not whole"),
    "header alone": (lambda p, o: {"packed": pack(p, o, "direct")[:64]}, "what _conv_pack returned"),
    "empty": (lambda p, o: {"packed": torch.empty(0, dtype=torch.uint8)}, "what _conv_pack returned"),
    "not bytes": (lambda p, o: {"packed": pack(p, o, "direct").float()}, "what _conv_pack returned"),
    "strided": (lambda p, o: {"packed": pack(p, o, "direct").repeat_interleave(2)[::2]}, "what _conv_pack returned"),
    "noise": (lambda p, o: {"packed": torch.full_like(pack(p, o, "direct"), 255)}, "another convolution"),
    "shape of y": (lambda p, o: {"y": image(p)[:, :, :-1].contiguous(memory_format=torch.channels_last)},
                   "y must have the shape of the output"),
    "dtype of y": (lambda p, o: {"y": image(p).bfloat16()}, "y must have the shape of the output"),
    "layout of y": (lambda p, o: {"y": image(p).contiguous()}, "y must be dense in channels_last"),
    "layout of x": (lambda p, o: {"x": o.x.contiguous()}, "x must be dense in channels_last"),
    "dtype of x": (lambda p, o: {"x": o.x.double(), "y": image(p).double()}, "compute fp32 and bf16"),
    "shape of the residual": (lambda p, o: {"residual": image(p)[:1]}, "residual must have the shape of the output"),
    "broadcast residual": (lambda p, o: {"residual": torch.ones(p.N, p.K, 1, 1)}, "residual must have the shape"),
    "dtype of the residual": (lambda p, o: {"residual": image(p).bfloat16()}, "residual must have the shape"),
    "layout of the residual": (lambda p, o: {"residual": image(p).contiguous()}, "residual must be dense"),
    "stride": (lambda p, o: {"p": p._replace(stride=(0, 1))}, "must be positive"),
    "kernel of no pair": (lambda p, o: {"p": p._replace(stride=(1, 1, 1))}, "are pairs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name):
    p = conv(16, 32, (6, 5))
    o, (change, message) = inputs.make(p), REFUSED[name]
    given = {"p": p, "y": image(p), "x": o.x, "packed": pack(p, o, "direct"), "residual": None, "method": "direct"}
    before = given["y"].clone()
    with pytest.raises(RuntimeError, match=message):
        launch(**given | change(p, o))
    assert torch.equal(given["y"].isnan(), before.isnan())


def test_odd_pairs_of_another_dilation_are_refused():
    """Columns that touch are paired across the kernel's row, dilated ones each by itself."""
    p = conv(3, 8, 9)._replace(dtype="bf16")
    dilated = p._replace(dilation=(2, 2))
    with pytest.raises(RuntimeError, match="not whole"):
        launch(dilated, image(dilated), inputs.make(p).x, pack(p, inputs.make(p), "direct"), None, "direct")


@pytest.mark.parametrize(("change", "message"), [
    ({"weight": torch.ones(8, 4, 3)}, "weight must be"), ({"groups": 3}, "weight must be"),
    ({"groups": 0}, "weight must be"), ({"weight": torch.ones(8, 4, 3, 3).half()}, "fp32 and bf16"),
    ({"weight": torch.ones(8, 4, 3, 3).int()}, "fp32, fp64, bf16 or fp16"), ({"isa": "mmx"}, "has no 'mmx'"),
    ({"method": "winograd2"}, "multiples of"), ({"method": "winograd4", "weight": torch.ones(32, 32, 1, 3)}, "3x3"),
    ({"method": "winograd4", "weight": torch.ones(32, 16, 3, 3), "groups": 2}, "without groups"),
    ({"bias": torch.ones(7)}, "bias must be dense, of 8"), ({"gamma": torch.ones(16)[::2]}, "gamma must be dense"),
    ({"mean": torch.ones(8)}, "mean and var must be given together"), ({"dilation": (1,)}, "dilation"),
    ({"weight": torch.ones(8, 0, 3, 3)}, "weight must"), ({"weight": torch.ones(0, 4, 3, 3)}, "weight must"),
    ({"weight": torch.ones(8, 4, 0, 3)}, "weight must")], ids=str)
def test_what_cannot_be_packed_is_refused(change, message):
    given = {"weight": torch.ones(8, 4, 3, 3), "bias": None, "gamma": None, "beta": None, "mean": None, "var": None,
             "eps": 0.0, "dilation": (1, 1), "groups": 1, "method": "direct", "isa": ""} | change
    with pytest.raises(RuntimeError, match=message):
        OPS._conv_pack(*given.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_operators_pass_opcheck(dtype):
    for method, p in BOTH:
        p = p._replace(dtype=dtype)
        o, utils = known(p)[0], ("test_schema", "test_faketensor")
        torch.library.opcheck(OPS._conv_pack.default, (o.weight, *o[2:7], o.eps, p.dilation, p.groups, method),
                              test_utils=utils)
        torch.library.opcheck(OPS._conv_packed.default, (
            torch.zeros_like(image(p)), o.x, pack(p, o, method), o.residual, (p.R, p.S), p.stride, p.padding,
            p.dilation, p.groups, p.activation, method), test_utils=utils)
