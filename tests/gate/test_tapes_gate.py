"""Tapes, 8-bit values, pools and the store of blocks without torch, by tests/csrc/driver: sanitizers and faults."""

import subprocess

import pytest
import torch

from tests.csrc import conftest as made
from tests.gate import drivers

setup_script = made.setup_script
LOOPS = ("grouped", "convs", "int8")
SOURCES = ("tape", "conv_packed", "conv_int8", "mean_pool", "memory")
DRIVERS = ("tapes", "bytes", "store")
ADDRESS = ("-g1", "-fsanitize=address", "--param", "asan-instrumentation-with-call-threshold=0")
# Kind -> flags, and what takes others, for the compiler's time: test_convs_gate looks at the arithmetic of `convs` and
# `grouped`. Without "address" pages that nobody may touch stand behind every tensor.
SANITIZERS = {
    "address,undefined": ([*ADDRESS, "-fsanitize=undefined", "-fno-sanitize-recover=all"],
                          {"convs": ADDRESS, "grouped": ()} | dict.fromkeys(DRIVERS, ADDRESS)),
    "thread": (["-g1", "-fsanitize=thread"], {}),
}
LIMIT = 600  # seconds of a run: a fault may make an endless one


def build(setup_script, folder, flags=(), *, csrc=made.CSRC, isas=("baseline",), special=None, sound=()):
    """Builds the program in `folder` and returns it; `special` as in drivers.units."""
    others = [*(csrc / f"cpu/{name}.cpp" for name in SOURCES), *(drivers.DRIVER / f"{name}.cpp" for name in DRIVERS)]
    units = drivers.units(setup_script, LOOPS, others, flags, csrc=csrc, isas=isas, special=special)
    return drivers.build(folder, units, flags, csrc=csrc, sound=sound)


