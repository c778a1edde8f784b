"""The native library's CUDA part, built by nvcc without a GPU."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fused_resnet import native
from tests.csrc import conftest as made
from tests.csrc.test_build import undefined

setup_script = made.setup_script


@pytest.fixture(scope="module")
def cuda_part(setup_script, tmp_path_factory):
    """Folder of both libraries and of the stub that stands for torch's CUDA library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSED_RESNET_CUDA", "1")
        patch.setenv("FUSED_RESNET_CUDA_ARCHS", "80;90a")
        reasons = setup_script.decide()
        if reasons["cuda"] is not None:
            pytest.skip(reasons["cuda"])
        folder = tmp_path_factory.mktemp("native")
        assert set(setup_script.build(folder, folder / "work").values()) == {None}
    return folder


def test_the_library_needs_stable_symbols_alone(cuda_part):
    needed = undefined(cuda_part / "_C_cuda.so")
    assert all(name.startswith(("aoti_torch_", "torch_")) for name in needed), sorted(needed)
    assert {name for name in needed if "cuda" in name} - {
        "aoti_torch_get_current_cuda_stream", "torch_c10_cuda_check_msg", "torch_c10_cuda_free_error_msg",
        "aoti_torch_device_type_cuda"} == set()


def test_the_library_loads_beside_a_cpu_build_of_torch(cuda_part):
    """With the stub: the operators are there for CUDA, and a GPU is what is missing."""
    code = f"""
import ctypes, torch
if torch.version.cuda is None:
    ctypes.CDLL({str(cuda_part / 'work/cuda/libtorch_cuda.so')!r}, mode=ctypes.RTLD_GLOBAL)
for part in ("cpu", "cuda"):
    torch.ops.load_library({str(cuda_part)!r} + f"/_C_{{part}}.so")
for name in ("_bn_act", "_bn_act_sums", "_bn_act_grad", "_conv_bn_act", "_stem", "_bn_finalise"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key("fused_resnet::" + name, "CUDA"), name
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def cuobjdump():
    """nvcc's, or the one that triton brings."""
    triton = importlib.util.find_spec("triton")
    beside = Path(triton.origin).parent / "backends/nvidia/bin" if triton else None
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=beside) or pytest.skip("there is no cuobjdump")


def resources(library):
    """(architecture, kernel) -> {"REG": ..., "STACK": ...}"""
    dump = cuobjdump()
    text = subprocess.run([dump, "-res-usage", library], capture_output=True, text=True, check=True).stdout
    found, arch = {}, None
    for line in text.splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            found[arch, name] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
    return found


def test_no_kernel_spills(cuda_part):
    """fp64, which serves tests, may take what it needs."""
    found = resources(cuda_part / "_C_cuda.so")
    assert {arch for arch, _ in found} == {"sm_80", "sm_90a"} and len(found) >= 60
    for (arch, name), used in found.items():
        if "Id" in name:
            continue
        assert used["STACK"] == 0 and used["LOCAL"] == 0, f"{arch} {name}: {used}"
        # Of 65,536: one block of 384 threads, which divides them anew; two blocks of 256 threads, or two of 128.
        most = 168 if "conv_bn_act_sm90" in name else 255 if "conv" in name else 128
        assert used["REG"] <= most, f"{arch} {name}: {used}"


def test_the_code_is_what_the_design_says(cuda_part):
    """Tensor cores, copies past registers, and 16 bytes at a time; local memory nowhere."""
    dump = cuobjdump()
    text = subprocess.run([dump, "-sass", cuda_part / "_C_cuda.so"], capture_output=True, text=True, check=True).stdout
    for function in text.split("Function : ")[1:]:
        name = function.split(maxsplit=1)[0]
        count = {op: len(re.findall(rf"(?<![\w.]){re.escape(op)}", function)) for op in (
            "HMMA.16816.F32", "LDSM.16.M88.4", "LDGSTS", "LDG.E.128", "STG.E.128", "LDL", "STL", "ATOM", "RED.")}
        assert count["ATOM"] + count["RED."] == 0, f"{name} uses atomics"
        if tile := re.search(r"conv_bn_act_tileINS_4[bf][fp]16ELi(\d+)E", name):
            filters = int(tile[1])  # a warp makes 64 x filters / 2 or 32 x filters, 32 deep a step, HMMA 16 x 8 x 16
            assert count["HMMA.16816.F32"] == filters // 2, f"{name}: {count}"
            assert count["LDSM.16.M88.4"] <= {128: 16, 64: 12, 32: 8}.get(filters, 6)
            assert count["LDGSTS"] and count["STG.E.128"] and not count["LDL"] + count["STL"]
        elif re.search(r"stem_tiles_kernelINS_4[bf][fp]16E", name):
            assert count["HMMA.16816.F32"] == 16 and count["LDSM.16.M88.4"] == 4 and count["STG.E.128"]
        elif "conv_bn_act_tile" in name or "depthwise" in name:
            assert count["STG.E.128"] and not count["HMMA.16816.F32"], f"{name} is not what IEEE fp32 asks for"
        elif "forward" in name or "gradient" in name:
            assert count["LDG.E.128"] and count["STG.E.128"], name


def test_the_hopper_convolution_is_what_the_design_says(setup_script, cuda_part):
    """wgmma from shared memory, im2col and multicast by TMA, registers divided; nothing serialised by the assembler."""
    if setup_script.SM90 is not None:
        pytest.skip(setup_script.SM90)
    serialised = re.findall(r".*C75\d\d.*", (cuda_part / "work/cuda/log").read_text())
    assert not serialised, serialised
    dump = subprocess.run([cuobjdump(), "-sass", cuda_part / "_C_cuda.so"], capture_output=True, text=True, check=True)
    found = {}
    for function in dump.stdout.split("Function : ")[1:]:
        if match := re.search(r"conv_bn_act_sm90INS_4([bf]\w)16ELi(\d)E", function.split(maxsplit=1)[0]):
            count = lambda op, text=function: len(re.findall(rf"(?<![\w.]){re.escape(op)}(?![\w])", text))
            tile, kind = native.CONV_TILES[int(match[2])], "" if match[1] == "fp" else ".BF16"
            found[tile, match[1]] = None
            filters, pair = int(tile.rpartition("x")[2]), tile != "sm90_128x64"
            # A step of 64 is four products of 16 for each of a group's two times 64 pixels.
            assert count(f"HGMMA.64x{filters}x16.F32{kind}") == 8 and not count("HMMA"), tile
            assert count("UTMALDG.4D.IM2COL") == 1 and count("UTMALDG.3D.MULTICAST") == pair, tile
            assert count("UTMALDG.3D") == 1 and count("UTMASTG.2D") == filters // 64, tile
            assert count("USETMAXREG.DEALLOC") == count("USETMAXREG.TRY_ALLOC") == 1, tile
            # Residual and y move in words of two elements, and through TMA alone.
            assert not any(count(op) for op in ("LDL", "STL", "STG", "LDS.U8", "LDS.U16", "STS.U16")), tile
    assert len(found) == 2 * sum(name.startswith("sm90") for name in native.CONV_TILES)
