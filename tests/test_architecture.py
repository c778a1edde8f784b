"""The rooms and who may import whom, read from the source itself."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fused_resnet"
MAX_LINES = 400

LEAVES = {"problem", "numerics", "int8", "timing", "judge", "library", "settings"}
BELOW_OPS = LEAVES | {"tuning", "backends", "tuner"}
BELOW_NN = BELOW_OPS | {"ops", "functional"}
BELOW_FUSING = BELOW_NN | {"nn", "models", "native", "tape"}
BELOW_TESTING = BELOW_FUSING | {"fusing"}
BELOW_BENCH = BELOW_TESTING | {"testing", "graphs"}
# Room -> the rooms that it may import; its own is always allowed.
ALLOWED = {
    "problem": set(),
    "numerics": set(),
    "int8": set(),
    "timing": set(),
    "settings": set(),
    "judge": {"problem", "numerics"},
    "library": LEAVES,
    "tuning": LEAVES,
    "native": LEAVES,
    "tape": LEAVES | {"native"},
    "backends": LEAVES | {"tuning", "native", "tape"},
    "tuner": LEAVES | {"tuning", "backends"},
    "kernels": {"problem", "tuning", "numerics", "int8", "native", "tape", "settings"},
    "ops": BELOW_OPS | {"native", "tape"},
    "functional": BELOW_OPS | {"ops"},
    "graphs": BELOW_OPS | {"kernels"},
    "nn": BELOW_NN,
    "models": BELOW_NN | {"nn"},
    "fusing": BELOW_FUSING,
    "testing": BELOW_TESTING | {"kernels"},
    "bench": BELOW_BENCH | {"__init__"},
    "cli": BELOW_BENCH | {"bench", "native", "__init__"},
    "__main__": {"cli"},
    "__init__": BELOW_BENCH | {"bench"},
}
# Every other file than these stays clear of the thing.
TRITON = {"kernels/triton", "testing/aot.py"}
TORCH_LIBRARY = {"library.py", "testing/shim.py"}
ENVIRONMENT = {"settings.py"}

FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
ALL_FILES = sorted(path.relative_to(ROOT).as_posix() for folder in ("fused_resnet", "tests", "benchmarks", "csrc")
                   for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".cu", ".cuh", ".cpp", ".h"})


@functools.cache
def tree(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text())


def imports(file: str) -> set[str]:
    """Absolute names of all modules that `file` imports, wherever in the file."""
    found = set()
    package = ["fused_resnet", *Path(file).parent.parts]
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{name}.{alias.name}" for alias in node.names}
    return found


def dotted(file: str) -> set[str]:
    """Every `a.b` and `a.b.c` that `file` reads as an attribute."""
    return {ast.unparse(node) for node in ast.walk(tree(file)) if isinstance(node, ast.Attribute)}


def within(file: str, places: set[str]) -> bool:
    return any(file == place or file.startswith(place + "/") for place in places)


def room(module: str) -> str:
    """`fused_resnet.nn.blocks` is of the room `nn`; a public name such as `fused_resnet.fuse` is of `__init__`."""
    first = module.split(".")[1] if "." in module else ""
    return first if first in ALLOWED else "__init__"


@pytest.mark.parametrize("file", FILES)
def test_imports_go_one_way(file):
    own = file.removesuffix(".py").split("/")[0]
    assert own in ALLOWED, f"{file} is in no room: add it to ALLOWED and to CONTRIBUTING.md"
    ours = {name for name in imports(file) if name.split(".")[0] == "fused_resnet"}
    wrong = {name for name in ours if room(name) not in ALLOWED[own] | {own}}
    assert not wrong, f"{file} ({own}) may not import {sorted(wrong)}"


@pytest.mark.parametrize("file", FILES)
def test_each_dependency_has_one_door(file):
    names = {name.split(".")[0] for name in imports(file)}
    assert "triton" not in names or within(file, TRITON), f"{file} imports triton"
    library = any(name.startswith("torch.library") for name in dotted(file) | imports(file))
    assert not library or within(file, TORCH_LIBRARY), f"{file} touches torch.library"
    reads = {"os.environ", "os.getenv"} & (dotted(file) | imports(file))
    assert not reads or within(file, ENVIRONMENT), f"{file} reads the environment; ask fused_resnet.settings"


@pytest.mark.parametrize("file", ALL_FILES)
def test_files_stay_readable_in_one_sitting(file):
    lines = len((ROOT / file).read_text().splitlines())
    assert lines <= MAX_LINES, f"{file} has {lines} lines, more than {MAX_LINES}"


@pytest.mark.parametrize("file", ALL_FILES)
def test_the_tree_stands_alone(file):
    outside = "../" + "shared"
    assert outside not in (ROOT / file).read_text(), f"{file} reads a folder outside of the repository"


def test_kernels_share_no_code_between_backends():
    for file in FILES:
        parts = Path(file).parts
        if parts[0] == "kernels" and len(parts) > 2:
            foreign = {name for name in imports(file) if name.startswith("fused_resnet.kernels.")
                       and name.split(".")[2] in {"triton", "cpu", "cudnn", "cuda"} - {parts[1]}}
            assert not foreign, f"{file} imports {sorted(foreign)}"


# Room of csrc/ -> the rooms that it may include; `testing` is never shipped.
INCLUDES = {"common": {"common"}, "cpu": {"common", "cpu"}, "cuda": {"common", "cuda", "testing"},
            "testing": {"common", "cuda", "testing"}}


def included(path: Path) -> set[str]:
    return set(re.findall(r'^#include [<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE))


def sources(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / "csrc" / folder).rglob("*") if path.is_file())


@pytest.mark.parametrize("folder", INCLUDES)
def test_rooms_of_csrc_include_one_way(folder):
    for path in sources(folder):
        ours = {name for name in included(path) if (ROOT / "csrc" / name).exists()}
        wrong = {name for name in ours if name.split("/")[0] not in INCLUDES[folder]}
        assert not wrong, f"{path.name} ({folder}) may not include {sorted(wrong)}"
        torch = {name for name in included(path) if name.startswith(("torch/", "ATen/", "c10/"))}
        stable = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
        assert all(name.startswith(stable) for name in torch), f"{path.name} leaves the stable ABI: {sorted(torch)}"


def test_what_runs_in_emulation_asks_the_gpu_through_one_header():
    """Kernels (.cuh) hold no PTX and no CUDA of their own."""
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cuh")):
        assert not re.search(r"\basm\b|__\w+__\b|threadIdx|blockIdx", path.read_text()), path.name


def closure(path: Path) -> set[str]:
    """Everything that `path` includes, and what that includes in turn."""
    found, todo = set(), [path]
    while todo:
        for name in included(todo.pop()) - found:
            found.add(name)
            if (ROOT / "csrc" / name).exists():
                todo.append(ROOT / "csrc" / name)
    return found


@pytest.mark.parametrize("path", sources("cpu/isa"), ids=lambda path: path.stem)
def test_what_is_compiled_for_each_instruction_set_shares_nothing(path):
    """No torch and no C++ library: the linker would take a template's copy with AVX-512 for every processor.

    Whatever one of ours defines has internal linkage, or is in the namespace of its instruction set.
    """
    names = closure(path)
    foreign = {name for name in names if not (ROOT / "csrc" / name).exists()}
    known = {"cmath", "cstdint", "cstring", "immintrin.h", "utility", "cuda_bf16.h", "cuda_fp16.h"}
    assert foreign <= known, sorted(foreign)
    for name in names - foreign:  # of the C++ library, types alone
        code = (ROOT / "csrc" / name).read_text()
        assert set(re.findall(r"std::\w+", code)) <= {"std::integer_sequence", "std::make_integer_sequence"}, name


def test_the_package_declares_neither_a_torch_nor_a_triton_version():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    every = project["dependencies"] + [need for extra in project["optional-dependencies"].values() for need in extra]
    pinned = [need for need in every if "==" in need.split(";")[0]]
    assert not pinned, f"pinned in the package's metadata: {pinned}"
