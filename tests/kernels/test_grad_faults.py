"""Do the tests of conv_dgrad and conv_wgrad bite? Each deliberate bug below must fail the same small check."""

import functools

import pytest

from fused_resnet.kernels.triton.legal import Tile
from fused_resnet.testing.cases import conv
from tests.kernels.grads import agree_dgrad, agree_wgrad, make
from tests.kernels.test_faults import kernels
from tests.kernels.training import run

DGRAD, WGRAD, GRAD, NORM, SUMS = "conv_dgrad.py", "conv_wgrad.py", "grad.py", "norm.py", "bn_act_sums.py"
DGRAD_CHECK = [
    (conv(20, 24, (7, 6), n=1, stride=2), {"through": True, "residual": True, "mask": True}),
    (conv(16, 40, (5, 4), prologue="relu")._replace(dtype="fp16"), {"through": True}),
    (conv(16, 16, (8, 7), 3, n=1, groups=2, stride=(2, 3), dilation=(3, 2), padding=3, prologue="relu6"), {}),
]
WGRAD_CHECK = [
    (conv(24, 20, (5, 6), n=3, prologue="relu"), Tile("wgrad", 64, 32, 16, SPLIT_K=3), {"through": True}),
    (conv(16, 24, (6, 5), n=3, groups=2, stride=(2, 1), dilation=(1, 2), prologue="relu6"),
     Tile("wgrad", 16, 16, 16), {}),
]
# What is broken -> (file, what stands there, what is put there instead).
DGRAD_FAULTS = {
    "a class takes the taps of the next": (DGRAD, "parity == r * DIL % STRIDE", "parity == (r + 1) * DIL % STRIDE"),
    "the taps of a class follow without a gap": (DGRAD, "(r0 + i * PERIOD_H) * S", "(r0 + i) * S"),
    "du moves the wrong way": (DGRAD, "corner - (i * BACK_H", "corner + (i * BACK_H"),
    "the filter is flipped": (DGRAD, "tap = (r0 + i * PERIOD_H) * S + s0 + j * PERIOD_W",
                              "tap = R * S - 1 - ((r0 + i * PERIOD_H) * S + s0 + j * PERIOD_W)"),
    "columns take the stride of rows": (DGRAD, "parity_w, s0, STRIDE_W", "parity_w, s0, STRIDE_H"),
    "padding moves nothing": (DGRAD, "(first + PAD - parity) // STRIDE", "(first - parity) // STRIDE"),
    "pixels beyond the image are written": (DGRAD, "inside & (h < H) & (w < W)", "inside"),
    "the tail of the channels counts": (DGRAD, "KG % BLOCK_K != 0", "KG % BLOCK_K < 0"),
    "the mask is ignored": (DGRAD, "tl.where(bit_of(mask, at, ok), other, 0.0)", "other"),
    "the bits are in the other order": (NORM, "(offset % 8)", "(7 - offset % 8)"),
    "the residual is dropped": (DGRAD, "acc += other", "other"),
    "s0 is dropped": (NORM, "(dz.to(tl.float32) - s0)", "dz.to(tl.float32)"),
    "s1 is dropped": (NORM, "- (u.to(tl.float32) - mean) * slope", ""),
    "du beyond the image is what the norm makes of 0": (GRAD, "tl.where(ok, through, 0.0)", "through"),
    "every group reads the first": (DGRAD, "channel = group * KG + k + eu", "channel = k + eu"),
    "every group has the filters of the first": (DGRAD, "((group * KG + k + ew)", "((k + ew)"),
    "every group writes to the first": (DGRAD, "* C + group * CG + c", "* C + c"),
    "the activation is ignored": (DGRAD, "acc = tl.where(passes(z, PROLOGUE), acc, 0.0)", "acc = acc"),
    "ReLU6 passes above 6": (NORM, "stops |= z >= 6.0", "stops |= z >= 600.0"),
    "NaN does not pass": (NORM, "stops = z <= 0.0", "stops = (z > 0.0) == 0"),
    "beta is dropped": (DGRAD, " + vector(pre_beta, channel, channel_ok, 0.0)", ""),
    "sums are of what was not rounded": (DGRAD, "tl.where(ok, stored.to(tl.float32), 0.0)", "tl.where(ok, acc, 0.0)"),
    "sums are weighted with x": (DGRAD, "stored * xhat", "stored * tl.load(x + at, mask=ok, other=0.0)"),
    "the last tile is not summed": (SUMS, "(part < PARTS)", "(part < PARTS - 1)"),
}
WGRAD_FAULTS = {
    "padding is normalised": (WGRAD, "tl.where(ok, activate(affine(xs, ahead, pre_scale, pre_shift), PROLOGUE), 0.0)",
                              "activate(affine(xs, ahead, pre_scale, pre_shift), PROLOGUE)"),
    "the last split is dropped": (SUMS, "(part < PARTS)", "(part < PARTS - 1)"),
    "every split begins with the first pixel": (WGRAD, "first = split * SHARE", "first = split * 0"),
    "every split sums all that follows": (WGRAD, "count = tl.minimum(SHARE, tl.cdiv(M, BLOCK_K) - first)",
                                          "count = tl.cdiv(M, BLOCK_K) - first"),
    "a row's carry is lost": (WGRAD, "COUNT // Q % P + over.to(tl.int32)", "COUNT // Q % P"),
    "an image's carry is lost": (WGRAD, "COUNT // (P * Q) + over.to(tl.int32)", "COUNT // (P * Q)"),
    "columns are not dilated": (WGRAD, "s * DIL_W - PAD_W", "s - PAD_W"),
    "rows of the window take its columns' place": (WGRAD, "column // CG % S, column // (CG * S)",
                                                   "column // (CG * S), column // CG % S"),
    "rows take the stride of columns": (WGRAD, "(n * H + p * STRIDE_H)", "(n * H + p * STRIDE_W)"),
    "every group reads the first": (WGRAD, "* C + group * CG + c", "* C + c"),
    "every group has the norm of the first": (WGRAD, "pre_eps, group * CG + c,", "pre_eps, c,"),
    "every group writes to the first": (WGRAD, "(split * K + channel)", "(split * K + k)"),
    "what lies beyond the image counts": (WGRAD, "ok = ok & in_image(", "ok | in_image("),
    "s1 is dropped": (NORM, "- (u.to(tl.float32) - mean) * slope", ""),
    "gamma is dropped": (NORM, "scale = inverse * vector(gamma, channel, ok, 1.0)", "scale = inverse"),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def dgrad_check(forward, device):
    for i, (problem, form) in enumerate(DGRAD_CHECK):
        problem = problem._replace(device=device)
        operands = make(problem, seed=i, **form)
        if problem.prologue == "relu6":
            operands.x[0, 1, 2, 3] = float("nan")
            operands.pre_beta.add_(3.0)
        agree_dgrad(problem, operands, run(forward, problem, operands))


def wgrad_check(forward, device):
    for i, (problem, tile, form) in enumerate(WGRAD_CHECK):
        problem = problem._replace(device=device)
        operands = make(problem, seed=i, **form)
        agree_wgrad(problem, operands, run(functools.partial(forward, tile=tile), problem, operands))


CHECKS = {"conv_dgrad": (dgrad_check, DGRAD_FAULTS), "conv_wgrad": (wgrad_check, WGRAD_FAULTS)}


@pytest.mark.parametrize("family", CHECKS)
def test_the_kernels_as_they_are_pass(family, tmp_path, device):
    CHECKS[family][0](kernels(tmp_path, family=family), device)


@pytest.mark.parametrize(("family", "fault"), [(family, fault) for family, (_, faults) in CHECKS.items()
                                               for fault in faults])
def test_a_fault_is_noticed(family, fault, tmp_path, device):
    check, faults = CHECKS[family]
    forward = kernels(tmp_path, *faults[fault], family=family)
    with pytest.raises(AssertionError):
        check(forward, device)
