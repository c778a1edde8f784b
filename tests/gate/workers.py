"""Compiles kernels in processes where Triton does not interpret, and judges what the compiler made of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORKERS = 2


def work(jobs):
    """The main program of a module that compiles, called with SHARE OF: prints a line for each of its share of `jobs`.

    Args:
        jobs: name -> function that compiles one launch and returns what it found, as a dictionary.
    """
    share, of = map(int, sys.argv[1:])
    for name, job in list(jobs.items())[share::of]:
        try:
            found = job()
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"name": name, **found}), flush=True)


def compile_all(module, tmp_path_factory):
    """name -> what `work` printed of it in the processes of `module`; nothing comes from Triton's cache."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    folder = tmp_path_factory.mktemp("reports")
    workers = []
    for share in range(WORKERS):
        with open(folder / f"{share}.jsonl", "w") as out, open(folder / f"{share}.err", "w") as err:
            command = [sys.executable, "-m", module.__name__, str(share), str(WORKERS)]
            workers.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=err))
    for share, worker in enumerate(workers):
        assert worker.wait() == 0, (folder / f"{share}.err").read_text()[-2000:]
    lines = [line for share in range(WORKERS) for line in (folder / f"{share}.jsonl").read_text().splitlines()]
    return {row.pop("name"): row for row in map(json.loads, lines)}


def clean(report):
    """Passes a report on if its launch compiled, keeps everything in registers and runs wgmma without a stop."""
    assert "error" not in report, report["error"]
    count = report["count"]
    assert count["LDL"] + count["STL"] + report["spill_bytes"] + report["stack_bytes"] == 0, "registers spilled"
    assert not report["serialized"], "ptxas serialised the wgmma pipeline"
    return report


def tensor_cores(report):
    """The kinds of tensor-core instructions in a launch."""
    return {name for name in ("HGMMA", "HMMA") if report["count"][name]}
