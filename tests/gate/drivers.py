"""Programs of tests/csrc/driver: parts of csrc/cpu built without torch, under sanitizers, and with faults in them."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.csrc import conftest as made

CXX = shutil.which("c++")
DRIVER = made.ROOT / "tests/csrc/driver"
STRICT = ("-Werror", "-Wno-error=maybe-uninitialized")  # of which gcc 12's own intrinsics are accused
HEADERS = ("csrc/inductor/aoti_torch/c/shim.h", "csrc/stable/library.h", "csrc/stable/ops.h", "csrc/stable/tensor.h",
           "headeronly/core/ScalarType.h", "headeronly/util/Exception.h")  # of torch, in place of which stub.h stands


def units(setup_script, loops, others, flags=(), *, csrc=made.CSRC, isas=("baseline",), special=None):
    """Object file -> what compiles it: the source and its flags.

    Args:
        loops: names in csrc/cpu/isa, each compiled for every one of `isas`.
        others: sources that know torch's types.
        special: name of a source -> what takes the place of `flags` there.
    """
    vector = [flag for flag in setup_script.LOOPS.split() if "$" not in flag and not flag.startswith("-I")]
    march = lambda isa: setup_script.ISAS[isa].split() if isa != "baseline" else ()
    has = ["-std=c++20", *(f"-DFR_HAS_{isa.upper()}" for isa in isas if isa != "baseline")]
    own = lambda name: (special or {}).get(name, flags)
    return {f"{name}.{isa}.o": [csrc / f"cpu/isa/{name}.cpp", *vector, *STRICT, f"-DFR_ISA={isa}", *march(isa),
                                "-O1", *own(name)] for name in loops for isa in isas} | {
        f"{path.stem}.o": [path, *has, "-O1", *own(path.stem)] for path in others}


def build(folder, units, flags=(), *, csrc=made.CSRC, compiler=CXX, sound=()):
    """Compiles `units` in `folder`, two at a time, and links them with `flags`; returns the program.

    Args:
        sound: object files of another build, which are taken as they are.
    """
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    for name in HEADERS:
        (folder / "torch" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "torch" / name).write_text('#include "stub.h"\n')

    def run(*command):
        done = subprocess.run([compiler, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]

    def compiled(name):
        run(*units[name], *(f"-I{path}" for path in (csrc, DRIVER, folder)), "-MMD", "-c", "-o", folder / name)
        return folder / name

    known = {path.name for path in sound}
    with ThreadPoolExecutor(2) as pool:
        objects = [*sound, *pool.map(compiled, [name for name in units if name not in known])]
    run(*flags, *objects, "-pthread", "-o", folder / "driver")
    return folder / "driver"


def judged(make, complaint, faults, folders):
    """Fault -> what the program says of it, "" -> of the sound sources; two builds at a time, of what a fault is in.

    Args:
        make: called with a folder, csrc and object files of the sound build, builds the program.
        complaint: what is wrong with a program, or None.
        faults: name -> file, what stands there, what the fault makes of it.
        folders: pytest's tmp_path_factory.
    """
    folder = folders.mktemp("sound")
    said = {"": complaint(make(folder, made.CSRC, ()))}

    def judge(fault):
        file, before, after = faults[fault]
        own = folders.mktemp("fault", numbered=True)
        shutil.copytree(made.CSRC, own / "csrc")
        text = (own / "csrc" / file).read_text()
        assert text.count(before) == 1, f"{before!r} stands {text.count(before)} times in {file}"
        (own / "csrc" / file).write_text(text.replace(before, after))
        sound = [path for path in folder.glob("*.o") if str(made.CSRC / file) not in path.with_suffix(".d").read_text()]
        return complaint(make(own, own / "csrc", sound))

    with ThreadPoolExecutor(2) as pool:
        return said | dict(zip(faults, pool.map(judge, faults), strict=True))
