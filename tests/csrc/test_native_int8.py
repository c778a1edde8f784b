"""The native library's launches on 8-bit values: every instruction set, and what they refuse."""

import math

import pytest
import torch
import torch.nn.functional as F

from fused_resnet import int8, native
from fused_resnet.fusing import int8_steps
from fused_resnet.ops import conv_int8

pytestmark = pytest.mark.skipif(native.missing("cpu") is not None, reason=str(native.missing("cpu")))
ISAS = ("avx512dot", "avx512", "avx2", "baseline")
ops = torch.ops.fused_resnet
FREE = (1.0, 0, 0, -math.inf, math.inf, False)  # residual's scale and zero, y's zero, limits, fp32


def packed(weight, dilation=1, zero=0, isa=""):
    ones = torch.ones(weight.shape[0])
    try:
        return ops._conv_int8_pack(weight, ones, 0 * ones, dilation, zero, isa)
    except RuntimeError as error:
        if "no instruction set" not in str(error):
            raise
        pytest.skip(f"this processor has no {isa}")


def image(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("c, k, size, kernel, stride, padding, dilation", [
    (64, 80, 9, 1, 1, 0, 1), (3, 40, 21, 7, 2, 3, 1), (24, 48, 7, 3, 1, 1, 2), (260, 33, 4, 3, 1, 1, 1),
    (5, 7, 6, (2, 3), (1, 2), (0, 2), 1), (1, 1, 1, 1, 1, 0, 1), (130, 17, 3, 3, 2, 2, 1),
    (16, 40, 13, (4, 3), (3, 5), (3, 1), 1), (24, 33, 5, 1, 1, 0, 1), (256, 64, 6, 1, 1, 0, 1),
    (50, 33, 14, 3, 1, 1, 1), (320, 64, 12, 3, 1, 1, 1), (32, 16, 23, 3, 2, 1, 1)])
def test_sums_of_every_instruction_set_are_exact(isa, c, k, size, kernel, stride, padding, dilation):
    pair = lambda v: v if isinstance(v, tuple) else (v, v)
    x, weight = image(3, c, size, size), torch.randint(-127, 128, (k, c, *pair(kernel)), dtype=torch.int8)
    x[0], weight[0] = 255, 127
    for zero in (0, 7):
        pack = packed(weight, dilation, zero, isa)
        y = ops._conv_int8(x, pack, None, (k, *pair(kernel)), pair(stride), pair(padding), pair(dilation), *FREE)
        exact = F.conv2d(x.double() - zero, weight.double(), None, stride, padding, dilation)
        assert torch.equal(y, exact.float()), (isa, zero)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [16, 21, 64])
@pytest.mark.parametrize("kind", ["uint8", "fp32"])
def test_results_round_clamp_and_saturate_alike(isa, k, kind):
    """The scale 1/256 makes ties, which go to the even number."""
    x, weight = image(2, 8, 6, 6), torch.randint(-127, 128, (k, 8, 1, 1), dtype=torch.int8)
    scale, shift = torch.full((k,), 1 / 256), torch.randint(-40, 40, (k,)).float()
    packed(weight, isa=isa)
    pack = ops._conv_int8_pack(weight, scale, shift, 1, 3, isa)
    residual = image(2, k, 6, 6)
    zero, residual = (128, residual) if kind == "uint8" else (0, residual.float())
    sums = F.conv2d(x.double() - 3, weight.double()) / 256 + shift.double()[:, None, None]
    for low, high in ((-math.inf, math.inf), (0.0, 50.0)):
        y = ops._conv_int8(x, pack, residual, (k, 1, 1), (1, 1), (0, 0), (1, 1), 0.5, zero, 100, low, high, True)
        z = (sums + (residual.double() - zero) * 0.5).clamp(low, high)
        assert torch.equal(y.double(), (torch.round(z) + 100).clamp(0, 255))


