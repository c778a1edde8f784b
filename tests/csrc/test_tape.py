"""Tapes of launches: what playing one gives, depth-first or not, and that no broken tape gets through."""

import itertools
import math
import random

import pytest
import torch

from fused_resnet import native, tape

pytestmark = pytest.mark.skipif(native.missing("cpu") is not None, reason=str(native.missing("cpu")))
ops = torch.ops.fused_resnet
WORDS = 19
ODD = (-(2**63), -(2**31), -3, -2, -1, 0, 1, 2, 3, 4, 5, 31, 33, 1000, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1)


def image(*shape, dtype=torch.float32):
    x = torch.randint(0, 256, shape) if dtype is torch.uint8 else torch.randn(shape)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def packed(k=16, c=16, size=3, dtype=torch.float32, method="direct", groups=1, dilation=1):
    weight = (torch.randn(k, c // groups, size, size) / math.sqrt(c * size * size)).to(dtype)
    vectors = [None, *(torch.randn(k) for _ in range(3)), torch.rand(k) + 0.5]
    return ops._conv_pack(weight, *vectors, 1e-5, (dilation, dilation), groups, method)


def row(kind, x, residual=-1, pack=-1, filters=(0, 0, 0), stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1,
        activation=0, reuse=0, zeros=(0, 0), narrow=0):
    return [kind, x, residual, pack, *filters, *stride, *padding, *dilation, groups, activation, reuse, *zeros, narrow]


def conv(x, residual=-1, pack=0, **given):
    return row(tape.CONV, x, residual, pack, **{"filters": (16, 3, 3), "padding": (1, 1), **given})


def play(given, packs, rows, results, numbers=None):
    entries = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), -1 if rows else WORDS)
    numbers = torch.zeros(len(rows), 3, dtype=torch.float64) if numbers is None else numbers
    return ops._play(given, packs, entries, numbers, results)


def test_an_empty_tape_gives_what_was_given():
    x, y = image(1, 16, 4, 4), image(1, 16, 5, 5)
    out = play([x, y], [], [], [1, 0, 1])
    assert [t.data_ptr() for t in out] == [y.data_ptr(), x.data_ptr(), y.data_ptr()]
    assert play([x], [], [], []) == []


