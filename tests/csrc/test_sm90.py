"""The sm_90a convolution's arithmetic: what its tensor maps describe to TMA, shared memory, limits, the rule."""

import itertools
import random

import numpy as np
import pytest

from fused_resnet import native
from fused_resnet.kernels.cuda import conv_bn_act as caller
from fused_resnet.problem import ConvProblem

SM90 = [i for i, name in enumerate(native.CONV_TILES) if name.startswith("sm90")]
LIMIT = 232_448  # bytes of shared memory that a block may have on sm_90


def sizes(p):
    return [p.N, p.H, p.W, p.C, p.K, p.R, p.S, p.P, p.Q, *p.stride, *p.padding, *p.dilation, p.groups]


def conv(N=1, H=8, W=8, C=64, K=64, R=1, S=1, stride=(1, 1), padding=(0, 0), dilation=(1, 1), **more):
    return ConvProblem("cpu", "bf16", N, H, W, C, K, R, S, stride, padding, dilation, **more)


def patches_of(x, p):
    """[pixels, R, S, C] of x [N, H, W, C], from the definition of a convolution."""
    (ph, pw), (sh, sw), (dh, dw) = p.padding, p.stride, p.dilation
    padded = np.pad(x, ((0, 0), (ph, ph), (pw, pw), (0, 0)))
    out = np.zeros((p.N, p.P, p.Q, p.R, p.S, p.C), x.dtype)
    for r, s in itertools.product(range(p.R), range(p.S)):
        rows = padded[:, r * dh:r * dh + (p.P - 1) * sh + 1:sh]
        out[:, :, :, r, s] = rows[:, :, s * dw:s * dw + (p.Q - 1) * sw + 1:sw]
    return out.reshape(-1, p.R, p.S, p.C)


def im2col(x, plan, c, start, offsets):
    """What TMA copies in im2col mode, as the driver's documentation has it, of x [N, H, W, C].

    Windows start within a box, from size-independent `lower` to the last element plus `upper`, w first; each is
    `box[1]` pixels of `box[0]` channels, and what lies outside of the tensor is 0.
    """
    _, W, H, N = plan["sizes"]
    (w, h, n), (right, down), out = start, offsets, np.zeros((plan["box"][1], plan["box"][0]), x.dtype)
    for pixel in out:
        at_w, at_h = w + right, h + down
        if 0 <= n < N and 0 <= at_h < H and 0 <= at_w < W:
            some = x[n, at_h, at_w, c:c + plan["box"][0]]
            pixel[:len(some)] = some
        w += plan["steps"][1]
        if w > W - 1 + plan["upper"][0]:
            w, h = plan["lower"][0], h + plan["steps"][2]
            if h > H - 1 + plan["upper"][1]:
                h, n = plan["lower"][1], n + 1
    return out


def legal(plan):
    """The driver's bounds on a tensor map."""
    rank = len(plan["sizes"])
    assert all(0 < size <= 2**32 for size in plan["sizes"])
    assert all(stride % 16 == 0 and stride < 2**40 for stride in plan["strides"])
    assert plan["strides"] == [2 * int(np.prod(plan["sizes"][:i])) for i in range(1, rank)]
    assert all(1 <= step <= 8 for step in plan["steps"]) and plan["box"][0] * 2 <= 128
    assert all(size <= 256 for size in plan["box"])
    assert all(-128 <= corner <= 127 for corner in plan["lower"] + plan["upper"])


