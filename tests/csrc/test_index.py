"""The index arithmetic that the CPU's loops and the GPU's kernels share, exhausted on the CPU."""

import itertools
import struct

import pytest
import torch
import torch.nn.functional as F

from fused_resnet import native


def test_taps_are_those_of_a_convolution(emulation):
    """A convolution with one weight of 1 at tap (r, s) copies what the tap reads."""
    H, W, R, S = 7, 6, 3, 2
    x = torch.arange(1.0, H * W + 1).view(1, 1, H, W)
    for stride, padding, dilation, r, s in itertools.product((1, 2, 3), (0, 1, 2), (1, 2), range(R), range(S)):
        weight = torch.zeros(1, 1, R, S)
        weight[0, 0, r, s] = 1
        y = F.conv2d(x, weight, stride=stride, padding=padding, dilation=dilation)[0, 0]
        P, Q = y.shape
        for m in range(P * Q):
            n, p, q = emulation.pixel_of(m, P, Q)
            h, w = emulation.tap(p, r, stride, padding, dilation), emulation.tap(q, s, stride, padding, dilation)
            read = 0.0
            if emulation.inside(h, H) and emulation.inside(w, W):
                read = x.view(-1)[emulation.nhwc(n, h, w, 0, H, W, 1)].item()
            assert read == y[p, q].item() and n == 0


def test_depths_are_those_of_a_weight_in_channels_last_memory(emulation):
    R, S, C = 3, 5, 8
    found = [emulation.depth_of(e, S, C) for e in range(R * S * C)]
    assert found == list(itertools.product(range(R), range(S), range(C)))
    assert emulation.depth_of(R * S * C, S, C)[0] == R  # the tail of the last step is beyond the window


def test_python_knows_the_tiles_of_the_library(emulation):
    assert tuple(emulation.conv_tiles()) == native.CONV_TILES


