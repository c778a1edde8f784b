"""Runs a module that compiles kernels in processes where Triton does not interpret."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORKERS = 2


def compile_all(module, tmp_path_factory):
    """name -> the JSON line that `module`, called with SHARE OF, printed of it; nothing comes from Triton's cache."""
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
    return {row["name"]: row for row in map(json.loads, lines)}
