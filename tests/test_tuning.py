"""The cache file: whole at every moment, shared by processes, never in the way. And the tables that are shipped."""

import json
import os
import subprocess
import sys
import threading
import warnings

import pytest

from benchmarks import ship
from fused_resnet.testing import cases
from fused_resnet.testing.cases import conv
from fused_resnet.tuning import TABLES, VERSION, Cache, CacheError, Table, problem_of


def test_round_trip(tmp_path):
    cache = Cache(tmp_path / "deep" / "er")
    assert cache.get("a") is None
    assert not (tmp_path / "deep").exists()  # nothing is made before there is something to keep
    cache.set("a", {"backend": "cpu", "ms": 1.5})
    assert Cache(tmp_path / "deep" / "er").get("a") == {"backend": "cpu", "ms": 1.5}
    assert json.loads(cache.path.read_text())["version"] == VERSION


def test_writers_merge(tmp_path):
    first, second = Cache(tmp_path), Cache(tmp_path)
    assert first.get("x") is None and second.get("x") is None
    first.set("a", 1)
    second.set("b", 2)
    first.set("c", 3)
    assert Cache(tmp_path).read() == {"a": 1, "b": 2, "c": 3}
    assert first.get("b") == 2


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"version": 99, "rows": {}}', '{"version": 1}',
                                     '{"version": 1, "rows": []}', "\0\0"])
def test_files_that_are_not_ours_are_reported_once_and_left_alone(tmp_path, content):
    (tmp_path / "cache.json").write_text(content)
    cache = Cache(tmp_path)
    with pytest.raises(CacheError, match=r"cache\.json"):
        cache.read()
    with pytest.warns(UserWarning, match=r"in memory.*cache\.json"):
        assert cache.get("a") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.set("a", 1)
        assert cache.get("a") == 1
    assert (tmp_path / "cache.json").read_text() == content


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "cache.json").write_bytes(b"\xff\xfe\x00broken")
    with pytest.warns(UserWarning, match="in memory"):
        assert Cache(tmp_path).get("a") is None


def test_clear_starts_anew(tmp_path):
    (tmp_path / "cache.json").write_text("broken")
    cache = Cache(tmp_path)
    cache.clear()
    cache.set("a", 1)
    assert Cache(tmp_path).get("a") == 1


def test_directories_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "folder")  # root may write anywhere, but not below a file
    with pytest.warns(UserWarning, match="in memory"):
        cache.set("a", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.set("b", 2)
    assert cache.get("a") == 1 and cache.get("b") == 2


def test_a_write_that_fails_halfway_leaves_the_old_file(tmp_path, monkeypatch):
    cache = Cache(tmp_path)
    cache.set("a", 1)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="No space left"):
        cache.set("b", 2)
    assert cache.get("b") == 2
    assert Cache(tmp_path).read() == {"a": 1}
    assert not list(tmp_path.glob("*.tmp"))


def test_values_that_are_no_json_leave_the_old_file(tmp_path):
    cache = Cache(tmp_path)
    cache.set("a", 1)
    with pytest.raises(TypeError):
        cache.set("b", object())
    assert Cache(tmp_path).read() == {"a": 1}
    assert not list(tmp_path.glob("*.tmp"))


WRITER = """
import sys, pathlib, importlib.util
spec = importlib.util.spec_from_file_location("tuning", sys.argv[1])
tuning = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tuning)
cache = tuning.Cache(pathlib.Path(sys.argv[2]))
for i in range(100):
    cache.set(f"{sys.argv[3]} {i}", i)
"""


def test_processes_write_together_and_readers_never_see_half_a_file(tmp_path):
    import fused_resnet.tuning as module

    writers = [subprocess.Popen([sys.executable, "-c", WRITER, module.__file__, str(tmp_path), name])
               for name in ("one", "two")]
    reads = 0
    while any(w.poll() is None for w in writers):
        Cache(tmp_path).read()  # raises on half a file
        reads += 1
    assert [w.wait() for w in writers] == [0, 0]
    assert len(Cache(tmp_path).read()) == 200
    assert reads


def test_threads_share_one_cache(tmp_path):
    cache = Cache(tmp_path)
    threads = [threading.Thread(target=lambda t=t: [cache.set(f"{t} {i}", i) for i in range(20)]) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Cache(tmp_path).read()) == 80


def row(problem, backend="triton", tile=None, family="conv_bn_act"):
    return {"family": family, "problem": problem.id, "backend": backend, "tile": tile, "ms": 1.0, "label": "measured"}


HERE = conv(64, 64, 56, n=32, residual=True)._replace(device="cuda", dtype="bf16")


@pytest.mark.parametrize("problem", [*cases.CATALOGUE, *cases.STEMS, HERE, HERE._replace(prologue="silu", groups=2)],
                         ids=lambda p: p.id)
def test_a_problem_is_read_from_its_id(problem):
    assert problem_of(problem.id) == problem


@pytest.mark.parametrize("name", ["", "n2", "n2c16h6w6k32r3s3-p1-norm+gelu-fp32-cpu", "n2c16h6w6-relu-fp32-cpu"])
def test_other_names_are_no_problem(name):
    assert problem_of(name) is None


def test_a_row_answers_for_its_own_problem():
    table = Table([row(HERE), row(HERE, "cudnn", family="stem")])
    assert table.exact("conv_bn_act", HERE)["backend"] == "triton"
    assert table.exact("stem", HERE)["backend"] == "cudnn"
    assert table.exact("conv_bn_act", HERE._replace(N=1)) is None


