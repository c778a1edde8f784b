"""Deliberate faults in the CUDA kernels, each of which the emulation must notice."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.csrc import conftest as made
from tests.gate import check_emulation

# name -> file of csrc/testing that is compiled again and whose check must notice; file of the fault, what stands there,
# what the fault makes of it
FAULTS = {
    "a stage is read before its copies have landed": (
        "conv", "cuda/conv.cuh", "wait_copies<kStages - 2>();", "wait_copies<kStages - 1>();"),
    "a stage is overwritten while others read it": ("conv", "cuda/conv.cuh", "sync_block();  // all copies", "// all"),
    "sums are read before all have written theirs": (
        "conv", "cuda/conv.cuh", "  sync_block();\n  store_tile", "  store_tile"),
    "padding is not zero": ("conv", "cuda/conv_load.cuh", "inside(h, s.H) && inside(w, s.W)", "inside(h, s.H)"),
    "the residual comes after the activation": (
        "conv", "cuda/conv_epilogue.cuh", "activate(normalised(z[i], norm[i]) + residual[i], a.activation)",
        "activate(normalised(z[i], norm[i]), a.activation) + residual[i]"),
    "NaN does not pass the activation": (
        "conv", "common/elements.h", "return z <= A(0) ? A(0) : z;", "return z > A(0) ? z : A(0);"),
    "a group reads the channels of the first": (
        "conv", "cuda/conv_load.cuh", "nhwc(pixel.n, 0, 0, load.group[i] * load.channels,", "nhwc(pixel.n, 0, 0, 0,"),
    "a bundle takes the filters of its first group": (
        "conv", "cuda/conv_load.cuh", "int64_t{place.group + slot} * filters", "int64_t{place.group} * filters"),
    "padding goes through the prologue": ("conv", "cuda/conv_load.cuh", "if (valid >> j & 1) round_to", "round_to"),
    "the prologue's norm is that of other channels": (
        "conv", "cuda/conv_load.cuh", "load.group[i] * load.channels + at.c);\n    at", "at.c);\n    at"),
    "patches are stored into the stage that is read": (
        "conv", "cuda/conv.cuh", "patches + step % kStages * kPatches);",
        "patches + (step + 1) % kStages * kPatches);"),
    "depthwise weights are read before all are there": (
        "conv", "cuda/depthwise.cuh", "  sync_block();\n  const int32_t octet", "  const int32_t octet"),
    "the element behind a window's row is in the next column": (
        "conv", "cuda/conv_load.cuh", "Depth{at.r, at.s + 1, 0}", "Depth{at.r + 1, at.s, 0}"),
    "the pool's halo is a column short": (
        "stem", "cuda/stem.cuh", "kStemColumns = 2 * kPoolColumns + 1", "kStemColumns = 2 * kPoolColumns"),
    "the window begins a row too late": (
        "stem", "cuda/stem.cuh", "tap(2 * place.row - 1, 0, s.stride_h", "tap(2 * place.row, 0, s.stride_h"),
    "the pool's window is two columns wide": ("stem", "cuda/stem.cuh", "t = cell % 3;", "t = cell % 3 % 2;"),
    "the pool takes what is outside of the convolution": (
        "stem", "cuda/stem.cuh", "- 1 + r, s.P)", "- 1 + r, s.P + 1)"),
    "NaN loses in the pool": ("stem", "cuda/stem.cuh", " || values[i] != values[i]", ""),
    "pixels are pooled before all are there": (
        "stem", "cuda/stem.cuh", "    sync_block();  // all have read the window and written their pixels\n", ""),
    "the window is read before all of it is there": (
        "stem", "cuda/stem.cuh", "    sync_block();  // all is there, and all have pooled the tile before\n", ""),
    "taps beyond the window multiply what is there": (
        "stem", "cuda/stem.cuh", "offset < 0 ? 0 : *", "*"),
    "the weights of the next filters are not loaded": (
        "stem", "cuda/stem.cuh", "if (place.filter != loaded)", "if (loaded < 0)"),
    "the running variance learns the biased one": (
        "finalise", "common/finalise.h", "m.square / (m.count - 1)", "m.square / m.count"),
    "momentum weighs the past": (
        "finalise", "common/finalise.h", "(1 - weight) * old + weight * m.mean",
        "weight * old + (1 - weight) * m.mean"),
    "the last tile counts as a whole one": (
        "finalise", "common/finalise.h", "return count - t * span < span ? count - t * span : span;", "return span;"),
    "tiles are joined without the distance of their means": (
        "finalise", "common/finalise.h", " + apart * apart * a.count * share", ""),
    "the pivot is forgotten": ("finalise", "cuda/finalise.cuh", "m.mean += a.pivot[k];", "m.mean += 0;"),
    "columns are joined before all have written": (
        "finalise", "cuda/finalise.cuh", "half /= 2) {\n    sync_block();", "half /= 2) {"),
    "a column is added up before all have written": (
        "bn_act", "cuda/bn_act.cuh", "half /= 2) {\n    sync_block();", "half /= 2) {"),
    "the last bits of a mask are not cleared": ("bn_act", "cuda/bn_act.cuh", " && at + i < a.elements", ""),
}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """Fault -> what noticed it, "" -> what was noticed without one. Two builds at a time."""
    folder = tmp_path_factory.mktemp("sound")
    sound = made.compile_emulation(made.CSRC, folder)
    objects = list(folder.glob("*.o"))

    def build(fault):
        unit, file, before, after = FAULTS[fault]
        folder = tmp_path_factory.mktemp("fault", numbered=True)
        shutil.copytree(made.CSRC, folder / "csrc")
        text = (folder / "csrc" / file).read_text()
        assert text.count(before) == 1, f"{before!r} stands {text.count(before)} times in {file}"
        (folder / "csrc" / file).write_text(text.replace(before, after))
        try:
            return made.compile_emulation(folder / "csrc", folder, [path for path in objects if path.stem != unit])
        except subprocess.CalledProcessError as error:
            pytest.fail(f"{fault}: {error.stderr}")

    with ThreadPoolExecutor(2) as pool:
        modules = dict(zip(FAULTS, pool.map(build, FAULTS), strict=True))
    keys = {fault: f"{FAULTS[fault][0]}={modules[fault]}" for fault in FAULTS}
    clean = [f"{unit}={sound}" for unit in check_emulation.CHECKS]
    env = {**os.environ, "PYTHONPATH": str(made.ROOT)}
    done = subprocess.run([sys.executable, "-m", check_emulation.__name__, *keys.values(), *clean], cwd=made.ROOT,
                          capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    return {fault: said[key] for fault, key in keys.items()} | {"": [said[key] for key in clean if said[key]]}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(fault, verdicts):
    assert verdicts[fault] is not None


def test_without_a_fault_nothing_is_noticed(verdicts):
    assert verdicts[""] == []
