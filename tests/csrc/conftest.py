"""What is made of csrc/ for the tests, once a session, in folders of their own."""

import importlib.util
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fused_resnet import native

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
PARTS = ("testing", "bn_act", "conv", "finalise", "stem")  # of the module fused_resnet_testing
BUILT: list[Path] = []  # the CPU part, once a session, whichever folder of tests asks first


def module_from(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def setup_script():
    """setup.py as a module."""
    return module_from("fused_resnet_setup", ROOT / "setup.py")


def compile_emulation(sources, folder, objects=(), parts=PARTS):
    """Builds a test module from the csrc folder `sources`; returns its file.

    Args:
        sources: the csrc folder.
        folder: where the module and its object files go.
        objects: object files that another build has made, which are taken as they are.
        parts: files of csrc/testing that make the module.
    """
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed")
    compiler = shutil.which("c++") or pytest.skip("there is no C++ compiler")
    includes = [f"-I{path}" for path in (sources, pybind11.get_include(), sysconfig.get_paths()["include"])]
    made = {path.stem: path for path in objects}
    # What is built beside other objects has a deliberate fault, which may leave a name idle.
    warnings = () if objects else ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")

    def compiled(part):
        source, target = sources / f"testing/{part}.cpp", folder / f"{part}.o"
        subprocess.run([compiler, "-std=c++20", "-O1", "-fPIC", *warnings, *includes, "-c", source, "-o", target],
                       check=True, capture_output=True, text=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        linked = [*made.values(), *pool.map(compiled, [part for part in parts if part not in made])]
    target = folder / f"fused_resnet_{parts[0]}.so"
    subprocess.run([compiler, "-shared", *linked, "-o", target], check=True)
    return target


@pytest.fixture(scope="session")
def emulation(tmp_path_factory):
    """The module `fused_resnet_testing`: index arithmetic, and the GPU's kernels on the CPU."""
    return module_from("fused_resnet_testing", compile_emulation(CSRC, tmp_path_factory.mktemp("emulation")))


@pytest.fixture(scope="session")
def sm90(tmp_path_factory):
    """The module `fused_resnet_sm90`: the same of the sm_90a convolution."""
    folder = tmp_path_factory.mktemp("sm90")
    return module_from("fused_resnet_sm90", compile_emulation(CSRC, folder, parts=("sm90",)))


@pytest.fixture(scope="session")
def library(setup_script, tmp_path_factory):
    """The CPU part of this tree, loaded: the installed one, or a build of its own where csrc has changed since."""
    if BUILT:
        return BUILT[0]
    installed = native.FOLDER / "_C_cpu.so"
    sources = [ROOT / "setup.py", *(path for path in CSRC.rglob("*") if path.is_file())]
    if installed.exists() and installed.stat().st_mtime > max(path.stat().st_mtime for path in sources):
        assert native.missing("cpu") is None
        BUILT.append(installed)
        return installed
    folder = tmp_path_factory.mktemp("native")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSED_RESNET_SKIP_CUDA", "1")
        reason = setup_script.build(folder, folder / "work")["cpu"]
    if reason is not None and "build failed" not in reason:
        pytest.skip(reason)
    assert reason is None, reason
    if not hasattr(torch.ops.fused_resnet, "_bn_act"):
        native.FOLDER = folder
        native.missing.cache_clear()
    assert native.missing("cpu") is None
    BUILT.append(folder / "_C_cpu.so")
    return BUILT[0]


@pytest.fixture(params=["baseline", "avx2", "avx512", "avx512dot"])
def isa(request, library):
    """The name of an instruction set that the processor has."""
    try:
        torch.ops.fused_resnet._conv_pack(torch.ones(1, 1, 1, 1), *[None] * 5, 0.0, (1, 1), 1, "direct", request.param)
    except RuntimeError as error:
        assert "this processor or this build has no" in str(error)
        pytest.skip(str(error).splitlines()[0])
    return request.param
