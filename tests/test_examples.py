"""Every example runs as a user runs it, and says what its first lines promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
# torchvision as it stands beside a CPU build of torch needs the shim first; a user's torchvision fits.
START = """import runpy, sys
from fused_resnet.testing.shim import torchvision_shim
torchvision_shim()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")"""
# File -> (arguments that make it small, what it has to print).
RUNS = {
    "tutorial_blocks.py": ("--size 32", r"15 of 15 convolutions fused\n(.*\n)*.*: ok: .*\nsame state dict: True\n"
                                        r".*off by at most \d\.\de-0[6-9]$"),
    "fuse_torchvision.py": ("--batch 2 --size 64 --seconds 1", r"resnet18: 20 of 20 convolutions fused\n.*: ok: .*\n"
                                                               r"stock: .* ms\nfused: .* ms\nfused is \d"),
    "detection_backbone.py": ("--size 64", r"(?s)pool .*e-0[6-9]\n\d+ of 28 convolutions fused.*: ok: "),
    "finetune.py": ("--steps 30", r"scratch: 9\d.*\n5 to 9, before.*: [0-4]?\d\.\d%.*\n5 to 9, stock: [6-9]\d.*\n"
                                  r"5 to 9, fused: [6-9]\d.*\n.*differ by at most"),
}
QUICKEST = "tutorial_blocks.py"


def run(name, *arguments, cache):
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", START, EXAMPLES / name, *arguments],
                          cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "FUSED_RESNET_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", [name if name == QUICKEST else pytest.param(name, marks=pytest.mark.gate)
                                  for name in RUNS])
def test_runs(name, tmp_path):
    for package in ("torchvision", "sklearn"):
        if f"import {package}" in (text := (EXAMPLES / name).read_text()) or f"from {package}" in text:
            pytest.importorskip(package)
    small, shown = RUNS[name]
    output = run(name, *small.split(), cache=tmp_path)
    assert re.search(shown, output, re.MULTILINE), output


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_says_how_it_is_used(name):
    source = (EXAMPLES / name).read_text()
    head, options = source.split('"""')[1], re.findall(r'add_argument\("(--[a-z]+)"', source)
    assert f"python examples/{name}" in head and options
    assert set(re.findall(r"\[(--[a-z]+)", head)) <= set(options)


def test_help_is_short(tmp_path):
    usage = run(QUICKEST, "--help", cache=tmp_path)
    assert "A residual network as tutorials write it" in usage and "--size" in usage
