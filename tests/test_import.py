"""Importing the package costs nothing and needs nothing."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**env, **environment}, text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_adds_less_than_a_tenth_of_a_second_to_torchs():
    code = ("import torch, time; start = time.perf_counter(); import fused_resnet; "
            "print(time.perf_counter() - start)")
    assert min(float(python(code)) for _ in range(2)) < 0.1


def test_first_use_of_every_public_name_stays_quick():
    code = ("import torch, time; start = time.perf_counter(); import fused_resnet as fr; "
            "[getattr(fr, name) for name in fr.__all__]; print(time.perf_counter() - start)")
    assert min(float(python(code)) for _ in range(2)) < 1.0


def test_nothing_heavy_is_loaded():
    heavy = "('triton', 'torchvision', 'timm', 'transformers', 'numpy.testing', 'matplotlib', 'rich', 'typer')"
    code = (f"import sys, torch; before = set(sys.modules); import fused_resnet as fr; fr.nn; fr.models; "
            f"print([m for m in {heavy} if m in sys.modules and m not in before], torch.cuda.is_initialized())")
    assert python(code) == "[] False"


NO_TRITON = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
import fused_resnet as fr
block = fr.nn.BasicBlock(8, 8).eval()
x = torch.randn(1, 8, 6, 6)
stock = block(x)
with torch.no_grad():
    torch.testing.assert_close(block(x), stock, rtol=1e-4, atol=1e-4)
print(fr.backends.available()["triton"])
"""


def test_everything_works_without_triton(tmp_path):
    assert python(NO_TRITON, FUSED_RESNET_CACHE_DIR=str(tmp_path)) == "the package triton is not installed"


def test_no_home_is_no_problem(tmp_path):
    code = ("import torch, fused_resnet as fr; b = fr.nn.BasicBlock(8, 8).eval(); torch.set_grad_enabled(False); "
            "b(torch.randn(1, 8, 6, 6)); print(fr.backends.cache().path.name)")
    (tmp_path / "home").write_text("")
    assert python(code, HOME=str(tmp_path / "home"), XDG_CACHE_HOME="", FUSED_RESNET_CACHE_DIR="") == "cache.json"