class Chain:
    """Random launches that read what earlier ones made, run one by one and on a tape."""

    def __init__(self, seed, batch, dtype):
        self.random, self.dtype = random.Random(seed), dtype
        size = self.random.choice([9, 24, 33, 40])
        self.given = [image(batch, 16, size, size, dtype=dtype), image(batch, 16, size, size, dtype=dtype)]
        self.tape, self.slots = tape.Tape(), [(-2, self.given[0]), (-3, self.given[1])]
        self.dead = set()  # places that were written over

    def grow(self):
        place, x = self.random.choice([s for s in self.slots[-4:] if s[0] not in self.dead])
        kind = self.random.choice(["conv", "conv", "conv", "winograd2", "winograd4", "grouped", "pool", "mean"])
        with tape.recording() as launched:
            if kind == "pool" and x.shape[2] > 8:
                y = tape.max_pool(x, (3, 3), (2, 2), (1, 1))
            elif kind == "mean" and self.random.random() < 0.3:
                y = tape.mean_pool(x)
            else:
                y = self._conv(kind if kind in ("winograd2", "winograd4", "grouped") else "direct", x)
        (entry,) = launched
        residual = next((p for p, t in self.slots if t is entry.residual), -1)
        if entry.reuse:
            self.dead.add(residual)
        self.slots.append((self.tape.add(entry, place, residual), y))

    def _conv(self, method, x):
        size = 3 if method.startswith("winograd") else self.random.choice([1, 3])
        stride = dilation = 1
        if method == "direct":
            stride, dilation = self.random.choice([1, 1, 2]), self.random.choice([1, 1, 2])
        groups, pad = 8 if method == "grouped" else 1, dilation * (size // 2)
        out = [(n + stride - 1) // stride for n in x.shape[2:]]
        shape = (x.shape[0], 16, *out)
        fits = [(p, t) for p, t in self.slots if t.shape == shape and p not in self.dead]
        place, residual = self.random.choice([*fits, (0, None)])
        reuse = residual is not None and residual is not x and place >= 0 and self.random.random() < 0.5
        pack = packed(16, 16, size, self.dtype, method, groups, dilation)
        return tape.conv(x, pack, residual, reuse, shape, (size, size), (stride,) * 2, (pad,) * 2, (dilation,) * 2,
                         groups, self.random.choice(["identity", "relu", "silu"]), method)

    def play(self, results):
        packs = self.tape.close(len(self.given), results)
        return self.tape.play([t.clone(memory_format=torch.channels_last) for t in self.given], packs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_tape_gives_what_its_launches_gave(dtype, batch, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for seed in range(40):
            chain = Chain(seed, batch, dtype)
            for _ in range(chain.random.randint(1, 14)):
                chain.grow()
            made = [(p, y) for p, y in chain.slots if p >= 0 and p not in chain.dead]
            wanted = [s for s in made if chain.random.random() < 0.4] or made[-1:]
            for result, (place, y) in zip(chain.play([p for p, _ in wanted]), wanted, strict=True):
                assert torch.equal(result, y) and result.stride() == y.stride(), (seed, place)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("batch, size", [(1, 9), (2, 32)])
def test_8_bits_on_a_tape(batch, size):
    x = image(batch, 16, size, size)
    weight, one = torch.randint(-127, 128, (32, 16, 3, 3), dtype=torch.int8), torch.full((32,), 1 / 512)
    pack = ops._conv_int8_pack(weight, one, one, 1, 3)
    limits = (0.0, math.inf)
    with tape.recording() as launched:
        q = tape.quantize(x, 20.0, 3)
        pooled = tape.max_pool(q, (3, 3), (1, 1), (1, 1))
        fine = tape.conv_int8(q, pack, None, (32, 3, 3), (1, 1), (1, 1), (1, 1), 1.0, (0, 9), limits, True)
        wide = tape.conv_int8(pooled, pack, fine, (32, 3, 3), (1, 1), (1, 1), (1, 1), 0.5, (9, 0), limits, False)
    made = tape.Tape()
    for entry, place, residual in zip(launched, (-2, 0, 0, 1), (-1, -1, -1, 2), strict=True):
        made.add(entry, place, residual)
    packs = made.close(1, [0, 1, 2, 3])
    assert len(packs) == 1 and packs[0] is pack
    for result, y in zip(made.play([x], packs), (q, pooled, fine, wide), strict=True):
        assert torch.equal(result, y) and result.dtype is y.dtype and result.stride() == y.stride()


def test_a_result_may_be_written_over_a_given_residual():
    x, r, pack = image(1, 16, 8, 8), image(1, 16, 8, 8), packed()
    expected = play([x, r], [pack], [conv(0, 1)], [2])[0]
    (result,) = play([x, r], [pack], [conv(0, 1, reuse=1)], [2])
    assert torch.equal(result, expected) and result.data_ptr() == r.data_ptr() and torch.equal(r, expected)


def test_broken_tapes_raise():
    x, small, pack = image(2, 16, 8, 8), image(2, 16, 4, 4), packed()
    good = [conv(0), conv(1, 0)]
    numbers = torch.zeros(2, 3, dtype=torch.float64)
    assert play([x], [pack], good, [2])[0].shape == x.shape
    entries = torch.tensor(good)
    wide = image(2, 32, 8, 8)
    for name, wrong in {
        "dtype of entries": lambda: ops._play([x], [pack], entries.int(), numbers, [2]),
        "entries in one row": lambda: ops._play([x], [pack], entries.flatten(), numbers, [2]),
        "a word too few": lambda: ops._play([x], [pack], entries[:, :-1].contiguous(), numbers, [2]),
        "entries with gaps": lambda: ops._play([x], [pack], entries.repeat_interleave(2, 0)[::2], numbers, [2]),
        "dtype of numbers": lambda: ops._play([x], [pack], entries, numbers.float(), [2]),
        "too few numbers": lambda: ops._play([x], [pack], entries, numbers[:1], [2]),
        "too many numbers": lambda: ops._play([x], [pack], entries, numbers.repeat(2, 1), [2]),
        "reads itself": lambda: play([x], [pack], [conv(1)], [1]),
        "reads a later one": lambda: play([x], [pack], [conv(2), conv(1)], [2]),
        "reads no place": lambda: play([x], [pack], [conv(-1)], [1]),
        "residual too far": lambda: play([x], [pack], [conv(0, 1)], [1]),
        "residual below": lambda: play([x], [pack], [conv(0, -2)], [1]),
        "pack too far": lambda: play([x], [pack], [conv(0, pack=1)], [1]),
        "pack below": lambda: play([x], [pack], [conv(0, pack=-2)], [1]),
        "no pack": lambda: play([x], [pack], [conv(0, pack=-1)], [1]),
        "no packs": lambda: play([x], [], [conv(0)], [1]),
        "no 8-bit pack": lambda: play([image(1, 16, 8, 8, dtype=torch.uint8)], [],
                                      [row(tape.CONV_INT8, 0, filters=(16, 3, 3))], [1]),
        "result too far": lambda: play([x], [pack], good, [3]),
        "result below": lambda: play([x], [pack], good, [-1]),
        "result of an empty tape": lambda: play([x], [], [], [1]),
        "nothing to write over": lambda: play([x], [pack], [conv(0, reuse=1)], [1]),
        "kind": lambda: play([x], [pack], [row(5, 0)], [1]),
        "kind below": lambda: play([x], [pack], [row(-1, 0)], [1]),
        "activation": lambda: play([x], [pack], [conv(0, activation=5)], [1]),
        "residual of another size": lambda: play([x, small], [pack], [conv(0, 1)], [2]),
        "written over another size": lambda: play([x, small], [pack], [conv(0, 1, reuse=1)], [2]),
        "residual of another width": lambda: play([x, wide], [pack], [conv(0, 1)], [2]),
        "residual of another dtype": lambda: play([x, x.bfloat16()], [pack], [conv(0, 1)], [2]),
        "another number of filters": lambda: play([x], [pack], [conv(0, filters=(32, 3, 3))], [1]),
        "another kernel": lambda: play([x], [pack], [conv(0, filters=(16, 1, 1))], [1]),
        "another number of channels": lambda: play([wide], [pack], [conv(0)], [1]),
        "other groups": lambda: play([x], [pack], [conv(0, groups=2)], [1]),
        "no groups": lambda: play([x], [pack], [conv(0, groups=0)], [1]),
        "no stride": lambda: play([x], [pack], [conv(0, stride=(0, 1))], [1]),
        "negative padding": lambda: play([x], [pack], [conv(0, padding=(-1, 0))], [1]),
        "no pixel left": lambda: play([x], [pack], [conv(0, dilation=(9, 9))], [1]),
        "weights that are none": lambda: play([x], [image(1, 16, 8, 8)], [conv(0)], [1]),
        "half of the weights": lambda: play([x], [pack[:pack.numel() // 2]], [conv(0)], [1]),
        "header alone": lambda: play([x], [pack[:64]], [conv(0)], [1]),
        "contiguous": lambda: play([x.contiguous()], [pack], [conv(0)], [1]),
        "strided": lambda: play([image(2, 16, 8, 16)[..., ::2]], [pack], [conv(0)], [1]),
        "three dimensions": lambda: play([torch.randn(16, 8, 8)], [pack], [conv(0)], [1]),
        "fp64": lambda: play([x.double()], [pack], [conv(0)], [1]),
        "int64": lambda: play([x.long()], [pack], [conv(0)], [1]),
        "bf16 with weights of fp32": lambda: play([x.bfloat16()], [pack], [conv(0)], [1]),
        "a pool of fp64": lambda: play([x.double()], [], [row(tape.MAX_POOL, 0, filters=(0, 3, 3))], [1]),
        "a pool's padding": lambda: play([x], [], [row(tape.MAX_POOL, 0, filters=(0, 2, 2), padding=(2, 2))], [1]),
        "8 bits of fp32": lambda: play([x], [pack], [row(tape.CONV_INT8, 0, -1, 0, filters=(16, 3, 3))], [1]),
        "quantised bf16": lambda: play([x.bfloat16()], [], [row(tape.QUANTIZE, 0)], [1]),
        "a zero point of 256": lambda: play([x], [], [row(tape.QUANTIZE, 0, zeros=(0, 256))], [1]),
    }.items():
        with pytest.raises(RuntimeError):
            wrong()
            pytest.fail(f"{name} was let through")


def test_no_word_of_a_tape_takes_the_process_down():
    """Every word of a whole tape, one by one, with numbers that nobody would write."""
    x, r = image(2, 16, 24, 24), image(2, 16, 24, 24)
    q = image(2, 16, 24, 24, dtype=torch.uint8)
    int8 = ops._conv_int8_pack(torch.ones(16, 16, 3, 3, dtype=torch.int8), torch.ones(16), torch.ones(16), 1, 3)
    packs = [packed(), packed(method="winograd2"), int8]
    rows = [conv(0), conv(3, 1, pack=1), conv(4, 3, reuse=1), row(tape.MAX_POOL, 5, filters=(0, 3, 3), padding=(1, 1)),
            row(tape.QUANTIZE, 6), row(tape.CONV_INT8, 7, 2, 2, filters=(16, 3, 3), padding=(1, 1), narrow=1)]
    numbers = torch.ones(len(rows), 3, dtype=torch.float64)
    whole = torch.tensor(rows)
    let = 0
    for at, word, value in itertools.product(range(len(rows)), range(WORDS), ODD):
        entries = whole.clone()
        entries[at, word] = value
        try:
            out = ops._play([x, r, q], packs, entries, numbers, [3, 8])
        except RuntimeError:
            continue
        let += 1
        assert len(out) == 2
    assert 0 < let < len(rows) * WORDS * len(ODD)
    for value in (math.nan, math.inf, -math.inf, 1e300):
        play([x, r, q], packs, rows, [8], numbers * value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_finite_is_said_of_finite_values_alone(dtype):
    for size in (1, 2, 3, 15, 16, 17, 31, 33, 64, 100, 1000, 4099):
        x = torch.randn(size).to(dtype)
        x[-1], x[0] = torch.finfo(dtype).max, torch.finfo(dtype).min
        assert ops._is_finite(x)
        for value, at in itertools.product((math.nan, math.inf, -math.inf), {0, size // 2, size - 1}):
            y = x.clone()
            y[at] = value
            assert not ops._is_finite(y), (size, value, at)
            assert not tape.all_finite(x, None, y) and tape.all_finite(x, None)
    assert ops._is_finite(torch.empty(0, dtype=dtype))


def test_finite_is_asked_of_dense_tensors():
    x = torch.randn(2, 3, 5, 7)
    last = x.contiguous(memory_format=torch.channels_last)
    last[1, 2, 4, 6] = math.nan
    assert ops._is_finite(x) and not ops._is_finite(last) and not ops._is_finite(last.contiguous())
    for wrong in (x[..., ::2], x.transpose(0, 2), x[:, :1], x.expand(2, 2, 3, 5, 7), x.long()):
        with pytest.raises(RuntimeError):
            ops._is_finite(wrong)
    view = x[..., 1:].clone(memory_format=torch.preserve_format)[..., ::2]
    view[0, 0, 0, 0] = math.inf
    assert not tape.all_finite(view)  # which any tensor may be asked


def test_schemas_say_what_is_read():
    x, pack = image(1, 16, 8, 8), packed()
    torch.library.opcheck(ops._is_finite.default, (x,), test_utils="test_schema")
    torch.library.opcheck(ops._play.default, ([x], [pack], torch.tensor([conv(0), conv(1, 0)]),
                                              torch.zeros(2, 3, dtype=torch.float64), [2]), test_utils="test_schema")
