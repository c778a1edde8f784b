"""The one JSON schema of every benchmark: environment, commit, rows. Written atomically, validated when read."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

LEVELS = ("model", "block", "layer")
DTYPES = ("fp32", "tf32", "fp16", "bf16", "fp8", "int8")
DEVICES = ("cpu", "cuda")
MODES = ("inference", "training", "latency")
STATUSES = ("ok", "wrong", "failed")
EAGER = ("eager", "eager_channels_last")  # the stock configurations that a speed-up is quoted over
PEERS = ("onnxruntime", "openvino", "tensorrt", "torch_tensorrt", "torchvision", "timm", "transformers", "numpy",
         "onnx")


@dataclass
class Row:
    """One measured cell. A row that is not "ok" keeps its timings None; `reason` is for the printed table only.

    A training step is forward, loss, backward and SGD; its `rel_error` is that of all gradients of the first step
    (`numerics.check_gradients`), and `saved_mb` are the megabytes that autograd keeps for its backward, parameters and
    buffers aside, each storage counted once.
    `graph`: the provider replays a CUDA graph; a provider has a row with and one without. `rel_error` is rms(error) /
    rms(reference) against an fp64 run of the stock model; `vs_stock` is over the best eager row of the same run with
    the same `graph`, so that a graph's gain is nobody's but its own; `launches` come from the profiler; `peak_mem_mb`
    is the peak of one warm call beyond what was held before it, of a graph that of its recording
    (`timing.PeakMemory`). `roofline_share` of a model is the share of the FLOP/s that a dense product reaches on the
    same device in the same dtype (`timing.matmul_peak`); of a layer see `bench.layers`.
    `samples` are the milliseconds of every round, in their order: what `bench.compare` tells a change from noise by.
    """

    level: str
    model: str
    batch: int
    dtype: str
    device: str
    provider: str
    mode: str = "inference"
    problem: str | None = None
    autocast: bool = False
    graph: bool = False
    backend: str | None = None
    status: str = "ok"
    ms_p20: float | None = None
    ms_p50: float | None = None
    ms_p80: float | None = None
    images_per_s: float | None = None
    vs_stock: float | None = None
    rel_error: float | None = None
    launches: int | None = None
    peak_mem_mb: float | None = None
    saved_mb: float | None = None
    roofline_share: float | None = None
    samples: list[float] | None = None
    reason: str = field(default="", metadata={"printed_only": True})

    @property
    def label(self) -> str:
        """The provider as tables name it."""
        return self.provider + (" + graph" if self.graph else "")

    @property
    def group(self) -> tuple[str, str, str, int, str]:
        """Rows of one group ran the same work and are compared with each other."""
        return (self.model, self.device, self.dtype, self.batch, self.mode)


FIELDS = ("level", "model", "problem", "batch", "dtype", "autocast", "device", "mode", "graph", "provider", "backend",
          "status", "ms_p20", "ms_p50", "ms_p80", "images_per_s", "vs_stock", "rel_error", "launches", "peak_mem_mb",
          "saved_mb", "roofline_share", "samples")
REQUIRED = ("level", "model", "batch", "dtype", "device", "provider", "status")
_CHOICES = {"level": LEVELS, "dtype": DTYPES, "device": DEVICES, "mode": MODES, "status": STATUSES}
_NUMBERS = FIELDS[FIELDS.index("ms_p20"):FIELDS.index("samples")]


@dataclass
class Results:
    """A results file in memory."""

    environment: dict[str, Any]
    commit: str
    rows: list[Row] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        rows = [{key: _rounded(value) for key in FIELDS for value in (asdict(row)[key],)} for row in self.rows]
        return {"environment": self.environment, "commit": self.commit, "rows": rows}


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def to_text(data: Any) -> str:
    """JSON with a line for each value, but one for a whole list of numbers."""
    return re.sub(r"\[\n\s*([-\d.e+,\s]+?)\n\s*\]", lambda numbers: f"[{' '.join(numbers[1].split())}]",
                  json.dumps(data, indent=1))  # strings hold no line breaks of their own


def begin(**environment: Any) -> Results:
    """Empty results for this machine; keyword arguments are added to the environment."""
    return Results({**describe_environment(), **environment}, commit())


def save(results: Results, path: str | os.PathLike[str]) -> Path:
    """Writes `path` atomically: a reader sees the old file or the new one, never half of one.

    Raises:
        ValueError: the folder cannot be made or written.
    """
    path = Path(path)
    text = to_text(results.to_dict()) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def load(path: str | os.PathLike[str]) -> Results:
    """Reads and validates a results file. Fields that the schema does not know are passed over.

    Raises:
        ValueError: the file is missing, is no JSON, or breaks the schema; the message names the file and the fault.
    """
    try:
        data = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict) or set(data) != {"environment", "commit", "rows"}:
        raise ValueError(f"{path}: expected an object with the keys environment, commit and rows")
    if not isinstance(data["environment"], dict) or not isinstance(data["rows"], list):
        raise ValueError(f"{path}: environment must be an object and rows a list")
    for index, row in enumerate(data["rows"]):
        fault = _fault(row)
        if fault:
            raise ValueError(f"{path}: row {index}: {fault}")
    rows = [Row(**{key: row[key] for key in FIELDS if key in row}) for row in data["rows"]]
    return Results(data["environment"], str(data["commit"]), rows)


def _fault(row: Any) -> str | None:
    """What is wrong with one row of a file, or None."""
    if not isinstance(row, Mapping):
        return f"expected an object, found {row!r}"
    missing = [key for key in REQUIRED if key not in row]
    if missing:
        return f"{missing[0]} is missing"
    for key, choices in _CHOICES.items():
        if row.get(key, choices[0]) not in choices:
            return f"{key} is {row[key]!r}, expected one of {', '.join(choices)}"
    for key in _NUMBERS:
        value = row.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            return f"{key} is {value!r}, expected a number or null"
    samples = row.get("samples")
    if samples is not None and not (isinstance(samples, list) and samples
                                    and all(type(ms) in (int, float) and ms > 0 for ms in samples)):
        return f"samples are {samples!r}, expected positive numbers or null"
    if type(row["batch"]) is not int or any(type(row.get(key, False)) is not bool for key in ("autocast", "graph")):
        return "batch must be a whole number, autocast and graph must be true or false"
    if row["status"] == "ok" and row.get("ms_p50") is None:
        return "status is ok without ms_p50"
    return None


def cpu_model() -> str:
    """The CPU's marketing name; with family and model where a hypervisor has left no number in it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    name, family, model = (match.group(1).strip() if (match := re.search(rf"^{key}\s*:\s*(.+)$", text, re.M)) else None
                           for key in ("model name", "cpu family", "model"))
    if name and not re.search(r"\d", name) and family and model:
        return f"{name} family {family} model {model}"
    return name or platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """The instruction sets that decide which CPU kernels run."""
    try:
        match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        match = None
    wanted = re.compile(r"avx2|avx512\w*|avx_vnni|amx\w*|f16c|fma|asimd\w*|sve\w*|bf16")
    return [flag for flag in (match.group(1).split() if match else []) if wanted.fullmatch(flag)]