@pytest.mark.parametrize(("change", "near"), [
    ({"N": 64}, True), ({"N": 90}, True), ({"N": 91}, False), ({"N": 8}, False), ({"H": 28, "W": 112}, True),
    ({"C": 128}, True), ({"C": 192}, False), ({"K": 32}, True), ({"K": 16}, False),
    ({"N": 64, "C": 128, "K": 128}, True), ({"activation": "relu6"}, True), ({"activation": "silu"}, False),
    ({"activation": "identity"}, False), ({"norm": False, "bias": True}, True), ({"residual": False}, False),
    ({"prologue": "relu"}, False), ({"dtype": "fp16"}, False), ({"R": 1, "S": 1}, False), ({"stride": (2, 2)}, False),
    ({"dilation": (2, 2)}, False), ({"groups": 2}, False), ({"device": "cpu"}, False)], ids=str)
def test_what_a_neighbour_is(change, near):
    assert bool(Table([row(HERE)]).near("conv_bn_act", HERE._replace(**change))) is near
    assert not Table([row(HERE)]).near("stem", HERE)


def test_depthwise_problems_have_depthwise_neighbours():
    groups = HERE._replace(groups=32)
    assert not Table([row(groups)]).near("conv_bn_act", HERE._replace(groups=64))
    assert Table([row(groups)]).near("conv_bn_act", HERE._replace(groups=16))


def test_the_nearest_comes_first():
    table = Table([row(HERE._replace(N=n), backend) for n, backend in ((16, "cpu"), (40, "cudnn"), (80, "triton"))])
    assert [found["backend"] for found in table.near("conv_bn_act", HERE)] == ["cudnn", "cpu", "triton"]


def test_rows_of_another_form_are_left_out_with_one_warning():
    wrong = [None, [], {}, row(HERE, backend=3), row(HERE, tile="big"), {**row(HERE), "family": None}]
    with pytest.warns(UserWarning, match="ignores 6 rows of mine: not of the form") as caught:
        table = Table([*wrong, row(HERE, "cudnn")], "mine")
    assert len(caught) == 1 and table.exact("conv_bn_act", HERE)["backend"] == "cudnn"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 9, "rows": []}', '{"version": 1}', "\0",
                                     '{"version": 1, "rows": 3}'])
def test_a_broken_table_is_an_empty_one(tmp_path, content):
    (tmp_path / "sm_90.json").write_text(content)
    with pytest.warns(UserWarning, match=r"ignores the table .*sm_90\.json") as caught:
        assert Table.load("sm_90", tmp_path).exact("conv_bn_act", HERE) is None
    assert len(caught) == 1


def test_shipped_tables_are_whole_and_classes_without_one_are_empty():
    paths = sorted(TABLES.glob("*.json"))
    assert [path.stem for path in paths] == ["sm_90"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in paths:
            table, data = Table.load(path.stem), json.loads(path.read_text())
            assert data["rows"] or "Nothing has been measured yet" in data["note"]
            for entry in data["rows"]:
                assert entry["label"] == "measured" and entry["ms"] > 0 and problem_of(entry["problem"]) is not None
                assert table.near(entry["family"], problem_of(entry["problem"]))
        assert Table.load("sm_80").near("conv_bn_act", HERE) == []


def test_winners_are_shipped(tmp_path, capsys):
    tile = {"kernel": "gemm", "BLOCK_M": 64}
    shared = {"winner": True, "ms_p50": 2.0, "problem": HERE.id, "tile": None}
    rows = [{**shared, "backend": "triton", "tile": tile, "vs_stock": 1.2},
            {**shared, "backend": "cudnn", "winner": False}, {"problem": HERE.id, "status": "failed"},
            {**shared, "problem": HERE._replace(N=1).id, "backend": "triton", "tile": tile, "vs_stock": 0.5},
            {**shared, "problem": HERE._replace(N=2).id, "backend": "stock"}]
    source, out = tmp_path / "tune.json", tmp_path / "tables"
    out.mkdir()
    environment = {"gpu": "G", "gpu_capability": [9, 0]}
    source.write_text(json.dumps({"environment": environment, "commit": "abc", "rows": rows}))
    assert ship.main([str(source), "--out", str(out)]) == 0 and "3 rows in" in capsys.readouterr().out
    table = Table.load("sm_90", out)
    assert table.exact("conv_bn_act", HERE) == row(HERE, tile=tile) | {"ms": 2.0}
    assert table.exact("conv_bn_act", HERE._replace(N=1)) == row(HERE._replace(N=1), "reference")
    assert table.exact("conv_bn_act", HERE._replace(N=2))["backend"] == "reference"
    assert json.loads((out / "sm_90.json").read_text())["environment"]["commit"] == "abc"


@pytest.mark.parametrize("content", [None, "{", "[]", '{"environment": {}, "rows": []}', '{"rows": [{"winner": 1}]}'])
def test_nothing_is_shipped_of_nothing(tmp_path, capsys, content):
    source = tmp_path / "tune.json"
    if content is not None:
        source.write_text(content)
    assert ship.main([str(source), "--out", str(tmp_path)]) == 2
    assert f"cannot ship {source}" in capsys.readouterr().err and not list(tmp_path.glob("sm_*"))
