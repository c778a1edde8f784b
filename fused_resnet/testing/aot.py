"""Compiles a Triton kernel without a GPU and counts what came out.

The triton wheel ships ptxas, nvdisasm and cuobjdump, so neither a driver nor a CUDA toolkit is needed.
Nothing runs: this shows whether the compiler produced the instructions that a tile asks for, never
whether the kernel is right or fast. The interpreter must be off (TRITON_INTERPRET unset).
"""

from __future__ import annotations

import io
import re
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32",
         torch.int64: "i64", torch.uint8: "u8", torch.int8: "i8"}
# HGMMA: warpgroup mma of Hopper. HMMA: the mma.sync of older chips, on Hopper a fall-back. LDL and STL: local
# memory, that is spills. LDGSTS: cp.async. UTMALDG, UTMASTG: a load, a store by the tensor memory accelerator.
# LDG and STG: loads and stores of global memory, and those of 16 bytes among them.
INSTRUCTIONS = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "LDGSTS", "UTMALDG", "UTMASTG", "LDL", "STL", "FFMA", "IMAD",
                "LDG.", "LDG.E.128", "STG.", "STG.E.128")


@dataclass(frozen=True)
class Report:
    """What one kernel became on one architecture; `count` holds static SASS instructions."""

    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int
    serialized: bool  # ptxas gave up overlapping wgmma (warning C75xx)
    partitions: int  # groups of warps with a program of their own, beside the default one
    reassigned: bool  # those groups give registers up (setmaxnreg)
    from_registers: int  # wgmma whose first operand is in registers; the others read both from shared memory
    count: Mapping[str, int]

    def __str__(self) -> str:
        found = " ".join(f"{name} {n}" for name, n in self.count.items() if n)
        return (f"{self.registers} registers, {self.shared_bytes} B shared, {self.spill_bytes} B spilled, "
                f"{self.stack_bytes} B stack{', wgmma serialised' if self.serialized else ''}; {found}")


def build(kernel: Any, arguments: Mapping[str, Any], arch: int, options: Mapping[str, int]) -> Any:
    """Compiles `kernel` as the launch with these arguments would.

    Args:
        kernel: a `@triton.jit` or `@gluon.jit` function.
        arguments: value of every parameter; tensors may be on the meta device.
        arch: compute capability without the dot.
        options: num_warps and num_stages.

    Raises:
        TypeError: the kernel was made for the interpreter, or a launch would refuse the arguments' names, which the
            interpreter does not.
    """
    if not isinstance(kernel, triton.JITFunction):
        raise TypeError(f"{kernel!r} was made for the interpreter; unset TRITON_INTERPRET before triton is imported")
    if wrong := set(arguments) ^ set(kernel.arg_names):
        raise TypeError(f"missing or unknown arguments: {sorted(wrong)}")
    types, values, hints = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            types[parameter.name], values[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            # The launcher finds PyTorch's allocations aligned; without the hint no load would be vectorised.
            types[parameter.name], hints[(i,)] = "*" + TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, (TensorDescriptor, GluonDescriptor)):
            block = ",".join(map(str, value.block_shape))
            layout = f",{value.layout!r}" if isinstance(value, GluonDescriptor) else ""
            types[parameter.name] = f"tensordesc<{TYPES[value.base.dtype]}[{block}]{layout}>"
        elif isinstance(value, float):
            types[parameter.name] = "fp32"
        else:
            types[parameter.name] = "i32" if value < 2**31 else "i64"
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    said = io.StringIO()
    # Only an assembler that runs reports spills and warnings: nothing is taken from Triton's cache.
    with knobs.nvidia.scope(), knobs.compilation.scope(), redirect_stdout(said):
        knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
        compiled = triton.compile(source(kernel, types, values, hints), target=GPUTarget("cuda", arch, 32),
                                  options=dict(options))
    compiled.asm["log"] = said.getvalue()
    return compiled


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed with {done.returncode}: {done.stderr.strip()[:500]}")
    return done.stdout + done.stderr


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if not match:
        raise RuntimeError(f"no {pattern!r} in the CUDA tool's output")
    return int(match.group(1))


def inspect(compiled: Any) -> Report:
    """Counts registers, memory, spills and instructions of what `build` returned."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        sass = _tool("nvdisasm", "-c", "-ndf", cubin.name)  # without the targets of branches, which take a while
        usage = _tool("cuobjdump", "-res-usage", cubin.name)
    verbose = compiled.asm["log"]
    return Report(
        registers=_number(r"REG:(\d+)", usage), stack_bytes=_number(r"STACK:(\d+)", usage),
        spill_bytes=_number(r"(\d+) bytes spill stores", verbose) + _number(r"(\d+) bytes spill loads", verbose),
        shared_bytes=compiled.metadata.shared, serialized=bool(re.search(r"C75\d\d", verbose)),
        partitions=len(re.findall(r"^ *partition\d+\(", compiled.asm["ttgir"], re.MULTILINE)),
        reassigned="setmaxnreg" in compiled.asm["ptx"],
        from_registers=sum(text.count("{") > 1 for text in re.findall(r"wgmma\.mma_async[^;]*;", compiled.asm["ptx"])),
        count={name: len(re.findall(rf"\b{re.escape(name)}", sass)) for name in INSTRUCTIONS})


def check(kernel: Any, arguments: Mapping[str, Any], arch: int, options: Mapping[str, int]) -> Report:
    """`inspect(build(...))`: what the launch with these arguments would run on sm_`arch`."""
    return inspect(build(kernel, arguments, arch, options))
