"""The cache file: whole at every moment, shared by processes, never in the way."""

import json
import os
import subprocess
import sys
import threading
import warnings

import pytest

from fused_resnet.tuning import VERSION, Cache, CacheError


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
