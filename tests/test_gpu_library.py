"""The native library is built once for its sources before a stage, and what keeps it from being built is said."""

import pytest

from benchmarks import library

FAKE = """
import json, sys, time
from pathlib import Path
out, work = map(Path, sys.argv[1:])
work.mkdir(parents=True, exist_ok=True)
with open(work / "runs", "a") as runs:
    import os
    runs.write(os.environ["FUSED_RESNET_CUDA_ARCHS"] + os.environ["FUSED_RESNET_CUDA"] + " ")
for part in ("cpu", "cuda"):
    (out / f"_C_{part}.so").write_text(part)
(out / "_native.json").write_text(json.dumps({"cpu": None, "cuda": VERDICT, "sm90": SM90}))
"""


@pytest.fixture
def build(monkeypatch, tmp_path):
    """`build(verdict)`: a build that takes no time; `build.runs()` names the architectures of those that ran."""
    out, work = tmp_path / "out", tmp_path / "work"
    out.mkdir()

    def call(verdict="None", arch=90, code=FAKE, budget=540.0, sm90="None"):
        monkeypatch.setattr(library, "CODE", code.replace("VERDICT", verdict).replace("SM90", sm90))
        return library.build(arch, budget, out, work)

    call.runs = lambda: (work / "runs").read_text().split()
    call.out = out
    return call


def test_a_library_is_built_once_for_the_gpu_that_is_there(build, monkeypatch):
    row = build()
    assert (row["status"], row["arch"], row["detail"]) == ("ok", "90a", "") and row["seconds"] >= 0
    assert build() == row and build.runs() == ["90a1"]
    assert "sm_90a: ok" in library.describe(row)
    (build.out / "_C_cuda.so").unlink()  # as `make clean` does
    build()
    assert build(arch=86)["arch"] == "86" and build.runs() == ["90a1", "90a1", "861"]
    monkeypatch.setattr(library, "sources", lambda arch: "others")
    build()
    assert len(build.runs()) == 4


def test_a_part_that_cannot_be_built_gives_its_reason_and_is_tried_again(build):
    for _ in range(2):
        row = build("'nvcc was not found\\nwhile building'")
        assert row["status"] == "failed" and row["detail"] == "cuda: nvcc was not found while building"
    assert build()["status"] == "ok" and len(build.runs()) == 3


def test_what_was_left_out_is_said(build):
    row = build(sm90="'there was no nvidia-cutlass'")
    assert row["status"] == "ok" and row["detail"] == "without the tiles of sm_90a: there was no nvidia-cutlass"
    assert build(sm90="'there was no nvidia-cutlass'", arch=80)["detail"] == ""


def test_a_build_without_a_verdict_or_an_end_fails(build, monkeypatch):
    row = build(code="raise SystemExit('no setuptools')")
    assert row["status"] == "failed" and "no setuptools" in row["detail"]
    monkeypatch.setattr(library, "LEAST", 0.5)
    row = build(code="import time; time.sleep(99)", budget=0.0)
    assert row["status"] == "failed" and "no end after" in row["detail"] and row["seconds"] < 20


def test_the_script_that_builds_is_setups_own(tmp_path, monkeypatch):
    """The real one, told to build nothing."""
    monkeypatch.setenv("FUSED_RESNET_SKIP_CPP", "1")
    row = library.build(90, 60.0, tmp_path, tmp_path / "work")
    assert row["status"] == "failed" and "left out by FUSED_RESNET_SKIP_CPP" in row["detail"]
