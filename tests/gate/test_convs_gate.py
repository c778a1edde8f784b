"""The CPU's own convolutions without torch, by tests/csrc/driver: under sanitizers, on ARM, and with faults."""

import platform
import shutil
import subprocess

import pytest

from fused_resnet import numerics
from tests.csrc import conftest as made
from tests.gate import drivers
from tests.gate.drivers import CXX

setup_script = made.setup_script


def build(setup_script, folder, flags=(), *, csrc=made.CSRC, isas=("baseline",), compiler=CXX, sound=()):
    """Builds the driver and the convolutions of csrc/cpu/isa in `folder`; returns the program."""
    others = [csrc / "cpu/memory.cpp", drivers.DRIVER / "driver.cpp"]
    units = drivers.units(setup_script, ("grouped", "convs"), others, flags, csrc=csrc, isas=isas)
    return drivers.build(folder, units, flags, csrc=csrc, compiler=compiler, sound=sound)


def complaint(program, *runner):
    """What is wrong with the program's convolutions, or None."""
    done = subprocess.run([*runner, program], capture_output=True, text=True)
    if done.returncode != 0 or not done.stdout.endswith("done\n"):
        return done.stderr[-3000:] or f"exit {done.returncode}"
    rows = [line.split() for line in done.stdout.splitlines()[:-1]]
    assert {size for _, size, _ in rows} == {"2", "4"}
    # In bf16 the result is rounded, by half of its last place, besides.
    allowed = {"4": numerics.WINOGRAD, "2": numerics.WINOGRAD + numerics.EPS["bf16"] / 2}
    return next((f"too large an error: {row}" for row in rows if not float(row[2]) <= allowed[row[1]]), None)


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(setup_script, tmp_path, sanitizers):
    """Every tensor, pack and scratch is an allocation of exactly its size; every instruction set that there is."""
    flags = ["-g1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    program = build(setup_script, tmp_path, flags, isas=tuple(setup_script.ISAS))
    assert complaint(program) is None


def test_arm_computes_the_same(setup_script, tmp_path):
    """The loops compile for NEON; the convolutions run there, or in an emulator."""
    native = platform.machine() == "aarch64"
    compiler = CXX if native else shutil.which("aarch64-linux-gnu-g++") or pytest.skip("there is no compiler for ARM")
    loops = [flag for flag in setup_script.LOOPS.split() if "$" not in flag]
    subprocess.run([compiler, *loops, "-Werror", "-DFR_ISA=baseline", "-c", made.CSRC / "cpu/isa/loops.cpp", "-o",
                    tmp_path / "loops.o"], check=True)
    program = build(setup_script, tmp_path, ["-O3", *([] if native else ["-static"])], compiler=compiler)
    runner = [] if native else [shutil.which("qemu-aarch64") or pytest.skip("there is no emulator of ARM")]
    assert complaint(program, *runner) is None


DIRECT, GEMM, STRIPS, SIMD, WINOGRAD, TILES, PACK = (f"cpu/{name}" for name in (
    "direct.h", "gemm.h", "strips.h", "simd.h", "winograd.h", "winograd_tiles.h", "conv_packed.cpp"))
# name -> file, what stands there, what the fault makes of it
FAULTS = {
    "rows outside of the image are read": (DIRECT, "inside(h, s.H) && low < high", "low < high"),
    "columns left of the image are read": (DIRECT, "w < 0 ? -w : 0", "0"),
    "columns right of the image are read": (DIRECT, "w + columns > s.W ? s.W - w : columns", "columns"),
    "a group reads the channels of the first": (DIRECT, "h, 0, group * inner,", "h, 0, 0,"),
    "a group takes the weights of the first": (DIRECT, "c.weights + depth * group * padded", "c.weights"),
    "columns take the dilation of rows": (DIRECT, "s.pad_w, s.dilation_w", "s.pad_w, s.dilation_h"),
    "columns take the stride of rows": (DIRECT, "column, s.stride_w,", "column, s.stride_h,"),
    "sums of the depth before are forgotten": (DIRECT, "kPanel + t * width, d0 > 0}", "kPanel + t * width, false}"),
    "unfinished sums have too little room": (DIRECT, "first_panel) * kPanel : 0", "first_panel) * kLanes : 0"),
    "whole panels forget the residual": (GEMM, "z += load(residual + at)", "z += 0.0f"),
    "part of a panel forgets the residual": (GEMM, "z += widen(residual[k])", "z += 0"),
    "ReLU6 ends elsewhere": (GEMM, "? 6.0f", "? 7.0f"),
    "the second of a pair is lost": (GEMM, "return sum + float_of_bits(a & 0xffff0000u) *", "return sum + 0.0f *"),
    "a part of a panel is stored as a whole": (GEMM, "f.columns == COLUMNS * kLanes && ", ""),
    "a copied row starts left of its padding": (STRIPS, "start = there ? left : 0", "start = 0"),
    "a copied row ends with anything": (STRIPS, "i = start + own; i < elements", "i = elements; i < elements"),
    "the second tile of a row starts over": (STRIPS, "(q + from) * step", "q * step"),
    "a band copies too few rows": (STRIPS, "s.stride_h + s.R; ++h", "s.stride_h + s.R - 1; ++h"),
    "a band's copies have too little room": (STRIPS, "s.stride_h + s.R) * strip_pitch", "s.stride_h) * strip_pitch"),
    "ties round up": (SIMD, "bits + 0x7fffu + (bits >> 16 & 1u)", "bits + 0x8000u"),
    "Winograd takes every activation for ReLU": (WINOGRAD, "c.activation <= Activation::relu6", "true"),
    "Winograd forgets the residual": (WINOGRAD, "z += load(c.residual", "load(c.residual"),
    "tiles write rows below the image": (WINOGRAD, "if (at.p + i >= s.P) break;", ""),
    "tiles write columns right of the image": (WINOGRAD, "if (j >= columns) break;", ""),
    "tiles at the right edge read beyond it": (WINOGRAD, "w + M + 2 <= s.W", "w + M + 1 <= s.W"),
    "rows of tiles take the padding of columns": (WINOGRAD, "tile.p * M - s.pad_h", "tile.p * M - s.pad_w"),
    "Winograd's sums have too little room": (WINOGRAD, "(kPanel + (shared", "(kLanes + (shared"),
    "a point is not quite the root of 2": (WINOGRAD, "kB = 1.4142135623730950f", "kB = 1.4143f"),
    "a point of the weights has moved": (TILES, "0.70710678118654752440", "0.7072"),
    "the mean is added": (PACK, "(own[k] - norm.mean[k])", "(own[k] + norm.mean[k])"),
    "pairs run across the kernel's cells": (
        PACK, "place / seg.elements * seg.words + within / per_word", "place / per_word"),
    "the last panel is packed as a whole one": (PACK, "std::min(rows - panel, 2 * lanes)", "2 * lanes"),
}


@pytest.fixture(scope="module")
def verdicts(setup_script, tmp_path_factory):
    """What drivers.judged says; a fault may leave a name idle, hence no warnings."""
    make = lambda folder, csrc, sound: build(setup_script, folder, ["-w"], csrc=csrc, sound=sound)
    return drivers.judged(make, complaint, FAULTS, tmp_path_factory)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(fault, verdicts):
    assert verdicts[fault] is not None


def test_without_a_fault_nothing_is_noticed(verdicts):
    assert verdicts[""] is None
