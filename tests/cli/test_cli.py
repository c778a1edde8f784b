"""The commands as a user types them; every mistake is one sentence on stderr and exit code 2."""

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")

from fused_resnet import backends, timing
from fused_resnet.bench import results
from fused_resnet.cli import app

MODEL = "cifar_resnet8"
FACTORY = """
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
                         nn.Conv2d(4, 4, 3, padding_mode="circular", padding=1))

def bad():
    raise KeyError("x")

def number():
    return 3
"""
SMALL = ["--size", "32", "--batch", "2"]


@pytest.fixture
def run(capsys):
    """Runs one command line: (exit code, stdout, stderr)."""
    def command(*arguments):
        code = app.run([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return command


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(timing, "PAUSE", 0.0)


@pytest.fixture
def factory(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FACTORY)
    return path


def bench(run, out, *more):
    return run("bench", "--model", MODEL, "--dtype", "fp32", "--provider", "eager,eager_channels_last,fused",
               "--budget", "0", "--out", out, *SMALL, *more)


def test_bench_writes_the_schema_and_a_chart(run, tmp_path):
    code, out, err = bench(run, tmp_path / "new" / "folder")
    assert code == 0, err
    assert "no pretrained weights are bundled" in err and "cifar_resnet8 fp32 batch 2 cpu" in out
    assert "9 conv" in out and "x best eager" in out
    record = results.load(tmp_path / "new" / "folder" / "bench.json")
    assert [row.provider for row in record.rows] == ["eager", "eager_channels_last", "fused"]
    assert record.environment["input"].startswith("scikit-image pictures")
    assert (tmp_path / "new" / "folder" / "bench.png").is_file()


def test_bench_keeps_the_groups_that_it_does_not_measure(run, tmp_path):
    assert bench(run, tmp_path)[0] == 0
    assert bench(run, tmp_path, "--batch", "1", "-q")[0] == 0
    assert {row.batch for row in results.load(tmp_path / "bench.json").rows} == {1, 2}
    assert bench(run, tmp_path, "--batch", "1", "-q")[0] == 0
    assert len(results.load(tmp_path / "bench.json").rows) == 6


def test_bench_sets_results_of_another_machine_aside(run, tmp_path):
    other = results.Results({"cpu": "another"}, "abc", [])
    results.save(other, tmp_path / "bench.json")
    assert bench(run, tmp_path, "-q")[0] == 0
    assert results.load(tmp_path / "bench.previous.json") == other


def test_bench_takes_the_users_weights_and_pictures(run, tmp_path):
    from PIL import Image

    from fused_resnet import models

    torch.save({"state_dict": models.cifar_resnet(8).state_dict()}, tmp_path / "w.pt")
    Image.new("RGB", (40, 60), (9, 99, 200)).save(tmp_path / "a.png")
    code, _, err = bench(run, tmp_path / "out", "--weights", tmp_path / "w.pt", "--images", tmp_path)
    assert code == 0, err
    assert "no pretrained" not in err
    assert results.load(tmp_path / "out" / "bench.json").environment["weights"].endswith("w.pt")


@pytest.mark.parametrize(("arguments", "message"), [
    (["bench", "--model", "resnet19"], "unknown model 'resnet19', did you mean 'resnet18'"),
    (["bench", "--model", "torchvision:resnet19"], "torchvision has no model 'resnet19'"),
    (["bench", "--model", "timm:resnet00"], "timm has no model 'resnet00'"),
    (["bench", "--model", "hub:resnet18"], "cannot read the model 'hub:resnet18'"),
    (["bench", "--batch", "0"], "--batch takes positive whole numbers"),
    (["bench", "--batch", "one"], "--batch takes positive whole numbers separated by commas, got 'one'"),
    (["bench", "--dtype", "fp23"], "--dtype takes fp32, tf32, bf16, fp16, int8, got 'fp23'"),
    (["bench", "--provider", "eagre"], "unknown provider 'eagre'"),
    (["bench", "--device", "tpu"], "--device takes cpu or cuda, got 'tpu'"),
    (["bench", "--threads", "0"], "--threads takes a positive number"),
    (["bench", "--images", "/nowhere"], "/nowhere holds no pictures"),
    (["bench", "--budget", "long"], "--budget"),
    (["bench", "--bogus"], "--bogus"),
    (["bench", "--weights", "w.pt"], "--weights goes with one --model, got 2"),
    (["verify", "--model", MODEL, "--weights", "/nowhere.pt"], "cannot read weights from /nowhere.pt"),
    (["verify", "--model", "resnet51"], "resnet51"),
    (["inspect", "--model", "cifar_resnet9"], "9 is not of this form"),
    (["inspect", "--model", "/nowhere.py:net"], "there is no file /nowhere.py"),
    (["train", "--data", "cifar"], "--data takes mnist, digits or a folder with train/ and val/, got 'cifar'"),
    (["frobnicate"], "frobnicate")])
def test_a_mistake_is_one_sentence(run, tmp_path, arguments, message):
    code, _, err = run(*arguments, *(["--out", tmp_path / "x"] if arguments[0] == "bench" else []))
    assert code == 2 and message in err, err
    assert "Traceback" not in err and len(err.strip().splitlines()) <= 2
    assert not (tmp_path / "x" / "bench.json").exists()


def test_an_unwritable_folder_is_noticed_before_any_work(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    for command in (["bench"], ["train"]):
        code, _, err = run(*command, "--out", tmp_path / "file" / "x")
        assert code == 2 and f"cannot write into {tmp_path / 'file' / 'x'}: " in err
    assert (tmp_path / "file").read_text() == "mine"


def test_broken_results_are_not_overwritten(run, tmp_path):
    (tmp_path / "bench.json").write_text("{half")
    code, _, err = bench(run, tmp_path, "-q")
    assert code == 2 and "bench.json is not valid JSON" in err
    assert (tmp_path / "bench.json").read_text() == "{half"


def test_a_broken_cache_file_is_named_and_kept(run, tmp_path, monkeypatch):
    monkeypatch.setenv("FUSED_RESNET_CACHE_DIR", str(tmp_path))
    backends.reset()
    path = backends.cache().path
    path.write_text("{half")
    try:
        code, _, err = run("inspect", "--model", MODEL, "--size", "16")
        assert code == 2 and str(path) in err and len(err.strip().splitlines()) == 1
        assert path.read_text() == "{half"
        code, out, _ = run("env")
        assert code == 0 and str(path) in out
    finally:
        monkeypatch.undo()
        backends.reset()


@pytest.mark.parametrize(("name", "message"), [("bad", "failed: KeyError: 'x'"), ("number", "returned a int"),
                                               ("nett", "has no callable 'nett', did you mean 'net'")])
def test_factories_that_do_not_work_are_explained(run, factory, name, message):
    code, _, err = run("inspect", "--model", f"{factory}:{name}")
    assert code == 2 and message in err


def test_inspect_says_what_fuses_and_why_not(run, factory, tmp_path):
    code, out, err = run("inspect", "--model", f"{factory}:net", "--size", "16", "--out", tmp_path / "rows.json")
    assert code == 0, err
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert rows["0"]["status"] == "fused" and rows["0"]["launches"] == "1 conv"
    assert rows["3"]["status"] == "skipped" and "circular" in rows["3"]["reason"]
    assert "stock: 2 conv + 1 norm + 1 activation" in out and "1 of 2 convolutions fused" in out


@pytest.mark.parametrize("model", [MODEL, "torchvision:resnet18", "timm:resnet18"])
def test_inspect_takes_every_source(run, model):
    if ":" in model:
        pytest.importorskip(model.split(":")[0])
    code, out, err = run("inspect", "--model", model, "--size", "32", "--tree")
    assert code == 0, err
    count = 9 if model == MODEL else 20
    assert f"{count} of {count} convolutions fused" in out and "layer1" in out


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_verify_prints_both_errors_and_the_worst_blocks(run, dtype):
    code, out, err = run("verify", "--model", MODEL, "--dtype", dtype, "--worst", "2", *SMALL)
    assert code == 0, err
    assert out.startswith("ok: relative rms error") and "worst 2 of 3 blocks" in out and "BasicBlock" in out


def test_env_is_complete_and_machine_readable(run):
    code, out, _ = run("env", "--json")
    found = json.loads(out)
    assert code == 0 and found["backends"]["reference"] == "available"
    assert {"environment", "packages", "providers", "settings", "cache"} <= set(found)
    assert "cpu_flags" in run("env")[1]


def test_help_and_no_arguments(run):
    assert all(word in run()[1] for word in ("bench", "verify", "inspect", "env", "train"))
    assert "--budget" in run("bench", "--help")[1]


@pytest.mark.parametrize("package", ["typer", "rich"])  # needed at once, and by a command
def test_without_the_extra_there_is_one_sentence(package):
    program = (f"import sys; sys.modules['{package}'] = None\n"
               "from fused_resnet.cli import main\nmain(['env'])")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == f"fused-resnet: the command line needs {package}: pip install 'fused_resnet[cli]'"
