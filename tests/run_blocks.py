"""Runs the Python blocks of pages, each page in a namespace of its own, and prints what failed as JSON.

    python -m tests.run_blocks PAGE...
"""

import contextlib
import io
import json
import re
import sys
import traceback
from pathlib import Path

from fused_resnet.testing.shim import torchvision_shim

SMALLER = {"8, 3, 224, 224": "2, 3, 64, 64", "import resnet50": "import resnet18 as resnet50"}


def blocks(text: str, language: str) -> list[tuple[int, str]]:
    """(line number, source) of the fenced blocks in `language`."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[:m.start(1)].count("\n") + 1, m.group(1)) for m in found]


def run(page: str) -> dict[str, object]:
    """How many blocks ran, and the traceback of the first that failed."""
    scope: dict[str, object] = {"__name__": "__main__"}
    done = 0
    for line, source in blocks(Path(page).read_text(), "python"):
        for large, small in SMALLER.items():
            source = source.replace(large, small)
        try:
            with contextlib.redirect_stdout(io.StringIO()) as said:
                exec(compile("\n" * (line - 1) + source, page, "exec"), scope)
        except Exception:
            return {"ran": done, "failed": traceback.format_exc(), "said": said.getvalue()}
        done += 1
    return {"ran": done, "failed": None}


if __name__ == "__main__":
    torchvision_shim()
    print(json.dumps({page: run(page) for page in sys.argv[1:]}))
