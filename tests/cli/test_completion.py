"""What a shell completes: at once, without torch, and nothing that the commands refuse."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")

import typer

from fused_resnet import models as builders
from fused_resnet.bench import pictures, providers
from fused_resnet.cli import app, models, options, words

HEAVY = ("torch", "triton", "numpy", "rich", "matplotlib")
# Says last, on stderr, which of them the process has loaded.
PROGRAM = f"""
import atexit, sys
atexit.register(lambda: print("loaded:", *[name for name in {HEAVY} if name in sys.modules], file=sys.stderr))
from fused_resnet.cli import main
main()
"""
BASH = [
    ("", ["bench", "verify", "inspect", "tune", "train", "env"]),
    ("tune --d", ["--dtype", "--device"]),
    ("inspect --model resnet1", ["resnet18", "resnet101", "resnet152"]),
    ("bench --model resnet18,resnet3", ["resnet18,resnet34"]),
    ("train --model t", ["torchvision:", "timm:"]),
    ("bench --provider fused,fused_c", ["fused,fused_cuda", "fused,fused_cudnn", "fused,fused_cpu"]),
    ("bench --dtype fp32,i", ["fp32,int8"]),
    ("verify --dtype f", ["fp32", "fp16"])]


def alone(*arguments, **environment):
    """A process of the command line: (exit code, stdout, stderr without its last line, what was loaded)."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], env={**os.environ, **environment}, text=True,
                          capture_output=True)
    *said, loaded = done.stderr.splitlines()
    assert loaded.startswith("loaded:"), done.stderr
    return done.returncode, done.stdout, "\n".join(said), loaded.split()[1:]


@pytest.mark.parametrize(("typed", "offered"), BASH, ids=[typed.replace(" ", "_") or "nothing" for typed, _ in BASH])
def test_bash_gets_its_words_without_torch(typed, offered):
    line = f"fused-resnet {typed}"
    _, out, err, loaded = alone(_FUSED_RESNET_COMPLETE="complete_bash", COMP_WORDS=line,
                                COMP_CWORD=str(len(line.split(" ")) - 1))
    assert (out.split(), err, loaded) == (offered, "", [])


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_theirs_without_torch(shell):
    _, out, err, loaded = alone(_FUSED_RESNET_COMPLETE=f"complete_{shell}", _TYPER_COMPLETE_FISH_ACTION="get-args",
                                _TYPER_COMPLETE_ARGS="fused-resnet inspect --model resnet3")
    assert "resnet34" in out and "resnet18" not in out and (err, loaded) == ("", [])


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_the_script_works_in_bash():
    """What `--install-completion` writes, called as bash calls it."""
    code, script, err, _ = alone(_FUSED_RESNET_COMPLETE="source_bash")
    assert code == 0 and "complete " in script, err
    call = ('COMP_WORDS=(fused-resnet inspect --model resnet1); COMP_CWORD=3; _fused_resnet_completion '
            f'"{sys.executable}\n-m\nfused_resnet"; echo "${{COMPREPLY[*]}}"')  # unquoted there, and split by lines
    done = subprocess.run(["bash", "--norc", "-c", f"{script}\n{call}"], capture_output=True, text=True)
    assert done.stdout.split() == ["resnet18", "resnet101", "resnet152"], done.stderr


@pytest.mark.parametrize(("arguments", "code", "said"), [
    (["--help"], 0, "inspect"), (["train", "--help"], 0, "default: 0.1"), (["bench", "--bogus"], 2, "--bogus"),
    (["frobnicate"], 2, "frobnicate"), (["verify", "--batch", "0"], 2, "--batch")])
def test_help_and_mistakes_do_not_wait_for_torch(arguments, code, said):
    found, out, err, loaded = alone(*arguments)
    assert found == code and said in out + err and loaded == []


def test_the_last_word_of_a_list_is_completed():
    assert options.complete_models("resnet18,resnet3") == ["resnet18,resnet34"]
    assert options.complete_model("resnet18,resnet3") == [] and options.complete_model("nowhere:") == []
    assert options.complete_device("") == ["cpu", "cuda"] and options.complete_device("cu") == ["cuda"]


def test_models_of_a_zoo_are_completed():
    pytest.importorskip("torchvision")
    assert "torchvision:resnet18" in options.complete_models("torchvision:resnet1")


def offered_by(command, option):
    """What the command completes for the option; None where it has no such option, or completes none."""
    found = typer.main.get_command(app.app).commands[command]
    words = [item.value for parameter in found.params if parameter.name == option
             for item in parameter.shell_complete(typer.Context(found), "")]
    return words or None


# Option -> command -> a mistake that the command finds after it has understood the option, and what it says of it.
LATER = {
    "dtype": dict.fromkeys(("bench", "tune", "verify", "inspect"), (["--model", "nowhere"], "unknown model 'nowhere'")),
    "device": {**dict.fromkeys(("bench", "tune", "verify", "inspect"), (["--dtype", "fp23"], "got 'fp23'")),
               "train": (["--schedule", "noon"], "got 'noon'")},
    "provider": {"bench": (["--mode", "all", "--dtype", "fp23"], "got 'fp23'")}}
UNABLE = ("--device cuda: no CUDA device is visible to PyTorch", "--dtype tf32 needs --device cuda")


@pytest.mark.parametrize(("option", "command"), [(option, command) for option in LATER for command in LATER[option]])
def test_the_commands_accept_what_is_offered(capsys, option, command):
    mistake, message = LATER[option][command]
    for word in offered_by(command, option):
        taken = f"fused,{word}" if option == "provider" else word  # both modes have one of these
        assert app.run([command, f"--{option}", taken, *mistake]) == 2
        err = capsys.readouterr().err
        assert message in err or any(reason in err for reason in UNABLE), err
    assert app.run([command, f"--{option}", "nonsense", *mistake]) == 2
    assert "'nonsense'" in capsys.readouterr().err


def test_every_model_that_is_offered_is_built():
    for command in ("bench", "tune", "train", "verify", "inspect"):
        assert offered_by(command, "model") == options.model_names("")
    with torch.device("meta"):
        for name in options.model_names(""):
            assert name.removesuffix(":") in words.ZOOS or models.resolve(name)[0] == name


def test_nothing_is_missing_from_what_is_offered():
    assert {*words.MODELS, "cifar_resnet"} == {name for name in builders.__all__ if name.islower()}
    assert words.PROVIDERS == tuple(dict.fromkeys([*providers.PROVIDERS, *providers.TRAINING]))
    assert words.SIZE == pictures.SIZE
    completed = {(command, option) for command in typer.main.get_command(app.app).commands
                 for option in ("model", "dtype", "device", "provider") if offered_by(command, option)}
    assert completed == {(command, option) for option in LATER for command in LATER[option]} | {
        (command, "model") for command in ("bench", "tune", "train", "verify", "inspect")}
