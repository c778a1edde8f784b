"""One schema: what is written can be read, what is broken is named, nothing is half written."""

import json

import pytest

from benchmarks import tables
from fused_resnet.bench import plots, results
from fused_resnet.bench.results import Row


def row(**fields):
    return Row(**{"level": "model", "model": "resnet50", "batch": 8, "dtype": "fp32", "device": "cpu",
                  "provider": "fused", "ms_p50": 1.5, "vs_stock": 1.2, "images_per_s": 5.0, **fields})


@pytest.fixture
def record():
    rows = [row(), row(status="failed", ms_p50=None)]
    return results.Results({"cpu": "any", "threads": 2, "torch": "2"}, "abc", rows)


def test_round_trip(record, tmp_path):
    path = results.save(record, tmp_path / "deep" / "bench.json")
    assert results.load(path) == record
    assert list(tmp_path.rglob("*")) == [path.parent, path]  # no temporary file is left


def test_the_schema_has_these_fields_and_no_others(record, tmp_path):
    data = json.loads(results.save(record, tmp_path / "a.json").read_text())
    assert set(data) == {"environment", "commit", "rows"}
    assert set(data["rows"][0]) == {
        "level", "model", "problem", "batch", "dtype", "autocast", "device", "mode", "graph", "provider", "backend",
        "status", "ms_p20", "ms_p50", "ms_p80", "images_per_s", "vs_stock", "rel_error", "launches", "peak_mem_mb",
        "saved_mb", "roofline_share", "samples"}


def test_samples_stand_in_one_line_and_files_without_them_are_read(record, tmp_path):
    record.rows[0].samples = [1.5, 1.23456789, 2.0]
    path = results.save(record, tmp_path / "a.json")
    assert '"samples": [1.5, 1.2346, 2.0]' in path.read_text()
    assert results.load(path).rows[0].samples == [1.5, 1.2346, 2.0]
    data = record.to_dict()
    for row in data["rows"]:
        del row["samples"]
    path.write_text(json.dumps(data))
    assert results.load(path).rows[0].samples is None


def test_text_is_json_of_the_same_value():
    value = {"numbers": [1, -2.5e-07, 3], "words": ["a", "b"], "none": [], "deep": [[1], [2.0, 3]], "mixed": [None, 1],
             "sly": "[\n 1,\n 2\n]"}
    text = results.to_text(value)
    assert json.loads(text) == value and "[1, -2.5e-07, 3]" in text and "[2.0, 3]" in text


def test_rows_with_a_graph_are_told_from_those_without(record):
    assert [row(graph=graph).label for graph in (False, True)] == ["fused", "fused + graph"]
    table = tables._table([row(launches=3), row(graph=True, status="wrong")])
    assert "| **fused** |" in table and "| **fused + graph** | wrong |" in table


def test_a_failed_write_leaves_the_old_file(record, tmp_path):
    path = results.save(record, tmp_path / "a.json")
    before = path.read_text()
    record.environment["bad"] = object()
    with pytest.raises(TypeError):
        results.save(record, path)
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]


def test_an_unwritable_folder_is_named(record, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write .*a\.json: "):
        results.save(record, tmp_path / "file" / "a.json")


@pytest.mark.parametrize(("change", "message"), [
    (lambda d: d.pop("commit"), "expected an object with the keys"),
    (lambda d: d.update(rows={}), "rows a list"),
    (lambda d: d["rows"].append(3), "row 2: expected an object, found 3"),
    (lambda d: d["rows"][0].pop("provider"), "row 0: provider is missing"),
    (lambda d: d["rows"][0].update(dtype="fp31"), "row 0: dtype is 'fp31', expected one of fp32"),
    (lambda d: d["rows"][0].update(status="fine"), "row 0: status is 'fine'"),
    (lambda d: d["rows"][0].update(ms_p20="fast"), "row 0: ms_p20 is 'fast', expected a number or null"),
    (lambda d: d["rows"][0].update(samples=[1.0, -2.0]), "row 0: samples are [1.0, -2.0], expected positive numbers"),
    (lambda d: d["rows"][0].update(samples=[]), "row 0: samples are []"),
    (lambda d: d["rows"][0].update(batch=1.5), "row 0: batch must be a whole number"),
    (lambda d: d["rows"][0].update(ms_p50=None), "row 0: status is ok without ms_p50")])
def test_a_file_that_breaks_the_schema_is_refused(record, tmp_path, change, message):
    data = record.to_dict()
    change(data)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"a\.json") as error:
        results.load(path)
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[1, 2"])
def test_broken_json_is_named(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON"):
        results.load(tmp_path / "a.json")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*none\.json"):
        results.load(tmp_path / "none.json")


def test_the_environment_says_what_a_reader_needs():
    found = results.describe_environment()
    assert {"cpu", "cores", "threads", "torch", "triton", "onednn", "python", "os", "gpu"} <= set(found)
    assert json.dumps(found)
    assert results.machine_slug().strip("-").replace("-", "").isalnum()


def test_a_chart_is_drawn_for_rows_that_were_timed(record, tmp_path):
    pytest.importorskip("matplotlib")
    record.rows += [row(provider="eager", vs_stock=1.0), row(provider="eager", vs_stock=1.0, graph=True)]
    path = plots.speedups(record, tmp_path / "a.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    assert plots.speedups(results.Results({}, "", []), tmp_path / "b.png") is None
    with pytest.raises(ValueError, match="cannot write"):
        plots.speedups(record, tmp_path / "none" / "a.png")


@pytest.mark.parametrize("text, name", [
    ("model\t\t: 17\nmodel name\t: AMD EPYC\ncpu family\t: 25\n", "AMD EPYC family 25 model 17"),
    ("cpu family\t: 6\nmodel\t: 143\nmodel name\t: Some CPU 8480\n", "Some CPU 8480"),
    ("model name\t: Nameless\n", "Nameless")])
def test_a_processor_without_a_number_is_told_by_family_and_model(monkeypatch, tmp_path, text, name):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(results, "Path", lambda _: tmp_path / "cpuinfo")
    assert results.cpu_model() == name
