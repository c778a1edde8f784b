"""Builds the native library on the machine that measures it, with the tools that are there, before a stage's work.

`setup.py` does the work, in a process of its own, for this GPU's architecture alone. What was built from the same
sources stays. Without the library the stage goes on: the rows of its backend say why they are missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.sheet import ROOT

PACKAGE, WORK = ROOT / "fused_resnet", ROOT / "build" / "native"
SHARE, LEAST = 0.6, 60.0  # of a stage's budget, and seconds, that the build may take
CODE = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("fused_resnet_setup", "setup.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
work = Path(sys.argv[2])
work.mkdir(parents=True, exist_ok=True)
module.build(Path(sys.argv[1]), work)
"""


def architecture(arch: int) -> str:
    """What is compiled for compute capability `arch`: on Hopper with what it has alone, such as wgmma."""
    return "90a" if arch == 90 else str(arch)


def sources(arch: int) -> str:
    """Hex digits of everything that the library is made of."""
    import torch

    digest = hashlib.sha256(f"{architecture(arch)} {torch.__version__} {torch.version.cuda}".encode())
    for path in [ROOT / "setup.py", *sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]:
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def build(arch: int, budget: float, out: Path = PACKAGE, work: Path = WORK) -> dict[str, Any]:
    """Builds both parts, if they are not there.

    Args:
        arch: compute capability without the dot.
        budget: seconds of the stage; the build is given `SHARE` of it.
        out: folder of the libraries.
        work: folder of what lies between; a note of the last build is kept there.

    Returns:
        {"status": "ok" | "failed", "seconds" of the build, "arch", "detail": what failed or was left out}.
    """
    note, wanted = work / "gpu.json", sources(arch)
    known = _read(note)
    if known.get("sources") == wanted and known.get("libraries") == _libraries(out) and known.get("row"):
        return known["row"]
    start = time.monotonic()
    (out / "_native.json").unlink(missing_ok=True)
    output = _run([sys.executable, "-c", CODE, str(out), str(work)], max(LEAST, SHARE * budget), architecture(arch))
    seconds = time.monotonic() - start
    verdicts = _read(out / "_native.json")
    reasons = [f"{part}: {verdicts[part]}" for part in ("cpu", "cuda") if verdicts.get(part)]
    if output is None:
        reasons = [f"no end after {seconds:.0f} s"]
    elif not verdicts:
        reasons = [output[-300:] or "setup.py wrote nothing down"]
    left_out = [f"without the tiles of sm_90a: {verdicts['sm90']}"] if arch == 90 and verdicts.get("sm90") else []
    row = {"status": "failed" if reasons else "ok", "seconds": round(seconds, 1), "arch": architecture(arch),
           "detail": _line("; ".join(reasons or left_out))}
    if not reasons:  # what failed is tried again, where it failed
        note.write_text(json.dumps({"sources": wanted, "libraries": _libraries(out), "row": row}))
    return row


def describe(row: dict[str, Any]) -> str:
    """One line: whether the library is there, how long it took, why it failed."""
    return f"the native library for sm_{row['arch']}: {row['status']}, {row['seconds']:.0f} s {row['detail']}".rstrip()


def _run(command: list[str], seconds: float, archs: str) -> str | None:
    """The output of a command; None when it was cut off, with all that it had started."""
    environment = {**os.environ, "FUSED_RESNET_CUDA": "1", "FUSED_RESNET_CUDA_ARCHS": archs}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, start_new_session=True) as process:
        try:
            return process.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return None


def _libraries(out: Path) -> dict[str, list[int]]:
    """Name -> [size, time of the last write] of what lies in `out`."""
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(out.glob("_C_*.so"))}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _line(text: str) -> str:
    return " ".join(text.split())[-400:]
