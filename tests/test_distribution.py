"""The source distribution, the wheels made of it, and what they are in an environment that has nothing else.

The environment is new and sees only the packages that the metadata ask for. These are links to the installed ones, so
that no test downloads torch.
"""

import email
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import fused_resnet as fr

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUILD = "import sys, setuptools.build_meta as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"
# Nothing of the environment of a test run that would change what is built or installed.
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("FUSED_RESNET_", "PYTHON", "TRITON_", "PIP_"))}
gate = pytest.mark.gate
pytestmark = pytest.mark.xdist_group("distribution")  # a wheel takes a minute


def run(*command, **environment):
    done = subprocess.run(command, env={**CLEAN, **environment}, cwd="/", text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind, tree, out, **settings):
    """Builds an `sdist` or a `wheel` of `tree`, without a frontend, which would download setuptools."""
    out.mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, "-c", BUILD, kind, out], cwd=tree, text=True, capture_output=True,
                          env={**CLEAN, "SOURCE_DATE_EPOCH": "1700000000", "FUSED_RESNET_SKIP_CUDA": "1", **settings})
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


def listed(*folders):
    """The files of this tree in `folders`, by their paths: what git has, and what it would take."""
    git = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", *folders], cwd=ROOT, capture_output=True,
                         text=True)
    if git.returncode:
        pytest.skip("this is no git checkout")
    return {name for name in git.stdout.split("\n") if name and (ROOT / name).exists()}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tree")  # without what else lies here: caches, builds, libraries
    for name in listed():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return build("sdist", folder, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def source(sdist, tmp_path_factory):
    """The unpacked source distribution: all that a wheel is built from."""
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    """With the library where this machine can build it."""
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def pure(source, tmp_path_factory):
    return build("wheel", source, tmp_path_factory.mktemp("pure"), FUSED_RESNET_SKIP_CPP="1")


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def closure(names):
    """Every installed distribution that `names` need, themselves among them."""
    found, todo = {}, [Requirement(name) for name in names]
    while todo:
        wanted = todo.pop()
        key = re.sub(r"[-_.]+", "-", wanted.name).lower()
        try:
            found[key] = importlib.metadata.distribution(key)
        except importlib.metadata.PackageNotFoundError:
            continue  # pip will say so if it matters
        for text in found[key].requires or ():
            needed = Requirement(text)
            extras = [{"extra": extra} for extra in (*wanted.extras, "")]
            fits = needed.marker is None or any(needed.marker.evaluate(extra) for extra in extras)
            if fits and re.sub(r"[-_.]+", "-", needed.name).lower() not in found:
                todo.append(needed)
    return found.values()


def environment(folder, requirements):
    """A new virtual environment that sees `requirements` and what they need; returns its Python."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin/python"
    place = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for distribution in closure(requirements):
        for file in distribution.files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (place / top).exists():
                (place / top).symlink_to(distribution.locate_file(top))
    return python


def install(python, wheel, extra=""):
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", f"--python={python}", "install", "--no-index",
        f"{wheel}{extra}")
    return python.parent


def test_the_version_has_one_source():
    assert "version" not in PROJECT["project"] and PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "fused_resnet.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|a\d+|b\d+|rc\d+)?", fr.__version__)


def test_the_changelog_keeps_its_form():
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert all(re.fullmatch(r"\[(Unreleased|\d+\.\d+\.\d+)\]( - (unreleased|\d{4}-\d\d-\d\d))?", h) for h in headings)
    assert any(h.startswith((f"[{fr.__version__}]", "[Unreleased]")) for h in headings[:1])
    known = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= known


@gate
def test_the_sdist_holds_all_that_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    wanted = listed("csrc", "fused_resnet", "docs", "examples") | {"pyproject.toml", "setup.py", "README.md", "LICENSE"}
    assert wanted - names == set()
    assert not [name for name in names if name.startswith("tests/") or name.endswith((".so", "_native.json"))]


@gate
def test_a_wheel_holds_the_package_and_its_data(wheel, pure):
    package = listed("fused_resnet")
    for built in (wheel, pure):
        found = contents(built)
        assert package - set(found) == set()
        foreign = [name for name in found if not name.startswith(("fused_resnet/", f"fused_resnet-{fr.__version__}."))]
        assert not foreign
        head = email.message_from_bytes(found[f"fused_resnet-{fr.__version__}.dist-info/METADATA"])
        assert head["Version"] == fr.__version__ and head["License-Expression"] == "BSD-3-Clause"
    assert {"fused_resnet/py.typed", "fused_resnet/tables/sm_90.json"} <= set(contents(pure))


@gate
def test_without_a_compiler_the_wheel_is_pure(pure):
    assert pure.name == f"fused_resnet-{fr.__version__}-py3-none-any.whl"
    found = contents(pure)
    assert not [name for name in found if name.endswith(".so")]
    assert b"left out by FUSED_RESNET_SKIP_CPP" in found["fused_resnet/_native.json"]


@gate
def test_the_library_serves_every_python_and_knows_no_path_of_its_builder(wheel, source, tmp_path):
    if wheel.name.endswith("-any.whl"):
        pytest.skip("this machine cannot build the library")
    assert re.fullmatch(rf"fused_resnet-{re.escape(fr.__version__)}-py3-none-linux_\w+\.whl", wheel.name)
    found = contents(wheel)
    assert "fused_resnet/_C_cpu.so" in found, found["fused_resnet/_native.json"].decode()
    for name in ("fused_resnet/_C_cpu.so", "fused_resnet/_native.json"):
        for place in (source, ROOT, Path(torch.__file__).parent):
            assert f"{place}/".encode() not in found[name], f"{name} names {place}"
    readelf = shutil.which("readelf") or pytest.skip("there is no readelf")
    library = tmp_path / "_C_cpu.so"
    library.write_bytes(found["fused_resnet/_C_cpu.so"])
    assert not re.search(r"\((RPATH|RUNPATH)\)", run(readelf, "-d", library))


@gate
def test_the_same_source_makes_the_same_wheel_elsewhere(source, pure, tmp_path):
    made = shutil.ignore_patterns("build", "*.egg-info")
    again = shutil.copytree(source, tmp_path / "another" / "folder", ignore=made)
    assert build("wheel", again, tmp_path, FUSED_RESNET_SKIP_CPP="1").read_bytes() == pure.read_bytes()


USE = """
import sys, torch, fused_resnet as fr
assert fr.__file__.startswith(sys.prefix), fr.__file__
model = fr.models.cifar_resnet(8).eval()
fused = fr.fuse(model)
x = torch.randn(2, 3, 32, 32)
with torch.no_grad():
    fused(x)
print(bool(fr.report(fused)), bool(fr.verify(model, fused, x)))
"""


@gate
@pytest.mark.parametrize("which", ["wheel", "pure"])
def test_the_package_needs_no_more_than_it_says(which, request, tmp_path):
    """torch, triton and numpy, with what they need in turn; the command line then asks for its extra."""
    python = environment(tmp_path / "env", PROJECT["project"]["dependencies"])
    folder = install(python, request.getfixturevalue(which))
    assert run(python, "-c", USE, FUSED_RESNET_CACHE_DIR=str(tmp_path)).split() == ["True", "True"]
    done = subprocess.run([folder / "fused-resnet", "env"], env=CLEAN, capture_output=True, text=True)
    assert done.returncode == 2 and "pip install 'fused_resnet[cli]'" in done.stderr, done.stderr


@gate
def test_the_command_line_needs_its_extra_alone(wheel, tmp_path):
    extra = PROJECT["project"]["optional-dependencies"]["cli"]
    python = environment(tmp_path / "env", [*PROJECT["project"]["dependencies"], *extra])
    folder = install(python, wheel, "[cli]")
    shown = run(folder / "fused-resnet", "env", FUSED_RESNET_CACHE_DIR=str(tmp_path))
    assert re.search(rf"^ +version +{re.escape(fr.__version__)}$", shown, re.MULTILINE), shown
    if not wheel.name.endswith("-any.whl"):
        assert re.search(r"^ +cpu +/.*_C_cpu\.so$", shown, re.MULTILINE), shown


@gate
def test_type_checkers_read_an_installed_package(pure, tmp_path):
    """The whole of `mypy --strict` on a user's program, with nothing of this project's settings."""
    python = environment(tmp_path / "env", PROJECT["project"]["dependencies"])
    install(python, pure)
    shutil.copy(ROOT / "tests/typing/user.py", tmp_path)
    settings = tmp_path / "mypy.ini"
    settings.write_text("[mypy]\nstrict = True\n")
    done = subprocess.run([sys.executable, "-m", "mypy", f"--config-file={settings}", f"--python-executable={python}",
                           "user.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
