"""The program that type checkers read also runs. Reading it is part of `make lint`: `files` in pyproject.toml."""

import tomllib
from pathlib import Path

from tests.typing import user

ROOT = Path(__file__).parents[2]


def test_the_program_runs():
    assert user.main() == "(2, 8, 16, 16) (2, 4, 4, 4) cpu"


def test_lint_reads_it():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert {"fused_resnet", "tests/typing/user.py"} <= set(settings["files"])
    strict = next(o for o in settings["overrides"] if "fused_resnet.functional" in o["module"])
    assert strict["disallow_untyped_defs"] and "user" in strict["module"]
    assert "$(BIN)/mypy\n" in (ROOT / "Makefile").read_text()
