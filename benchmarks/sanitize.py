"""compute-sanitizer over the kernels: `run(tool)` is the job, `python -m benchmarks.sanitize` the program it watches.

The program launches every kind of tile on problems so small that the tool's slow-down does not matter, each tensor
in memory of its own (PYTORCH_NO_CUDA_MEMORY_CACHING), so that what lies outside of it is nobody's.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks import steps
from benchmarks.layers import Rows, kernel
from benchmarks.sheet import ROOT
from benchmarks.ways import compiled, kind_of
from fused_resnet import backends
from fused_resnet.ops.stem import StemProblem
from fused_resnet.problem import NormProblem
from fused_resnet.testing import cases, inputs

FOLDERS = "/usr/local/cuda/bin:/opt/cuda/bin"
PROBE = "import torch; print(float(torch.ones(8, device='cuda').sum()))"
PROBE_SECONDS, COMPILE_SECONDS, TOOL_SECONDS = 60, 60, 120
PATIENCE = PROBE_SECONDS + COMPILE_SECONDS + TOOL_SECONDS + 10.0
FOUND = 9  # the exit status that stands for findings
SUMMARIES = ("ERROR SUMMARY", "RACECHECK SUMMARY")
# Borders on every side, a ragged end of the pixels and of the channels, each kind of tile.
PROBLEMS = [cases.conv(64, 64, 7), cases.conv(64, 64, 7, residual=True), cases.conv(64, 136, 7, 1, residual=True),
            cases.conv(64, 128, 8, stride=2), cases.conv(64, 64, 8, 1, stride=2, activation="identity"),
            cases.conv(256, 64, 5, n=1), cases.conv(32, 32, 7, groups=8), cases.conv(32, 32, 7, groups=32),
            cases.conv(3, 24, 9, 7, stride=2), cases.conv(24, 40, 5, dilation=2)]


STEM = StemProblem(*cases.conv(3, 24, (21, 18), 7, stride=2))
# Norms of training: bytes of the mask that two pixels share, a ragged end, both shortcuts.
NORMS = [NormProblem("cpu", "fp32", 2, 7, 5, c, shortcut=shortcut)
         for c, shortcut in ((20, "norm"), (64, "tensor"), (3, ""), (200, "norm"))]


def on_gpu(problem: Any, dtype: str = "bf16") -> Any:
    return problem._replace(device="cuda", dtype=dtype)


def launches(arch: int) -> Iterator[tuple[str, Any, Any]]:
    """(backend, problem, tile): the last candidate of every kind, each of the library's tiles and dtypes, the stem."""
    from fused_resnet.kernels.triton import tiles

    for problem in map(on_gpu, PROBLEMS):
        kinds = {kind_of(asdict(tile)): tile for tile in tiles.candidates(problem, arch)}
        yield from (("triton", problem, tile) for tile in kinds.values())
    for problem, dtype in itertools.product(PROBLEMS, ("bf16", "fp32")):
        problem = on_gpu(problem, dtype)
        yield from (("cuda", problem, tile) for tile in (None, *compiled(problem, arch)))
    yield from ((backend, on_gpu(STEM), None) for backend in ("triton", "cuda"))


def norms() -> Iterator[tuple[str, steps.Launch]]:
    """The launches of norms in training, on the native library."""
    for problem, dtype, name in itertools.product(NORMS, ("bf16", "fp32"), ("bn_act", "bn_act_sums", "bn_act_grad")):
        yield "cuda", steps.Launch(name, on_gpu(problem, dtype), 1)


def main() -> int:
    """Launches everything once; what a backend refuses is passed over."""
    import torch

    from fused_resnet.kernels.triton.launch import arch_of

    count = 0
    with torch.no_grad():
        for backend, problem, tile in launches(arch_of(torch.device("cuda"))):
            module = kernel(backend, problem)
            if module.refuse(problem) is None:
                module.forward(problem, inputs.make(problem), *([] if tile is None else [tile]))
                torch.cuda.synchronize()
                count += 1
        for backend, launch in norms():
            module = backends.kernels(launch.family, launch.problem).get(backend)
            if module is not None:
                module.forward(launch.problem, steps.operands(launch))
                torch.cuda.synchronize()
                count += 1
    print(f"{count} problems and tiles ran")
    return 0


def command(arguments: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """Exit status, None after `seconds`, and output; what the command started ends with it."""
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, start_new_session=True) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
            return process.returncode, output
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, process.communicate()[0]


def run(tool: str) -> Rows:
    """One row: "ok", "wrong" with the first findings, or "refused" where the tool cannot run here."""
    binary = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=FOLDERS)
    if binary is None:
        yield {"status": "refused", "detail": "unavailable: there is no compute-sanitizer on this machine"}
        return
    watched = [binary, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20", sys.executable]
    status, output = command([*watched, "-c", PROBE], PROBE_SECONDS)
    if status != 0:
        yield {"status": "refused", "detail": f"unavailable: {_tail(output) or f'no end after {PROBE_SECONDS} s'}"}
        return
    program = ["-m", "benchmarks.sanitize"]
    status, output = command([sys.executable, *program], COMPILE_SECONDS)
    if status == 0:
        status, output = command([*watched, *program], TOOL_SECONDS)
    yield verdict(status, output)


def verdict(status: int | None, output: str) -> dict[str, Any]:
    """The row for one exit status and output."""
    summary = next((line for line in reversed(output.splitlines()) if any(s in line for s in SUMMARIES)), None)
    if status == 0 and summary:
        return {"status": "ok", "detail": summary.strip("= ")}
    if status == FOUND:
        lines = [line.strip("= ") for line in output.splitlines() if line.startswith("=========") and line.strip("= ")]
        return {"status": "wrong", "detail": " | ".join(lines[1:8] + lines[-1:])}
    return {"status": "failed", "detail": "no end in time" if status is None else f"exit {status}: {_tail(output)}"}


def _tail(output: str) -> str:
    return " | ".join(line.strip("= ") for line in output.strip().splitlines()[-3:])[-300:]


if __name__ == "__main__":
    sys.exit(main())