@pytest.mark.parametrize("at", [0, 2**31 - 1, 2**31, 2**33 + 12345])
def test_offsets_beyond_two_to_the_thirty_first(emulation, at):
    P, Q, C = 113, 57, 96
    n, p, q = emulation.pixel_of(at, P, Q)
    assert (n * P + p) * Q + q == at and p < P and q < Q
    assert emulation.nhwc(n, p, q, C - 1, P, Q, C) == at * C + C - 1
    assert emulation.mask_bytes(at) == -(-at // 8)


@pytest.mark.parametrize("at", [0, 5, 2**31 - 3, 2**33 + 12345])
def test_pixels_behind_another(emulation, at):
    for (P, Q), offset in itertools.product([(113, 57), (1, 1), (7, 7), (1, 200)], [*range(130), 2**20]):
        if at // (P * Q) + offset < 2**31:
            first = emulation.pixel_of(at, P, Q)
            assert emulation.pixel_behind(first, offset, P, Q) == emulation.pixel_of(at + offset, P, Q)


def test_one_depth_follows_the_other(emulation):
    S, channels = 3, 5
    found = [(0, 0, 0)]
    while len(found) < 2 * S * channels:
        found.append(emulation.next_depth(*found[-1], S, channels))
    assert found == list(itertools.product(range(2), range(S), range(channels)))


@pytest.mark.parametrize(("N", "size", "K", "groups", "tile", "bundle"), [
    (2, 9, 72, 1, 64, 1), (3, 7, 32, 8, 8, 4), (1, 20, 90, 6, 16, 4), (1, 5, 40, 2, 32, 2), (2**21, 33, 8, 1, 8, 1)])
def test_blocks_cover_every_pixel_group_and_filter_once(emulation, N, size, K, groups, tile, bundle):
    sizes = [N, size, size, groups, K, 1, 1, size, size, 1, 1, 0, 0, 1, 1, groups]
    pixels, blocks = N * size * size, emulation.tile_place(sizes, 0, tile, bundle)[4]
    assert blocks == -(-pixels // (128 // bundle)) * -(-groups // bundle) * -(-(K // groups) // tile)
    some = range(blocks) if blocks < 10**4 else (0, 1, blocks // 2, blocks - 1)
    places = [emulation.tile_place(sizes, block, tile, bundle)[:4] for block in some]
    assert len(set(places)) == len(places)
    for pixel, group, filters, width in places:
        assert width * bundle == 128 and pixel % width == 0 and group % bundle == 0 and filters % tile == 0
        assert 0 <= pixel < pixels and group < groups and filters < K // groups


def test_a_pooled_row_is_that_of_max_pool(emulation):
    for size in range(1, 40):
        assert emulation.pooled(size) == F.max_pool2d(torch.zeros(1, 1, size, size), 3, 2, 1).shape[-1]


@pytest.mark.parametrize("C", [1, 3, 8, 24, 33, 64, 1000, 2040, 2**20 - 1])
def test_channels_of_octets(emulation, C):
    blocks = [0, 1, 2, 131, 2**20 + 7, 2**31 - 1]
    for block, thread in itertools.product(blocks, (0, 1, 31, 255)):
        assert emulation.octet_channel(block, thread, 256, C) == (block * 256 + thread) * 8 % C


@pytest.mark.parametrize("C", [8, 24, 40, 64, 264, 2040, 2048])
def test_a_thread_that_goes_round_stays_with_its_channels(emulation, C):
    for elements, limit in itertools.product((C, 1000 * C, 10**6 * C), (1, 8, 1056)):
        blocks = emulation.octet_blocks(elements, C, limit)
        goes_round = blocks * 256 * 8 < elements
        assert blocks >= 1 and (not goes_round or blocks * 256 * 8 % C == 0)


@pytest.mark.parametrize("rows", [0, 1, 63, 802816, 2**33])
@pytest.mark.parametrize("C", [1, 5, 8, 24, 64, 2048])
def test_strips_cover_every_row_and_channel(emulation, rows, C):
    vector, columns, strip_rows, strips, tiles = emulation.sum_plan(rows, C)
    assert C % vector == 0 and (columns & (columns - 1)) == 0 and columns <= 32
    assert tiles * columns * vector >= C > (tiles - 1) * columns * vector
    assert strips * strip_rows >= rows and (strips - 1) * strip_rows < max(rows, 1)
    assert strip_rows * columns == 64 * 256


def test_eight_rows_of_a_chunk_lie_in_different_banks(emulation):
    """ldmatrix reads 8 rows of 16 bytes at once; shared memory delivers 128 bytes, one of each 16-byte column."""
    every = {(row, chunk): emulation.swizzled(row, chunk) for row in range(128) for chunk in range(4)}
    assert sorted(every.values()) == list(range(128 * 4))
    for first, chunk in itertools.product(range(0, 128, 8), range(4)):
        columns = {every[row, chunk] % 8 for row in range(first, first + 8)}
        assert len(columns) == 8


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_sixteen_bit_types_round_as_torch_does(emulation, dtype):
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    patterns = torch.arange(0, 2**16, 7, dtype=torch.int32).to(torch.uint16)
    values = patterns.view(kind).float()
    for bits, value in zip(patterns.tolist(), values.tolist()):
        assert value != value or emulation.round_trip(dtype, bits) == bits
    # Halfway between neighbours, and one step of fp32 to either side.
    high = torch.tensor([1.0, 1.5, 3.0, 65000.0, 6e-5, 1e-7, 3e-8, 0.1, 70000.0, float("inf"), float("nan")])
    near = torch.cat([high, -high, high * (1 + 2.0**-9), high * (1 + 2.0**-11), high * (1 + 3 * 2.0**-11)])
    for value in torch.cat([near, torch.nextafter(near, near + 1)]).tolist():
        expected = torch.tensor(value).to(kind)
        bits = emulation.rounded(dtype, value)
        mine = torch.tensor(struct.unpack("<h", struct.pack("<H", bits))[0], dtype=torch.int16).view(kind)
        assert torch.equal(mine, expected) or (mine.isnan() and expected.isnan()), value