def complaint(program):
    """What the program says is wrong, or None."""
    try:
        done = subprocess.run([program], capture_output=True, text=True, errors="replace", timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return "it does not end"
    sound = done.returncode == 0 and done.stdout == "done\n"
    return None if sound else done.stderr[-3000:] or f"exit {done.returncode}"


@pytest.mark.parametrize("kind", SANITIZERS)
def test_sanitizers_find_nothing(setup_script, tmp_path, kind):
    """Every tensor is an allocation of exactly its size; every instruction set that there is."""
    flags, special = SANITIZERS[kind]
    program = build(setup_script, tmp_path, flags, isas=tuple(setup_script.ISAS), special=special)
    assert complaint(program) is None


TAPE, PACKED, INT8, GEMM8, PATCHES, POOL, MEMORY = (f"cpu/{name}" for name in (
    "tape.cpp", "conv_packed.cpp", "conv_int8.cpp", "gemm8.h", "isa/int8.cpp", "pool.h", "memory.cpp"))
# name -> file, what stands there, what the fault makes of it
FAULTS = {
    "a band reads a row too few": (
        TAPE, "(int64_t{s.R} - 1) * s.dilation_h + 1;", "(int64_t{s.R} - 1) * s.dilation_h;"),
    "a band forgets the stride": (TAPE, "(int64_t{upto} - 1) * s.stride_h", "(int64_t{upto} - 1)"),
    "a band forgets the dilation": (TAPE, "- 1) * s.dilation_h + 1", "- 1) + 1"),
    "readers of the residual's memory do not come first": (TAPE, "if (step.reuse) {", "if (false) {"),
    "they come as if without padding": (TAPE, "upto + int64_t{r.pad_h}", "upto + 0 * int64_t{r.pad_h}"),
    "they come as if without strides": (TAPE, "r.pad_h}, r.stride_h)", "r.pad_h}, 2 * r.stride_h)"),
    "memory is free before its block ends": (TAPE, "last_of_block(home.last)});", "home.last});"),
    "memory is free while its last reader runs": (TAPE, "return t.until < i;", "return t.until <= i;"),
    "rows come one by one": (TAPE, "padded(upto, step.launch.step)", "padded(upto, 1)"),
    "every image is the first": (TAPE, "image * tape_.values_[home]", "0 * image * tape_.values_[home]"),
    "the residual's rows do not come first": (TAPE, "if (step.residual >= 0) need(step.residual, upto);", ""),
    "x's rows do not come first": (TAPE, "need(step.x, std::clamp<int64_t>(last, 0, s.H));", ""),
    "results lie beside their residuals": (TAPE, "e.reuse ? values_[e.residual].home : given_ + i", "given_ + i"),
    "the home is the residual itself": (TAPE, "e.reuse ? values_[e.residual].home", "e.reuse ? e.residual"),
    "a home lives no longer than its first value": (
        TAPE, "home.last = std::max(home.last, values_[i].last);", "(void)home;"),
    "memory goes back before its last reader": (TAPE, "home].last <= i)", "home].last <= i + 1)"),
    "what the caller reads is forgotten": (TAPE, "values_[value].last = count;", ""),
    "a thread's memory is that of the last value": (
        TAPE, "bytes_ = std::max(bytes_, from + size);", "bytes_ = from + size;"),
    "values overlap": (TAPE, "if (t.from - from >= size) break;", "if (t.from >= from) break;"),
    "results that are read later stay with the thread": (
        TAPE, "home.last >= end_) continue;", "home.last > end_) continue;"),
    "the last rows of a block are left out": (
        TAPE, "for (int64_t i = block.end; i-- > block.first;)", "for (int64_t i = block.end - 1; i-- > block.first;)"),
    "only a block's result is completed": (
        TAPE, "for (int64_t i = block.end; i-- > block.first;)", "for (int64_t i = block.end; i-- > block.end - 1;)"),
    "makers of earlier blocks are asked again": (TAPE, "maker >= block.first && maker < i", "maker >= 0 && maker < i"),
    "tiles of rows start at the top": (
        PACKED, "int64_t tile = across * (first / m)", "int64_t tile = 0 * across * (first / m)"),
    "tiles of the last rows are left out": (PACKED, "across * ceil_div(last, m)", "across * (last / m)"),
    "rows of groups start at the top": (
        PACKED, "part.last_row + first, part.first_panel", "part.last_row + 0 * first, part.first_panel"),
    "rows of 8 bits start at the top": (INT8, "for (int64_t row = int64_t{first} * s.Q;", "for (int64_t row = 0;"),
    "rows are quantised from the top": (
        INT8, "some(from, to, row * first, row * last)", "some(from, to, 0, row * (last - first))"),
    "the last row of a pool is left out": (
        INT8, "int32_t p = first; p < last; ++p", "int32_t p = first; p < last - (last > 3); ++p"),
    "the filter's sum is forgotten": (INT8, "static_cast<int32_t>(-x_zero * sum)", "0"),
    "the last panel is packed as a whole one": (INT8, "std::min(rows - panel, 2 * lanes)", "2 * lanes"),
    "the residual's zero is that of y": (
        INT8, "static_cast<int32_t>(numbers.residual_zero)", "static_cast<int32_t>(numbers.y_zero)"),
    "borders hold zero": (PATCHES, "memset(to, c.x_zero,", "memset(to, 0,"),
    "strips' borders hold zero": (PATCHES, "static_cast<uint8_t>(c.x_zero), c.weights", "uint8_t{}, c.weights"),
    "patches are read beyond the batch": (PATCHES, " && from + 4 * depth.words <= end", ""),
    "columns left of the image are read": (PATCHES, "w < 0 ? -w : 0", "0"),
    "columns right of the image are read": (PATCHES, "w + columns > s.W ? s.W - w : columns;", "columns;"),
    "a chunk ends late": (PATCHES, "room = kChunk - place % kChunk", "room = kChunk"),
    "patches have too little room": (
        PATCHES, "return 4 * (part.last_row - part.first_row) * chunks * kChunk",
        "return 4 * (part.last_row - part.first_row) * chunks"),
    "part of a panel is taken for a whole": (PATCHES, "left < width ? left : width}", "width}"),
    "NaN is no low number": (PATCHES, "z = z > low ? z : low;", "z = z < low ? low : z;"),
    "whole panels forget the residual": (
        GEMM8, "finish(sum[i][j], scale, shift, residual == nullptr ? nullptr : residual + to, y + to)",
        "finish(sum[i][j], scale, shift, nullptr, y + to)"),
    "other panels forget the residual": (
        GEMM8, "finish(sum, scale, shift, from, y + to);", "finish(sum, scale, shift, nullptr, y + to);"),
    "residuals have no zero": (GEMM8, "widened(from) - zero", "widened(from)"),
    "bytes end below their most": (
        GEMM8, "highest = static_cast<float>(255 - c.y_zero)", "highest = static_cast<float>(254 - c.y_zero)"),
    "the least is zero": (GEMM8, "lowest = static_cast<float>(-c.y_zero)", "lowest = 0"),
    "a fourth value is lost": (GEMM8, "a >> 8 & 0x00ff00ffu", "a >> 8 & 0x000000ffu"),
    "a whole panel is stored, however wide": (GEMM8, "&& end.columns == kWidth", ""),
    "a window ends below the image": (POOL, "h1 = top + s.R < s.H ? top + s.R : s.H", "h1 = top + s.R"),
    "NaN loses": (POOL, "b > a || b != b ? b : a", "b > a ? b : a"),
    "NaN loses one by one": (POOL, "|| wide != wide", ""),
    "the mean has lost a pixel": (
        POOL, "for (int64_t i = 0; i < count; ++i) sum += load", "for (int64_t i = 1; i < count; ++i) sum += load"),
    "a block has no room for its place": (
        MEMORY, "bytes + sizeof(Block) + kColour * kColours", "bytes + sizeof(Block)"),
    "a smaller block serves": (MEMORY, "own >= size && own", "own"),
    "any block serves": (MEMORY, " && own <= size + size / 4", ""),
    "nothing is dropped": (MEMORY, "while (idle_ > kKept)", "while (false)"),
    "a block of any size lies idle": (MEMORY, "|| block->bytes > kKept", ""),
    "what serves again still lies idle": (MEMORY, "idle_ -= block->bytes;", ""),
    "weights overlap": (MEMORY, "last_->used += needed;", "last_->used += needed - 192;"),
    "a shelf goes before its weights": (MEMORY, "++last_->users;", ""),
    "a shelf in use is filled anew": (MEMORY, "last_->users == 1", "last_->users < 9"),
    "a shelf is as large as others": (MEMORY, "(sizeof(Shelf) + needed + kShelf - 1) / kShelf * kShelf", "kShelf"),
    "shelves stay": (MEMORY, "if (--shelf->users == 0) munmap", "if (--shelf->users > 99) munmap"),
}


# In what only vectors of 64 bytes run.
WIDE_FAULTS = {
    "bytes of four vectors change places": (GEMM8, "(0, 4, 8, 12, 1,", "(0, 8, 4, 12, 1,"),
    "far above is far below": (GEMM8, "far = z < 0x1p30f ? far : all(1.0f);", "(void)z;"),
    "the residual's zero is left out of the shift": (
        GEMM8, "static_cast<float>(-c.residual_zero) * residual_scale;", "0.0f;"),
    "every zero is that of saturation": (GEMM8, "c.y_zero == 0 && least == 0", "least == 0"),
    "every limit is that of saturation": (GEMM8, "&& most == 255", ""),
    "pairs forget the residual": (GEMM8, "kLanes, 0) * residual_scale;", "kLanes, 0) * 0.0f;"),
    "pairs are of one row": (GEMM8, "i + 1 < ROWS ? words(i + 1) : first", "first"),
}


def judge(setup_script, folders, faults, isas):
    """What drivers.judged says; a fault may leave a name idle, hence no warnings."""
    make = lambda folder, csrc, sound: build(setup_script, folder, ["-w"], csrc=csrc, isas=isas, sound=sound)
    return drivers.judged(make, complaint, faults, folders)


@pytest.fixture(scope="module")
def verdicts(setup_script, tmp_path_factory):
    return judge(setup_script, tmp_path_factory, FAULTS, ("baseline",))


@pytest.fixture(scope="module")
def wide_verdicts(setup_script, tmp_path_factory):
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this processor has no vectors of 64 bytes")
    return judge(setup_script, tmp_path_factory, WIDE_FAULTS, ("baseline", "avx512"))


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(fault, verdicts):
    assert verdicts[fault] is not None


@pytest.mark.parametrize("fault", WIDE_FAULTS)
def test_faults_in_wide_vectors_are_noticed(fault, wide_verdicts):
    assert wide_verdicts[""] is None and wide_verdicts[fault] is not None


def test_without_a_fault_nothing_is_noticed(verdicts):
    assert verdicts[""] is None
