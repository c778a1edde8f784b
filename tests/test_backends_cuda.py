"""The native library among the backends: never a default, chosen where it was measured, refused with a reason."""

import pytest
import torch

from fused_resnet import backends, native, tuner
from fused_resnet.kernels.cuda import native as cuda
from fused_resnet.ops import bn_act  # noqa: F401 - registers its families
from fused_resnet.problem import NormProblem
from fused_resnet.testing.cases import conv
from fused_resnet.tuning import Table
from tests.test_backends import FAMILY, fresh, launch  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("fresh")

LAYER = conv(64, 64, 14, residual=True, n=8)._replace(device="cuda", dtype="bf16")


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a Hopper GPU whose native library is there, as far as the chooser can see; nothing can launch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: True)
    monkeypatch.setattr(native, "missing", lambda part: None)
    monkeypatch.setattr(native, "without_sm90", lambda: None)
    monkeypatch.setattr(native, "_note", lambda: {"archs": ["80", "90a"]})
    monkeypatch.setattr(backends, "device_name", lambda device: "GPU")
    table = Table()
    monkeypatch.setattr(backends, "_table", lambda device: table)
    cuda.capability.cache_clear()
    yield table
    cuda.capability.cache_clear()


def test_the_native_library_is_offered_and_no_default(gpu):
    assert backends.available()["cuda"] is None and dict(backends.explain(LAYER))["cuda"] is None
    for problem in (LAYER, LAYER._replace(activation="silu")):
        assert backends.choose(FAMILY, problem).name != "cuda"
    assert not any("cuda" in names for names in backends.HEURISTIC.values())
    with backends.use("cuda"):
        choice = backends.choose(FAMILY, LAYER)
    assert (choice.name, choice.label, choice.tile) == ("cuda", "forced", None)
    assert not choice.folded and not choice.trusted


def test_a_tuned_tile_of_the_native_library_is_chosen_and_judged_like_any_other(gpu):
    tile = {"kernel": "sm90", "BLOCK_M": 128, "BLOCK_N": 64, "label": "heuristic"}
    backends.adopt(FAMILY, LAYER, {"backend": "cuda", "tile": tile})
    choice = backends.choose(FAMILY, LAYER)
    assert (choice.name, choice.label, choice.tile) == ("cuda", "tuned", tile)
    for problem, useless in ((LAYER, {**tile, "BLOCK_N": 512}), (LAYER._replace(K=32), tile),
                             (LAYER._replace(C=60), tile)):
        backends.adopt(FAMILY, problem, {"backend": "cuda", "tile": useless})
        with pytest.warns(UserWarning, match="cuda has no such tile for it"):
            assert backends.choose(FAMILY, problem).name == "cudnn"


@pytest.mark.parametrize("archs", [["80"], ["86"], ["90a", "80"]], ids=str)
def test_code_runs_on_later_chips_of_its_generation(gpu, monkeypatch, archs):
    monkeypatch.setattr(native, "_note", lambda: {"archs": archs})
    served = {}
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, found=capability: found)
        served[capability] = backends.available()["cuda"] is None
    assert served == {(8, 0): archs != ["86"], (8, 6): True, (8, 9): True, (9, 0): "90a" in archs, (10, 0): False}


def test_the_librarys_own_rule_is_the_candidate_where_no_tile_has_a_name(gpu):
    narrow = LAYER._replace(K=32)
    ways = {way.tile and str(way.tile["BLOCK_N"]) for way in tuner.candidates(FAMILY, narrow) if way.backend == "cuda"}
    assert ways == {None}
    ways = [way for way in tuner.candidates(FAMILY, LAYER) if way.backend == "cuda"]
    assert len(ways) == 2 and all(way.tile for way in ways)
    order = [way.backend for way in tuner.candidates(FAMILY, LAYER)]
    assert order[:4] == ["reference", "cudnn", "cuda", "cuda"] and set(order[4:]) == {"triton"}


def test_a_shipped_row_of_the_native_library_serves_its_neighbours(gpu, monkeypatch):
    tile = {"kernel": "mma", "BLOCK_M": 128, "BLOCK_N": 64, "label": "tuned"}
    table = Table([{"family": FAMILY, "problem": LAYER.id, "backend": "cuda", "ms": 1.0, "label": "measured",
                    "tile": tile}])
    monkeypatch.setattr(backends, "_table", lambda device: table)
    backends.reset()
    for problem, label in ((LAYER, "shipped"), (LAYER._replace(N=9), "nearest")):
        choice = backends.choose(FAMILY, problem)
        assert (choice.name, choice.label, choice.tile) == ("cuda", label, tile)


@pytest.mark.parametrize(("capability", "missing", "word"), [
    ((7, 5), None, "8.0 or newer"), ((12, 0), None, "code for sm_80, sm_90a, this GPU is sm_120"),
    ((9, 0), "nvcc was not found while building", "CUDA part: nvcc was not found")])
def test_a_native_library_that_cannot_run_says_why(gpu, monkeypatch, capability, missing, word):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(native, "missing", lambda part: missing)
    assert word in backends.available()["cuda"] and word in dict(backends.explain(LAYER))["cuda"]
    with backends.use("cuda"), pytest.raises(ValueError, match=f"'cuda' cannot run .*{word}"):
        backends.choose(FAMILY, LAYER)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_the_native_library_is_refused_with_a_reason(monkeypatch):
    with backends.use("cuda"), pytest.raises(ValueError, match=r"'cuda' cannot run .*no CUDA device is visible"):
        launch()
    monkeypatch.setenv("FUSED_RESNET_BACKEND", "cuda")
    backends.reset()
    with pytest.raises(ValueError, match="no CUDA device is visible"):
        launch()


@pytest.mark.parametrize("name", ["bn_act", "bn_act_sums", "bn_act_grad"])
def test_norms_of_training_run_on_the_native_library_where_that_was_measured(gpu, name):
    problem = NormProblem("cuda", "bf16", 8, 14, 14, 64, shortcut="norm")
    assert backends.choose(name, problem).name == "reference"
    backends.adopt(name, problem, {"backend": "cuda", "tile": None})
    assert backends.choose(name, problem).name == "cuda" and backends.choose(name, problem).label == "tuned"