def version_of(package: str) -> str | None:
    """Installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe_environment() -> dict[str, Any]:
    """What a reader needs to judge the figures: processor, threads, versions."""
    onednn = re.search(r"(?:MKL-DNN|oneDNN) v([\d.]+)", torch.__config__.show())
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "cpu": cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "cpu_flags": cpu_flags(),
        "gpu": gpu, "gpu_capability": list(torch.cuda.get_device_capability(0)) if gpu else None,
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version() if gpu else None,
        "torch": torch.__version__, "triton": version_of("triton"), "onednn": onednn.group(1) if onednn else None,
        "python": platform.python_version(), "os": platform.platform(), "executable": Path(sys.executable).name,
        "packages": {name: version for name in PEERS if (version := version_of(name))},
    }


def commit() -> str:
    """The git commit of the source tree, "+" behind it when files differ from it, "" outside a repository."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        head = _git(root, "rev-parse", "HEAD")
        dirty = _git(root, "status", "--porcelain", "--untracked-files=no", "--", "fused_resnet")
    except (OSError, subprocess.SubprocessError):
        return ""
    return head + ("+" if dirty else "")


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10,
                          check=True).stdout.strip()


def machine_slug() -> str:
    """A folder name for this machine: the GPU's name, else the CPU's with its core count."""
    if torch.cuda.is_available():
        gpu = re.search(r"\b([HBAL]\d{2,3}S?|RTX ?\w+(?: \w+)?|GH200|T4|V100)\b", name := torch.cuda.get_device_name(0))
        return _slug(gpu.group(1) if gpu else name)
    name = re.sub(r"\(R\)|\(TM\)|CPU|Processor|@.*", " ", cpu_model(), flags=re.I)
    return f"{_slug(name)}-{os.cpu_count()}c"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unknown"
