"""`fused-resnet tune` as a user types it: what it measures, keeps, goes on with, and says about mistakes."""

import json

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")

from fused_resnet import backends, native, timing, tuner
from fused_resnet.cli import app

SMALL = ["--model", "cifar_resnet8", "--size", "16", "--batch", "2", "--dtype", "fp32"]
OWN = native.missing("cpu") is None  # then the classifier is a convolution of one pixel
PROBLEMS = 9 + OWN  # of cifar_resnet8, each of which runs once


@pytest.fixture
def run(capsys):
    """Runs `fused-resnet tune`: (exit code, stdout, stderr)."""
    def command(*arguments):
        code = app.run(["tune", *map(str, arguments)])
        return code, *capsys.readouterr()

    return command


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """A cache of its own, timing without pauses and in as few rounds as there may be."""
    measure = timing.measure
    monkeypatch.setattr(timing, "PAUSE", 0.0)
    monkeypatch.setattr(timing, "measure", lambda *a, **k: measure(*a, **{**k, "budget": 0.0, "min_rounds": 1}))
    monkeypatch.setenv("FUSED_RESNET_CACHE_DIR", str(tmp_path))
    backends.reset()
    yield tmp_path
    monkeypatch.undo()
    backends.reset()


def rows(folder):
    path = folder / "cache.json"
    found = json.loads(path.read_text())["rows"] if path.exists() else {}
    return {key: row for key, row in found.items() if key.startswith("tuned")}


def test_every_problem_gets_a_row_that_is_used(run, fresh):
    code, out, err = run(*SMALL)
    assert code == 0, err
    assert "x stock" in out and out.count("-fp32-cpu") == PROBLEMS and f"{PROBLEMS} problems tuned" in err
    assert len(rows(fresh)) == PROBLEMS
    backends.reset()
    key = next(iter(rows(fresh))).split()
    with tuner.recorded() as met, torch.no_grad():
        from fused_resnet import fuse, models

        fuse(models.cifar_resnet(8).eval())(torch.randn(2, 3, 16, 16))
    assert {backends.choose(*one).label for one in met} == {"tuned"} and key[2] in {p.id for _, p in met}


def test_what_was_tuned_is_not_measured_again(run, fresh):
    assert run(*SMALL, "--layer", "r1s1", "-q")[0] == 0
    few = rows(fresh)
    assert 0 < len(few) < PROBLEMS
    code, out, err = run(*SMALL)
    assert code == 0 and f"{len(few)} of {PROBLEMS} problems have been tuned before" in err
    assert out.count("-fp32-cpu") == PROBLEMS - len(few) == len(rows(fresh)) - len(few)
    assert "0 problems tuned" in run(*SMALL)[2]
    assert run(*SMALL, "--again", "--layer", "r1s1")[1].count("-fp32-cpu") == len(few)


def test_options_may_be_repeated_and_listed(run, fresh):
    code, _, err = run("--model", "cifar_resnet8", "--model", "cifar_resnet14", "--size", "16", "--batch", "1,2",
                       "--batch", "3", "--dtype", "fp32", "--layer", "c16h16w16k16")
    assert code == 0, err
    assert sorted(key.split()[2].partition("c")[0] for key in rows(fresh)) == ["n1", "n1", "n2", "n2", "n3", "n3"]


def test_a_problem_counts_as_often_as_the_models_run_it(run):
    code, out, err = run("--model", "cifar_resnet8,cifar_resnet14", *SMALL[2:], "--layer", "c64h4w4k64", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert {row["count"] for row in found["rows"] if "residual" in row["problem"]} == {1 + 2}
    for name in ("reference", "cpu"):
        assert len({row["problem"] for row in found["rows"] if row["backend"] == name}) == 2
    assert sum(row["winner"] for row in found["rows"]) == 2 and found["device"] == backends.device_name("cpu")


def test_quiet_leaves_the_table(run):
    code, out, err = run(*SMALL, "--layer", "r1s1", "--quiet")
    assert code == 0 and "x stock" in out and not err.strip()


def test_a_budget_that_is_used_up_leaves_the_rest_for_later(run, fresh):
    code, _, err = run(*SMALL, "--budget", "0")
    assert code == 0 and f"0 problems tuned, rows in {fresh / 'cache.json'}; {PROBLEMS} are left" in err
    assert not rows(fresh)


def test_interrupted_it_keeps_what_is_done_and_goes_on(run, fresh, monkeypatch):
    tune, done = tuner.tune, []

    def interrupted(*arguments, **options):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(tune(*arguments, **options))
        return done[-1]

    with monkeypatch.context() as patch:
        patch.setattr(tuner, "tune", interrupted)
        code, out, err = run(*SMALL)
    assert code == 130 and out.count("-fp32-cpu") == len(rows(fresh)) == 3
    assert f"{PROBLEMS - 3} are left" in err and "interrupted; what was written is kept" in err
    assert run(*SMALL)[0] == 0 and len(rows(fresh)) == PROBLEMS


def test_a_problem_that_cannot_be_measured_is_named(run, fresh, monkeypatch):
    tune = tuner.tune

    def short(family, problem, *rest):
        if problem.R == 1:
            raise torch.OutOfMemoryError("no memory\nis left")
        return tune(family, problem, *rest)

    monkeypatch.setattr(tuner, "tune", short)
    code, _, err = run(*SMALL)
    assert code == 0 and "r1s1" in err and "no memory is left" in err
    left = PROBLEMS - 2 - OWN
    assert len(rows(fresh)) == left and f"{left} problems tuned" in err and "are left" not in err


@pytest.mark.parametrize(("arguments", "message"), [
    (["--model", "resnet19"], "unknown model 'resnet19', did you mean 'resnet18'"),
    (["--model", "/nowhere.py:net"], "there is no file /nowhere.py"),
    (["--batch", "0"], "--batch takes positive whole numbers"), (["--batch", "x"], "got 'x'"),
    (["--dtype", "fp23"], "--dtype takes fp32, tf32, bf16, fp16, got 'fp23'"),
    (["--device", "cpu", "--dtype", "tf32"], "--dtype tf32 needs --device cuda"),
    (["--device", "tpu"], "--device takes cpu or cuda, got 'tpu'"), (["--threads", "0"], "--threads takes a positive"),
    (["--size", "4"], "--size"), (["--budget", "long"], "--budget"), (["--budget", "-1"], "--budget"),
    ([*SMALL, "--layer", "r9s9"], "no problem of cifar_resnet8 has 'r9s9' in its name; one of them is n2c3h16w16k16"),
    (["extra"], "extra"), (["--bogus"], "--bogus")])
def test_a_mistake_is_one_sentence(run, fresh, arguments, message):
    code, out, err = run(*arguments)
    assert code == 2 and message in err and not out, err
    assert "Traceback" not in err and len(err.strip().splitlines()) <= 2
    assert not rows(fresh)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_sentence(run):
    assert run("--device", "cuda")[::2] == (2, "fused-resnet: --device cuda: no CUDA device is visible to PyTorch\n")


def test_nothing_to_fuse_is_said(run, tmp_path):
    (tmp_path / "mine.py").write_text("from torch import nn\n\ndef net():\n    return nn.Sequential(nn.Flatten())\n")
    code, _, err = run("--model", tmp_path / "mine.py:net", *SMALL[2:])
    assert code == 2 and "nothing of net could be fused; `fused-resnet inspect` says why" in err


def test_help(run):
    assert all(word in run("--help")[1] for word in ("--again", "--layer", "--budget", "--json"))
