"""examples/serve_aoti: a C++ program runs a package of a lowered ResNet-50 without Python, as stock computes it."""

import copy
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

import fused_resnet as fr
from fused_resnet import numerics
from tests.csrc.conftest import library, setup_script  # noqa: F401

SERVE = Path(__file__).parents[2] / "examples/serve_aoti"
SIZE, BATCHES = 64, (2, 5)


def run(*command):
    """Nothing of Python in the environment: what the program needs, it has from its libraries."""
    environment = {key: text for key, text in os.environ.items() if "PYTHON" not in key and key != "VIRTUAL_ENV"}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True,
                          env=environment | {"PATH": "/usr/bin:/bin"})


@pytest.fixture(scope="module")
def served(library, tmp_path_factory):  # noqa: F811
    """The folder that build.sh and export.py have filled."""
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("serve")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export.py", "--out", str(folder), "--size", str(SIZE), "--batch", str(BATCHES[0])])
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
        runpy.run_path(str(SERVE / "export.py"), run_name="__main__")
        patch.setenv("PYTHON", sys.executable)
        subprocess.run(["sh", SERVE / "build.sh", folder], check=True)
    return folder


@pytest.fixture(scope="module")
def model():
    """That of export.py, with its input."""
    torch.manual_seed(0)
    return fr.models.resnet50().eval(), torch.randn(BATCHES[0], 3, SIZE, SIZE)


def judged(result, model, x):
    with torch.no_grad(), fr.backends.use("reference"):
        stock, exact = model(x), copy.deepcopy(model).double()(x.double())
    bound = numerics.check_network(result, stock, exact, dtype="fp32")
    assert bound.ok, str(bound)
    return stock


@pytest.mark.parametrize("batch", BATCHES)
def test_the_program_computes_what_stock_computes(served, library, model, batch):  # noqa: F811
    net, x = model
    x = torch.cat((x, torch.randn(batch - len(x), *x.shape[1:])))
    x.numpy().tofile(served / "x.bin")
    with torch.no_grad():
        net(x).numpy().tofile(served / "y.bin")
    done = run(served / "serve", library, served / "model.pt2", served / "x.bin", *x.shape, served / "y.bin",
               served / "out.bin")
    assert done.returncode == 0 and " ms a call" in done.stdout, done.stdout + done.stderr
    result = torch.from_numpy(numpy.fromfile(served / "out.bin", numpy.float32)).view(batch, -1)
    stock = judged(result, net, x)
    for n, best in enumerate(stock.argmax(1).tolist()):
        assert f"image {n}: class {best}\n" in done.stdout


def test_the_program_notices_another_result(served, library):  # noqa: F811
    reference = numpy.fromfile(served / "reference.bin", numpy.float32)
    (-reference).tofile(served / "wrong.bin")
    call = [served / "serve", library, served / "model.pt2", served / "input.bin", BATCHES[0], 3, SIZE, SIZE]
    assert run(*call, served / "reference.bin").returncode == 0
    done = run(*call, served / "wrong.bin")
    assert done.returncode == 1 and "2 classes differ from the reference" in done.stderr
    done = run(*call[:-1], 2 * SIZE, served / "reference.bin")
    assert done.returncode == 1 and "does not hold" in done.stderr


def test_the_package_needs_the_library(served):
    done = run(served / "serve", "/no/such/library.so", served / "model.pt2", served / "input.bin", BATCHES[0], 3, SIZE,
               SIZE, served / "reference.bin")
    assert done.returncode == 1 and "/no/such/library.so" in done.stderr


def test_nothing_links_python(served, library):  # noqa: F811
    for binary in (served / "serve", library):
        linked = run("ldd", binary).stdout
        assert "libtorch_cpu" in linked and "python" not in linked.replace(str(Path(torch.__file__).parent), "")


def test_the_package_runs_in_python_as_well(served, model):
    net, x = model
    package = torch._inductor.aoti_load_package(str(served / "model.pt2"))
    with torch.no_grad():
        judged(package(x), net, x)
        judged(package(x[:1]), net, x[:1])
