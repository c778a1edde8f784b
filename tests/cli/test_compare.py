"""`bench --compare` as a user and as a continuous integration run it."""

import json

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from fused_resnet.bench import results
from fused_resnet.bench.results import Row
from fused_resnet.cli import app


def row(ms, provider="fused", **fields):
    return Row(**{"level": "model", "model": "resnet50", "batch": 8, "dtype": "fp32", "device": "cpu",
                  "provider": provider, "ms_p20": 0.99 * ms, "ms_p50": ms, "ms_p80": 1.01 * ms, **fields})


@pytest.fixture
def run(capsys, tmp_path):
    """Compares two files of rows: (exit code, stdout, stderr)."""
    def command(old, new, *arguments, **environment):
        for name, rows, more in (("old", old, {}), ("new", new, environment)):
            results.save(results.Results({"cpu": "any", **more}, "abc", rows), tmp_path / f"{name}.json")
        files = (tmp_path / "old.json", tmp_path / "new.json")
        code = app.run(["bench", "--compare", *map(str, files), *arguments])
        return code, *capsys.readouterr()

    return command


SLOWER = [row(10.0), row(20.0, "eager")], [row(11.0), row(20.1, "eager")]


def test_a_table_names_what_changed_and_by_which_rule(run):
    code, out, err = run(*SLOWER)
    assert code == 0 and "slower (p20 .. p80 apart)" in out and "within noise (p20 .. p80 overlap)" in out
    assert "1.100" in out and "1 slower, 0 faster, 1 within noise" in err
    assert out.index("fused") < out.index("eager"), "what became slower stands first"


@pytest.mark.parametrize(("percent", "code"), [("5", 1), ("10.5", 0), ("0", 1)])
def test_fail_slower_decides_the_exit_code(run, percent, code):
    found, _, err = run(*SLOWER, "--fail-slower", percent)
    assert found == code and ("1 of 2 rows are slower by more than" in err) == bool(code)


def test_noise_never_fails_and_broken_rows_always_do(run):
    assert run([row(10.0, ms_p80=12.0)], [row(11.0)], "--fail-slower", "0")[0] == 0
    failed = Row("model", "resnet50", 8, "fp32", "cpu", "fused", status="failed")
    code, out, _ = run([row(10.0)], [failed], "--fail-slower", "50")
    assert code == 1 and "ok to failed" in out


def test_json_is_all_that_stdout_holds(run):
    code, out, err = run(*SLOWER, "--fail-slower", "5", "--json", "--provider", "fused")
    found = json.loads(out)
    assert code == 1 and "slower" in err
    assert [change["provider"] for change in found["changes"]] == ["fused"]
    assert found["changes"][0]["verdict"] == "slower" and found["failed"][0]["provider"] == "fused"
    assert run(*SLOWER, "--json", "--quiet")[2] == ""


def test_notes_say_what_the_rows_cannot(run):
    _, _, err = run([row(10.0), row(10.0, "eager"), row(1.0, "compile")], [row(12.0), row(12.0, "eager")], torch="9")
    assert "another torch: - became 9" in err and "1 rows are in the old file only, 0 in the new one only" in err
    assert "the stock rows changed by a factor of 1.200" in err


@pytest.mark.parametrize(("arguments", "message"), [
    (["--compare", "none.json", "none.json"], "cannot read none.json"),
    (["--compare", "one.json"], "'--compare' requires 2 arguments"),
    (["--fail-slower", "3"], "--fail-slower goes with --compare"),
    (["--html", "x.html"], "--html goes with --layers")])
def test_mistakes(capsys, arguments, message):
    assert app.run(["bench", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.strip().splitlines()) == 1


def test_a_corrupt_file_is_named(run, tmp_path, capsys):
    run(*SLOWER)
    (tmp_path / "new.json").write_text("{half")
    assert app.run(["bench", "--compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")]) == 2
    assert "new.json is not valid JSON" in capsys.readouterr().err