def test_results_do_not_depend_on_the_number_of_threads():
    x, weight = image(5, 32, 13, 13), torch.randint(-127, 128, (200, 32, 3, 3), dtype=torch.int8)
    call = lambda: ops._conv_int8(x, packed(weight), None, (200, 3, 3), (1, 1), (1, 1), (1, 1), *FREE)
    expected, threads = call(), torch.get_num_threads()
    try:
        for count in (2, 3):
            torch.set_num_threads(count)
            assert torch.equal(call(), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(2, 3, 9, 7), (1, 1, 1, 1), (0, 3, 4, 4), (1, 64, 4, 5)])
def test_quantising_is_that_of_python(shape):
    x = 3 * torch.randn(shape)
    if x.numel() > 60:
        x.flatten()[:5] = torch.tensor([math.inf, -math.inf, math.nan, 1e30, -1e30])
    for a in (int8.affine(-1.0, 2.0), int8.affine(0.0, 5.0), int8.affine(-300.0, 1.0)):
        result = int8_steps.quantize(x, a)
        assert torch.equal(result, int8.quantize(x, a)) and result.stride() == int8.quantize(x, a).stride()


@pytest.mark.parametrize("kernel, stride, padding", [((3, 3), (2, 2), (1, 1)), ((2, 4), (1, 3), (1, 2))])
def test_the_pool_is_that_of_python(kernel, stride, padding):
    x = image(2, 35, 17, 12)
    assert torch.equal(ops._max_pool(x, kernel, stride, padding), conv_int8.max_pool(x, kernel, stride, padding))


def test_mistakes_raise():
    x, weight = image(1, 8, 4, 4), torch.ones(16, 8, 3, 3, dtype=torch.int8)
    call = lambda x, pack, k=16, residual=None, dilation=(1, 1): ops._conv_int8(
        x, pack, residual, (k, 3, 3), (1, 1), (1, 1), dilation, *FREE)
    good = packed(weight)
    for wrong, what in (
            (lambda: call(x.float(), good), "uint8"), (lambda: call(x.contiguous(), good), "channels_last"),
            (lambda: call(x, good, 8), "for another"), (lambda: call(x, good, 16, None, (1, 2)), "for another"),
            (lambda: call(x, good[:60]), "not packed"), (lambda: call(x, good, 16, image(1, 8, 4, 4)), "residual"),
            (lambda: call(x, good, 16, image(1, 16, 4, 4).double()), "residual"),
            (lambda: packed(weight.float()), "int8"), (lambda: packed(weight, zero=256), "no uint8"),
            (lambda: ops._conv_int8_pack(weight, torch.ones(3), torch.ones(16), 1, 0), "of K"),
            (lambda: packed(torch.ones(1, 64001, 1, 1, dtype=torch.int8)), "32 bits"),
            (lambda: ops._quantize(torch.ones(1, 2, 3, 3), 1.0, -1), "channels_last|no uint8"),
            (lambda: ops._max_pool(x, (2, 2), (1, 1), (2, 2)), "half")):
        with pytest.raises(RuntimeError, match=what):
            wrong()


def test_fakes_have_the_shapes_of_results():
    x, weight = image(2, 8, 9, 7), torch.ones(24, 8, 3, 3, dtype=torch.int8)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
        for narrow in (False, True):
            y = ops._conv_int8(fake, fake, None, (24, 3, 3), (2, 2), (1, 1), (1, 1), 1.0, 0, 0, 0.0, 1.0, narrow)
            assert y.shape == (2, 24, 5, 4) and y.dtype is (torch.uint8 if narrow else torch.float32)
        assert ops._quantize(fake.float(), 1.0, 0).dtype is torch.uint8
        pooled = ops._max_pool(fake, (3, 3), (2, 2), (1, 1))
    real = ops._conv_int8(x, packed(weight), None, (24, 3, 3), (2, 2), (1, 1), (1, 1), *FREE)
    assert real.shape == y.shape and real.stride() == y.stride()
    assert pooled.shape == ops._max_pool(x, (3, 3), (2, 2), (1, 1)).shape
