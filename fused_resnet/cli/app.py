"""Puts the commands together and turns errors into one sentence and exit code 2."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

import typer

from fused_resnet.cli import bench, env, inspect, train, tune, verify

INTERRUPTED = 130  # what a shell gives a program that Ctrl-C ends, and typer's exit code for it

app = typer.Typer(name="fused-resnet", no_args_is_help=True, rich_markup_mode=None,
                  pretty_exceptions_enable=False,
                  help="Convolution, batch norm, residual add and activation in one launch, for ResNets in PyTorch.",
                  epilog="Exit codes: 0 success; 1 a comparison failed; 2 a mistake in the command line, a file or "
                         "a model, with one sentence on stderr; 130 interrupted. With --json stdout holds one JSON "
                         "object and nothing else. NO_COLOR=1 switches colours off, COLUMNS sets the width of tables.")
for command in (bench.bench, verify.verify, inspect.inspect, tune.tune, train.train, env.env):
    app.command()(command)


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0; 1 when a comparison failed; 2 for the caller's mistakes, with one sentence on stderr; 130 when interrupted.
    """
    os.putenv("KINETO_LOG_LEVEL", "99")  # else the C++ profiler writes its stages to the terminal
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.(onnx|jit|_inductor|profiler).*")
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        result = app(args=given, prog_name="fused-resnet", standalone_mode=False)
    except typer.Exit as stop:
        return stop.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return _interrupted()
    except (ValueError, OSError) as error:
        return _fail(str(error))
    except Exception as error:
        if not hasattr(error, "format_message"):  # what the parser says about the command line
            raise
        return _fail(error.format_message())
    return _interrupted() if result == INTERRUPTED else result if isinstance(result, int) else 0


def _interrupted() -> int:
    print("interrupted; what was written is kept", file=sys.stderr)
    return INTERRUPTED


def _fail(message: str) -> int:
    print(f"fused-resnet: {' '.join(message.split()) or 'failed'}", file=sys.stderr)
    return 2
