"""docs/coverage.md and the figures behind it: recorded, in step with the code, and such that they could be worse."""

import json

import pytest
import torch
from torch import nn

import fused_resnet as fr
from benchmarks import coverage, survey, zoo, zoos
from tests.nets import randomize

ROWS = zoo.load()
RAN = {name: row for name, row in ROWS.items() if row["status"] != "left out"}
SAMPLE = ["torchvision:resnet18", "torchvision:quantization.resnet18", "timm:resnet10t", "timm:resnetv2_18",
          "transformers:ResNet-18"]


def test_the_page_is_that_of_the_results():
    assert zoo.PAGE.read_text() == coverage.page(ROWS, zoo.BATCH), "run: python -m benchmarks.zoo"


@pytest.mark.parametrize("name", SAMPLE)
def test_rows_are_those_of_today(name):
    recorded = json.loads(zoo.RESULTS.read_text())["environment"]
    if {key: recorded[key] for key in zoos.versions()} != zoos.versions():
        pytest.skip("recorded with other versions of the zoos")
    row = zoo.measure(name)
    assert {key: row[key] for key in zoo.EXACT} == {key: ROWS[name][key] for key in zoo.EXACT}
    assert row["error"] <= 10 * row["stock_error"] + 1e-6


def test_nothing_is_wrong_and_everything_skipped_has_a_reason():
    assert {name: row["why"] for name, row in RAN.items() if row["status"] != "ok"} == {}
    for name, row in RAN.items():
        assert row["pairs"] - row["fused"] == sum(row["skipped"].values()), name
        assert all(reason and reason != "no plan covers it" for reason in (*row["skipped"], *row["alone"])), name
    assert all(row["parameters_m"] > 150 for row in ROWS.values() if row["status"] == "left out")


def family(source):
    return [row for name, row in RAN.items() if name.startswith(f"{source}:") and row["batch_norm"]
            and name.partition(":")[2].startswith(coverage.FAMILY)]


def test_torchvisions_family_fuses_entirely():
    rows = family("torchvision")
    assert len(rows) >= 9 and all(row["fused"] == row["pairs"] == row["convolutions"] for row in rows)
    assert all(row["norms_left"] == 0 for row in rows)


def test_timms_family_fuses_nearly_entirely():
    rows = family("timm")
    good = [row for row in rows if row["fused"] >= 0.9 * row["pairs"] > 0]
    assert len(rows) >= 50 and len(good) >= 0.95 * len(rows)


class Net(nn.Module):
    """Two pairs behind which a norm stands, one in front of which one does, a convolution that stands alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.n1, self.n2, self.n3 = (nn.BatchNorm2d(8) for _ in range(3))

    def forward(self, x):
        x = torch.relu(self.n1(self.a(x)))
        x = x + self.n2(self.b(x))
        x = self.c(torch.relu(self.n3(x)))
        return self.d(torch.sigmoid(x))


X = torch.randn(1, 8, 6, 6, generator=torch.Generator().manual_seed(0))


def test_pairs_are_found_by_watching():
    found = survey.survey(randomize(Net()).eval(), X)
    assert (found.convolutions, found.norms) == (4, 3)
    assert found.paired == {"a": "behind", "b": "behind", "c": "in front"}


@torch.no_grad()
def test_only_what_ran_fused_counts():
    """A plan may promise what it likes: with kernels switched off nothing is fused."""
    fused = fr.fuse(randomize(Net()).eval())
    fused(X)
    assert survey.ran_fused(fused, X) == ({"a", "b", "c"}, 1)
    with fr.backends.use("reference"):
        fused(X)
        assert survey.ran_fused(fused, X) == ({"c"}, 3)
    fused.n1.register_forward_hook(lambda *_: None)
    assert survey.ran_fused(fused, X) == (set(), 3)


class Wrong(nn.Module):
    """Does one thing otherwise than the network inside."""

    def __init__(self, net, error):
        super().__init__()
        self.net, self.error = net, error

    def forward(self, x):
        if self.error == "layout":
            return self.net(x).contiguous(memory_format=torch.channels_last)
        if self.error == "exception" and x.dim() == 3:
            raise ValueError("three")
        if self.error == "buffer":
            self.net.n1.running_mean.add_(1)
        return self.net(x)


@pytest.mark.parametrize("error, says", [("layout", "strides"), ("exception", "three"), ("buffer", "state dict")])
@torch.no_grad()
def test_what_differs_is_noticed(error, says):
    stock = Wrong(randomize(Net()), None).eval()
    other = Wrong(stock.net, error).eval()
    if error == "buffer":
        other.net = randomize(Net()).eval()
    x = torch.randn(2, 8, 6, 6)
    assert zoo.mismatch(stock, stock, x) is None
    assert says in zoo.mismatch(stock, other, x)
