"""setup.py: what it decides, that a failure stops nothing, and that the library keeps to libtorch's stable ABI."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("setting", "reason"), [("SKIP_CPP", {"cpu": "SKIP_CPP", "cuda": "SKIP_CPP"}),
                                                 ("SKIP_CUDA", {"cuda": "SKIP_CUDA"})])
def test_settings_leave_parts_out(setup_script, monkeypatch, setting, reason):
    monkeypatch.setenv(f"FUSED_RESNET_{setting}", "1")
    for part, text in reason.items():
        assert text in setup_script.decide()[part]


@pytest.mark.parametrize("absent", ["c++", "ninja", "nvcc"])
def test_absent_tools_leave_parts_out(setup_script, monkeypatch, absent):
    monkeypatch.setattr(setup_script, "tool", lambda name: None if name == absent else f"/bin/{name}")
    monkeypatch.setattr(setup_script, "CXX", "c++")
    monkeypatch.setenv("FUSED_RESNET_CUDA", "1")
    found = setup_script.decide()
    assert absent in found["cuda"] and (found["cpu"] is None) == (absent == "nvcc")


def test_a_build_that_fails_is_reported_and_stops_nothing(setup_script, monkeypatch, tmp_path, capsys):
    if setup_script.decide()["cpu"] is not None:
        pytest.skip(setup_script.decide()["cpu"])
    monkeypatch.setenv("FUSED_RESNET_SKIP_CUDA", "1")
    monkeypatch.setattr(setup_script, "SOURCES", {"cpu": [Path("no_such_file.cpp")], "cuda": []})
    verdicts = setup_script.build(tmp_path, tmp_path / "work")
    assert "its build failed" in verdicts["cpu"] and "no_such_file" in capsys.readouterr().err
    note = json.loads((tmp_path / "_native.json").read_text())
    assert verdicts.items() <= note.items() and note["archs"] == ["80", "90a"] and "sm90" in note
    assert not list(tmp_path.glob("*.so"))


def undefined(library):
    """The symbols that a library needs of others, those of the C and C++ runtimes left out."""
    nm = shutil.which("nm") or pytest.skip("there is no nm")
    lines = subprocess.run([nm, "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1] for line in lines.splitlines()}
    return {name for name in names if not re.search(r"@(GLIBC|GCC|CXXABI)", name)
            and not name.startswith(("_ITM_", "__gmon_start__"))}


def test_the_library_needs_stable_symbols_alone(library):
    needed = undefined(library)
    assert needed and all(name.startswith(("aoti_torch_", "torch_")) for name in needed), sorted(needed)


def test_the_library_knows_nothing_of_python(library):
    assert b"libpython" not in library.read_bytes() and not any("Py" in name for name in undefined(library))


def test_importing_the_package_loads_nothing():
    code = ("import fused_resnet, fused_resnet.native as native, torch; "
            "raise SystemExit(hasattr(torch.ops.fused_resnet, '_bn_act') or native.missing.cache_info().misses)")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