def check_patches(sm90, p, pixels):
    plan = sm90.patches_plan(sizes(p), pixels)
    legal(plan)
    x = np.arange(1, 1 + p.N * p.H * p.W * p.C, dtype=np.float32).reshape(p.N, p.H, p.W, p.C)
    expected, total = patches_of(x, p), p.N * p.P * p.Q
    for first in range(0, 2 * pixels * -(-total // (2 * pixels)), pixels):  # a cluster's last tile may be empty
        n, i, j = sm90.near_pixel_of(first, p.P, p.Q)
        start = (j * p.stride[1] - p.padding[1], i * p.stride[0] - p.padding[0], n)
        for r, s, c in itertools.product(range(p.R), range(p.S), range(0, p.C, 64)):
            found = im2col(x, plan, c, start, (s * p.dilation[1], r * p.dilation[0]))
            here = expected[first:first + pixels, r, s, c:c + 64]
            assert np.array_equal(found[:len(here), :here.shape[1]], here), (p.id, first, r, s, c)
            assert not found[len(here):].any() and not found[:, here.shape[1]:].any()


WINDOWS = [(1, 1), (3, 3), (2, 5), (7, 1)]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_the_patches_that_tma_copies_are_those_of_the_convolution(sm90, window):
    """Every padding up to beyond the window, strides and dilations, alike and unlike for rows and columns."""
    R, S = window
    count = 0
    for stride, dilation in itertools.product([(1, 1), (2, 1), (3, 5), (8, 2)], [(1, 1), (2, 3)]):
        for padding in {(0, 0), (R // 2, S // 2), (R, 0), (1, S + 1)}:
            p = conv(2, 9, 7, 8, 8, R, S, stride, padding, dilation)
            if min(p.P, p.Q) > 0:
                check_patches(sm90, p, 128)
                count += 1
    assert count >= 8


def test_random_patches(sm90):
    rng, count = random.Random(0), 0
    while count < 60:
        pair = lambda low, high: (rng.randint(low, high), rng.randint(low, high))
        p = conv(rng.randint(1, 3), *pair(1, 12), rng.choice((8, 64, 72)), 8, *pair(1, 4), pair(1, 8), pair(0, 5),
                 pair(1, 4))
        if min(p.P, p.Q) > 0:
            assert sm90.refusal(sizes(p)) is None
            check_patches(sm90, p, rng.choice((128, 256)))
            count += 1


def test_weights_and_outputs_are_described(sm90):
    p = conv(3, 9, 7, 72, 136, 3, 5, padding=(1, 2))
    weight, y = sm90.weight_plan(sizes(p), 64), sm90.output_plan(sizes(p))
    legal(weight)
    legal(y)
    assert weight["sizes"] == [72, 15, 136] and weight["box"] == [64, 1, 64]
    assert y["sizes"] == [136, 3 * p.P * p.Q] and y["box"] == [64, 128]


def test_the_swizzle_is_that_of_128_bytes(sm90):
    """Bits 4-6 of an offset are mixed with bits 7-9; eight rows of a column of 16 bytes lie in different banks."""
    for row, byte in itertools.product(range(64), range(128)):
        offset = row * 128 + byte
        assert sm90.swizzled_byte(row, byte) == offset ^ ((offset >> 7 & 7) << 4)
    for column in range(8):
        assert {sm90.swizzled_byte(row, column * 16) % 128 for row in range(8)} == set(range(0, 128, 16))


@pytest.mark.parametrize("address", [0, 1024, 8192 + 32, 200 * 1024 + 96])
def test_descriptors_of_operands(sm90, address):
    """PTX ISA, matrix descriptor: start and strides in units of 16 bytes; 1 is the swizzle of 128 bytes."""
    found = sm90.matrix_descriptor(address)
    assert (found & 0x3fff) * 16 == address and (found >> 32 & 0x3fff) * 16 == 1024
    assert found >> 62 == 1 and found >> 49 & 7 == 0  # no base offset: buffers begin where the swizzle does


@pytest.mark.parametrize("tile", SM90)
def test_shared_memory_is_used_up_and_no_more(sm90, tile):
    plan = sm90.plan(tile)
    stage = (plan["pixels"] + plan["filters"]) * 128
    assert LIMIT - stage < plan["shared_bytes"] <= LIMIT and plan["stages"] >= 3
    assert native.CONV_TILES[tile] == f"sm90_{plan['pixels']}x{plan['filters']}"


def test_every_output_is_of_one_tile(sm90):
    for p, (m, k, cluster) in itertools.product(
            (conv(K=8), conv(3, 13, 11, 136, 200), conv(2, 30, 31, 64, 128)),
            ((128, 64, 1), (128, 128, 2), (256, 128, 2))):
        filters, tiles, steps = sm90.work(sizes(p), m, k, cluster)
        assert steps == -(-p.C // 64) and filters == -(-p.K // k)
        covered = np.zeros((-(-p.N * p.P * p.Q // (m * cluster)) * cluster, filters), int)
        for at, rank in itertools.product(range(tiles), range(cluster)):
            covered[at // filters * cluster + rank, at % filters] += 1
        assert (covered == 1).all() and covered.shape[0] * m >= p.N * p.P * p.Q


TILE = caller.Tile.named("sm90_128x64")
REFUSED = {
    "groups": conv(groups=2), "channels": conv(C=20), "filters": conv(K=20), "stride": conv(H=40, stride=(9, 1)),
    "padding": conv(padding=(0, 129)), "beyond": conv(300, 300, 300, R=131, padding=(1, 1)),
    "wider": conv(H=300, W=300, R=256, padding=(127, 0)),
    "2^40": conv(H=2**20, W=2**16, C=8), "terms": conv(H=2**9, W=2**9, C=2**20, R=32, S=32),
    "output pixels": conv(2**15, 2**8, 2**8), "tiles": conv(2**14, 2**8, 2**8 - 8, K=2**16)}


@pytest.mark.parametrize("word", REFUSED)
def test_what_tma_cannot_describe_is_refused(sm90, word):
    reason = sm90.refusal(sizes(REFUSED[word]))
    assert reason is not None and word in reason
    assert caller.legal(TILE, REFUSED[word], 90) not in (None, native.without_sm90())
    assert sm90.rule(sizes(REFUSED[word]), 132) == -1


def test_the_limits_themselves_are_taken(sm90):
    for p in (conv(H=300, W=300, R=128, padding=(127, 128), S=255), conv(H=40, stride=(8, 8)), conv(C=8, K=8),
              conv(H=300, W=300, R=255, S=2, padding=(126, 127), dilation=(1, 254)),
              conv(2**15, 2**8, 2**8 - 1)):
        assert sm90.refusal(sizes(p)) is None, p.id
        assert caller.legal(TILE, p, 90) == native.without_sm90()  # Python refuses what the library does
        legal(sm90.patches_plan(sizes(p), 256))


@pytest.mark.parametrize(("problem", "processors", "tile"), [
    (conv(256, 56, 56, 64, 64, 3, 3, padding=(1, 1)), 132, "sm90_128x64"),   # 64 filters have one tile
    (conv(256, 56, 56, 64, 256), 132, "sm90_256x128"),                       # enough work for the largest
    (conv(32, 14, 14, 256, 256, 3, 3, padding=(1, 1)), 132, "sm90_128x64"),  # 98 tiles of 128 x 128 for 132
    (conv(32, 14, 14, 256, 256, 3, 3, padding=(1, 1)), 60, "sm90_128x128"),
    (conv(1, 7, 7, 512, 512), 132, "sm90_128x64"),
    (conv(256, 56, 56, 24, 64), 132, None)])                                 # few channels: mma.sync
def test_the_rule(sm90, problem, processors, tile):
    found = sm90.rule(sizes(problem), processors)
    assert found == (-1 if tile is None else native.CONV_TILES.index(tile))
