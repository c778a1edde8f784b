"""Builds the libraries of csrc/: what cannot be built is left out, with the reason, and stops no installation.

    FUSED_RESNET_SKIP_CPP=1     pure Python
    FUSED_RESNET_SKIP_CUDA=1    no CUDA part
    FUSED_RESNET_CUDA=1         the CUDA part beside a CPU build of torch, too: it takes nvcc, but no GPU
    FUSED_RESNET_CUDA_ARCHS     default "80;90a"
    FUSED_RESNET_CUTLASS        CuTe's headers, which the sm_90a convolution takes; default those of nvidia-cutlass
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import import_module, util
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
CXX, ARCHS = os.environ.get("CXX", "c++"), os.environ.get("FUSED_RESNET_CUDA_ARCHS", "80;90a")
# The ABI of torch 2.11, which every later one keeps; -isystem because torch's headers have warnings.
STABLE = f"-std=c++20 -DNDEBUG -DTORCH_TARGET_VERSION=0x020b000000000000 -I{CSRC} -isystem $torch/include"
# Error messages name csrc/cpu/conv.cpp, not where it stood on the machine that built it.
HOST = f"-fPIC -fvisibility=hidden -ffile-prefix-map={ROOT}/= -ffile-prefix-map=$torch/="
CPP = f"{STABLE} -O2 {HOST} -Wall -Wextra"
# No flag of -ffast-math that changes a result.
LOOPS = f"-std=c++20 -O3 {HOST} -fno-math-errno -fno-trapping-math -Wall -Wextra -I{CSRC}"
ISAS = {"baseline": ""} if platform.machine() != "x86_64" else {
    "baseline": "", "avx2": "-march=x86-64-v3", "avx512": (wide := "-march=x86-64-v4 -mprefer-vector-width=512"),
    "avx512dot": f"{wide} -mavx512bf16 -mavx512vnni"}
NVCC = f"{STABLE} -O3 -DUSE_CUDA -Xcompiler {HOST.replace(' ', ',')} --threads 2"
SOURCES = {"cpu": [CSRC / "schemas.cpp", *sorted(CSRC.glob("cpu/*.cpp"))], "cuda": sorted(CSRC.glob("cuda/*.cu"))}
PACKAGE = util.find_spec("cutlass_library")
CUTLASS = os.environ.get("FUSED_RESNET_CUTLASS") or (PACKAGE and f"{Path(PACKAGE.origin).parent}/source/include")
SM90 = None if CUTLASS and "90a" in ARCHS else "nvidia-cutlass was not found while building, or 90a is no target"
RULES = "".join(f"rule {name}\n  command = ${name} $flags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n"
                for name in ("cpp", "nvcc")) + "rule link\n  command = $cpp -shared -o $out $in $flags"


def tool(name):
    return shutil.which(name) or shutil.which(name, path=Path(sys.executable).parent)


def decide():
    """Part -> None where it is to be built, else the reason why not."""
    wanted = lambda name: os.environ.get(f"FUSED_RESNET_{name}", "0") not in ("", "0")
    lacking = [name for name in (CXX, "ninja") if not tool(name)]
    cpu = "left out by FUSED_RESNET_SKIP_CPP" if wanted("SKIP_CPP") else (
        "torch was not there while building: use pip install --no-build-isolation" if not util.find_spec("torch") else
        f"{lacking[0]} was not found while building" if lacking else None)
    cuda = cpu or ("left out by FUSED_RESNET_SKIP_CUDA" if wanted("SKIP_CUDA") else
                   "nvcc was not found while building" if not tool("nvcc") else
                   None if wanted("CUDA") or import_module("torch").version.cuda else
                   "this build of torch has no CUDA; FUSED_RESNET_CUDA=1 builds the part anyway")
    return {"cpu": cpu, "cuda": cuda}


def write_ninja(part, out, work):
    """Writes to `work` how the part's library in `out` is made; returns the library."""
    lines = [f"cpp = {CXX}", f"torch = {Path(util.find_spec('torch').origin).parent}", f"nvcc = {tool('nvcc')}", RULES]

    def edge(name, rule, source, flags):
        lines.append(f"build {name}: {rule} {source}\n  flags = {flags}")
        return str(name)

    rule, flags = ("cpp", CPP + "".join(f" -DFR_HAS_{isa.upper()}" for isa in ISAS)) if part == "cpu" else (
        "nvcc", NVCC + "".join(f" -gencode arch=compute_{arch},code=sm_{arch}" for arch in ARCHS.split(";")))
    own = {"conv_sm90.cu": f"{NVCC} -gencode arch=compute_90a,code=sm_90a --expt-relaxed-constexpr -isystem {CUTLASS}"}
    objects = [edge(f"{source.name}.o", rule, source, own.get(source.name, flags) + " -DFR_HAS_SM90" * (SM90 is None))
               for source in SOURCES[part] if SM90 is None or source.name not in own]
    link = "-L$torch/lib -ltorch_cpu"
    if part == "cpu":
        objects += [edge(f"{source.stem}.{isa}.o", "cpp", source, f"{LOOPS} -DFR_ISA={isa} {flags}")
                    for isa, flags in ISAS.items() for source in sorted(CSRC.glob("cpu/isa/*.cpp"))]
    else:  # torch's own CUDA library need not be there: the stub has its name and the three symbols that are needed
        stub = edge("stub.o", "cpp", CSRC / "cuda/stub.c", "-x c -fPIC")
        objects.append(edge("libtorch_cuda.so", "link", stub, "-Wl,-soname,libtorch_cuda.so"))
        runtime = next(Path(os.path.realpath(tool("nvcc"))).parents[1].rglob("libcudart_static.a"), None)
        runtime = runtime or next(Path("/usr/local").glob("cuda*/targets/*/lib/libcudart_static.a"), Path("."))
        link += f" -L{runtime.parent} -lcudart_static -ldl -lrt -lpthread"
    library = edge(out / f"_C_{part}.so", "link", " ".join(objects), link)
    (work / "build.ninja").write_text("\n".join(lines) + "\n")
    return library


def build(out, work):
    """Builds what `decide` allows into `out`; prints and writes what came of each part."""
    for part, reason in (verdicts := decide()).items():
        (out / f"_C_{part}.so").unlink(missing_ok=True)
        if reason is None:
            (work / part).mkdir(parents=True, exist_ok=True)
            library = write_ninja(part, out, work / part)
            done = subprocess.run([tool("ninja"), "-C", work / part, library], capture_output=True, text=True)
            (work / part / "log").write_text(done.stdout + done.stderr)
            verdicts[part] = f"its build failed: {(done.stdout + done.stderr)[-3000:]}" if done.returncode else None
        print(f"fused_resnet: the {part} part: {verdicts[part] or 'built'}", file=sys.stderr)
    print(f"fused_resnet: the sm_90a convolution: {verdicts['cuda'] or SM90 or 'built'}", file=sys.stderr)
    (out / "_native.json").write_text(json.dumps({**verdicts, "archs": ARCHS.split(";"), "sm90": SM90}, indent=1))
    return verdicts


class Build(build_py):
    def run(self):
        super().run()
        build((ROOT if self.editable_mode else Path(self.build_lib).resolve()) / "fused_resnet", ROOT / "build/native")


class Wheel(bdist_wheel):
    def get_tag(self):  # the libraries know nothing of Python
        self.root_is_pure = decide()["cpu"] is not None
        return super().get_tag() if self.root_is_pure else ("py3", "none", super().get_tag()[2])


if __name__ == "__main__":
    setup(cmdclass={"build_py": Build, "bdist_wheel": Wheel})
