"""Deliberate faults of the sm_90a convolution, each of which the emulation must notice."""

import shutil
import subprocess
import sys

import pytest

from tests.csrc import conftest as made
from tests.gate import check_sm90

FAULTS = {  # name -> file, what stands there, what the fault makes of it
    "a stage is read before its copies have landed": (
        "cuda/conv_sm90.cuh", "      barrier_wait(shared.full(use % kPlan.stages), use / kPlan.stages & 1);\n", ""),
    "a stage is filled while it is read": (
        "cuda/conv_sm90.cuh", "        barrier_wait(shared.empty(stage), (use / kPlan.stages & 1) ^ 1);\n", ""),
    "a stage is released before its products are done": (
        "cuda/conv_sm90.cuh", "if (step > 0) release(use - 1);", "release(use);"),
    "a group waits for phases that are not next": (
        "cuda/conv_sm90.cuh", "barrier_wait(shared.turn(group), (tile.round() & 1) ^ (group == 0));", "{}"),
    "sums are used before the last products": ("cuda/conv_sm90.cuh", "    wait_products<0>();\n", ""),
    "a residual is read before it is there": (
        "cuda/conv_sm90.cuh", "if (a.residual) barrier_wait(shared.loaded(group), tile.round() & 1);", ""),
    "y is stored before all have written": (
        "cuda/conv_sm90.cuh", "    fence_copies();\n    sync_group(group);", "    fence_copies();"),
    "no fence stands before the store": ("cuda/conv_sm90.cuh", "    fence_copies();\n", ""),
    "windows end a pixel late": ("common/conv_sm90.h", "{s.pad_w - (s.S - 1) * s.dilation_w,",
                                 "{s.pad_w - (s.S - 1) * s.dilation_w + 1,"),
    "a block of a cluster copies the other's weights": (
        "cuda/conv_sm90.cuh", "tile.first_filter() + tile.rank * kPart", "tile.first_filter()"),
}


def check(sources, folder):
    target = made.compile_emulation(sources, folder, parts=("sm90",))
    return subprocess.run([sys.executable, "-m", check_sm90.__name__, target], cwd=made.ROOT, capture_output=True,
                          text=True, timeout=300)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(fault, tmp_path):
    file, before, after = FAULTS[fault]
    shutil.copytree(made.CSRC, tmp_path / "csrc")
    text = (tmp_path / "csrc" / file).read_text()
    assert text.count(before) == 1, f"{before!r} stands {text.count(before)} times in {file}"
    (tmp_path / "csrc" / file).write_text(text.replace(before, after))
    done = check(tmp_path / "csrc", tmp_path)
    assert done.returncode != 0 and "Error" in done.stderr and "all agree" not in done.stdout


def test_without_a_fault_nothing_is_noticed(tmp_path):
    done = check(made.CSRC, tmp_path)
    assert done.returncode == 0 and "all agree" in done.stdout, done.stderr
