"""What every command has in common: JSON alone on stdout, pages, trees, terminals of every width."""

import io
import json

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from rich.console import Console
from rich.table import Table

from fused_resnet import fusing, models, timing
from fused_resnet.bench.stock import plain
from fused_resnet.cli import app, console
from fused_resnet.cli import tree as network

MODEL = ["--model", "cifar_resnet8", "--size", "32"]
BENCH = ["bench", *MODEL, "--batch", "2", "--dtype", "fp32", "--budget", "0"]


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs one command line: (exit code, stdout, stderr)."""
    monkeypatch.setattr(timing, "PAUSE", 0.0)

    def command(*arguments):
        code = app.run([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return command


@pytest.mark.parametrize("command", [
    ["inspect", *MODEL], ["verify", *MODEL], ["env"], [*BENCH, "--provider", "eager,fused"],
    ["tune", *MODEL, "--batch", "1", "--dtype", "fp32", "--budget", "0", "--layer", "k64r1s1"]], ids=lambda c: c[0])
def test_with_json_stdout_is_one_object_and_quiet_is_quiet(run, tmp_path, command):
    more = ["--out", tmp_path] if command[0] == "bench" else []
    code, out, err = run(*command, *more, "--json", "--quiet")
    assert code == 0, err
    assert isinstance(json.loads(out), dict) and (err == "" or command[0] == "tune"), err


def test_every_command_says_what_it_takes(run):
    for command in ("bench", "verify", "inspect", "tune", "train", "env"):
        code, out, _ = run(command, "--help")
        assert code == 0 and "--json" in out and "--quiet" in out, command
    assert "Exit codes" in run("--help")[1] and "NO_COLOR" in run("--help")[1]


def test_json_of_inspect_and_verify_holds_the_rows(run):
    found = json.loads(run("inspect", *MODEL, "--json", "-q")[1])
    assert {row["launches"] for row in found["rows"]} == {"1 conv"} and found["launches"]["stock"]["norm"] == 9
    assert all(row["label"] == "heuristic" and row["flops"] > 0 for row in found["rows"])
    found = json.loads(run("verify", *MODEL, "--json", "--worst", "2", "-q")[1])
    assert found["ok"] is True and len(found["blocks"]) == 2 and found["fused_convolutions"] == 9


def test_pages_are_written_with_and_without_times(run, tmp_path):
    pytest.importorskip("jinja2")
    code, _, err = run("inspect", *MODEL, "--html", tmp_path / "deep" / "a.html", "-q")
    assert code == 0, err
    text = (tmp_path / "deep" / "a.html").read_text()
    assert "Computed from the shapes" in text and "counted by the profiler" in text
    code, _, err = run(*BENCH, "--layers", "--html", tmp_path / "b.html", "--out", tmp_path, "--dark")
    assert code == 0 and "b.html" in err, err
    text = (tmp_path / "b.html").read_text()
    assert "GFLOP/s, measured" in text and "not measured" not in text
    assert (tmp_path / "layers-cifar_resnet8-fp32-2.png").is_file()


@pytest.mark.parametrize("option", ["--html", "--out"])
def test_a_file_that_cannot_be_written_is_noticed_first(run, tmp_path, option):
    (tmp_path / "file").write_text("")
    for target, message in ((tmp_path, f"{option} takes a file"), (tmp_path / "file" / "x", "cannot write into")):
        code, _, err = run("inspect", *MODEL, option, target)
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1


def test_an_input_that_the_model_does_not_take_is_one_sentence(run):
    code, _, err = run("inspect", *MODEL, "--channels", "1")
    assert code == 2 and "does not take an input of [1, 1, 32, 32]; --size, --channels" in err
    assert len(err.strip().splitlines()) == 1


def printed(shown, width=200):
    out = Console(file=io.StringIO(), width=width, color_system=None)
    out.print(shown)
    return out.file.getvalue()


def test_the_tree_says_what_one_launch_is_and_merges_equal_neighbours():
    report = fusing.report(fusing.fuse(plain(models.cifar_resnet(20)).eval()))
    text = printed(network.of(report, "net", {"conv1": "1 conv"}))
    assert text.splitlines()[0] == "net CifarResNet  21 of 21 fused" and "conv1  conv+norm+act  one launch" in text
    assert "1 .. 2 BasicBlock  2 of 2 fused, each" in text and "0 .. 2 BasicBlock" in text
    assert ("layer2 .. layer3 Sequential  7 of 7 fused, each  3 x conv+norm+act, 3 x conv+norm+add+act, 1 x conv+norm"
            in printed(network.of(report, "net", {}, 1)))
    assert len(printed(network.of(report, "net", {}, 0)).splitlines()) == 1
    strange = fusing.Report((fusing.Row("a.[red]", "", "skipped", "", "[/why]"),), (), {"": "[C]"})
    assert "[red]  skipped  [/why]" in printed(network.of(strange, "net", {}))


def test_inspect_draws_the_tree(run):
    code, out, _ = run("inspect", *MODEL, "--depth", "2", "-q")
    assert code == 0 and "layer1" not in out
    assert "layer1 Sequential" in run("inspect", *MODEL, "--depth", "1")[1]
    assert "one launch on cpu (heuristic)" in run("inspect", *MODEL, "--tree")[1]


def test_narrow_terminals_lose_columns_not_letters(monkeypatch):
    def table():
        made = Table()
        made.add_column("name", min_width=10)
        for head in ("first", "second", "third"):
            made.add_column(head, no_wrap=True)
        made.add_row("resnet50", *["0123456789"] * 3)
        return made

    for width, heads in ((80, 4), (45, 3), (32, 2), (20, 2)):
        out = Console(file=io.StringIO(), width=width, color_system=None)
        monkeypatch.setattr(console, "out", out)
        console.show(table(), ("third", "second"))
        text = out.file.getvalue()
        assert sum(head in text for head in ("name", "first", "second", "third")) == heads, text


def test_what_is_no_terminal_gets_no_colours(run, monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    assert "\x1b" not in run("inspect", *MODEL)[1]
    for colours, found in ({}, True), ({"NO_COLOR": "1"}, False):
        out = Console(file=io.StringIO(), force_terminal=True, color_system="standard", _environ=colours)
        monkeypatch.setattr(console, "out", out)
        run("inspect", *MODEL)
        assert ("\x1b[32m" in out.file.getvalue()) == found
