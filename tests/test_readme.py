"""The README says what the code and the measurements say."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import tables
from fused_resnet.bench.results import FIELDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def recorded(folder):
    """The results files as git has them: a benchmark run on this machine may have written over them since."""
    def git(*command):
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout

    for name in git("ls-files", "benchmarks/results/*/*.json").split():
        target = folder.joinpath(*Path(name).parts[-2:])
        target.parent.mkdir(exist_ok=True)
        target.write_text(git("show", f":{name}"))
    return folder


def test_the_results_are_those_of_the_json(tmp_path):
    fresh = {tables.renewed(README, tables.section(tables.files(folder)))
             for folder in (tables.FOLDER, recorded(tmp_path))}
    assert README in fresh, "run: python -m benchmarks.tables"


def test_the_example_runs(capsys):
    pytest.importorskip("torchvision")
    example = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    assert len(example.splitlines()) <= 12
    scope = {}
    exec(example.replace("8, 3, 224, 224", "1, 3, 64, 64"), scope)
    assert scope["y"].shape == (1, 1000) and "conv1" in capsys.readouterr().out


def row(**values):
    return {**dict.fromkeys(FIELDS), "level": "model", "model": "resnet50", "batch": 8, "dtype": "fp32",
            "autocast": False, "device": "cpu", "mode": "inference", "graph": False, "provider": "eager",
            "status": "ok", "ms_p50": 100.0, **values}


@pytest.fixture
def file(tmp_path):
    def write(*rows):
        path = tmp_path / "box" / "bench.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"environment": {"cpu": "Chip", "threads": 2, "torch": "9"}, "commit": "abc",
                                    "rows": list(rows)}))
        return path

    return write


def test_a_table_quotes_the_speed_up_of_the_file(file):
    text = tables.section([file(row(vs_stock=1.0), row(provider="fused", ms_p50=80.0, vs_stock=1.25, launches=56))])
    assert "| **fused** | 80.0 | 1.25x | 56 |" in text
    assert "Chip, 2 threads" in text and "CUDA GPUs: not measured yet." in text


def test_what_is_wrong_is_shown_without_a_time(file):
    text = tables.section([file(row(provider="peer", status="wrong", ms_p50=None))])
    assert "| peer | wrong |" in text


def test_missing_marks_are_an_error():
    with pytest.raises(ValueError, match="results:begin"):
        tables.renewed("nothing", "")
