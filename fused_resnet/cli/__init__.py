"""The command line: `fused-resnet bench | verify | inspect | tune | train | env`. One file a command.

Those files hold what a user types and the order of the steps. Functions import what is heavy, so that a shell that
completes a word and a user who asks for help do not wait for torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

NEEDS = ("typer", "rich", "click", "matplotlib")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; exits with 0, or with 2 and one sentence on stderr."""
    try:
        from fused_resnet.cli.app import run

        code = run(arguments)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in NEEDS:
            raise
        print(f"fused-resnet: the command line needs {package}: pip install 'fused_resnet[cli]'", file=sys.stderr)
        sys.exit(2)
    sys.exit(code)
