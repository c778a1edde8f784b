"""A plan's first steps a few images at a time: the same results, where the batch is larger than the cache."""

import pytest
import torch
from torch import nn

import fused_resnet as fr
from fused_resnet.fusing import replay, slices
from fused_resnet.fusing.slices import Cut
from fused_resnet.numerics import check_network


@pytest.fixture(autouse=True)
def no_recordings(monkeypatch):
    """What one call plays as a whole is not cut."""
    monkeypatch.setattr(replay, "kind_of", lambda *_: None)


@pytest.fixture
def cache(monkeypatch):
    """Sets the size of the cache that plans are cut for."""
    def size(count):
        monkeypatch.setattr(slices.timing, "cache_bytes", lambda: count)
    return size


def plan_of(fused):
    return next(m.forward for m in fused.modules() if hasattr(m.forward, "cuts"))


def run(model, x, calls=3):
    """Results of the first calls, and the cuts they were made with: stock's answer, the whole batch, then slices."""
    fused = fr.fuse(model)
    with torch.no_grad():
        results = [fused(x) for _ in range(calls)]
    return results, plan_of(fused).cuts


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=("nchw", "nhwc"))
@pytest.mark.parametrize("batch", (2, 5, 8))
def test_slices_give_what_the_whole_batch_gives(cache, layout, batch):
    model = fr.models.resnet18(num_classes=10).eval().to(memory_format=layout)
    x = torch.randn(batch, 3, 64, 64).to(memory_format=layout)
    cache(600_000)
    results, cuts = run(model, x)
    (cut,) = cuts.values()
    assert cut is not None and 0 < cut.images < batch and cut.steps > 2
    with torch.no_grad():
        expected = model(x)
        exact = model.double()(x.double())
    for result in results:
        assert result.stride() == expected.stride()
        bound = check_network(result, expected, exact, dtype="fp32")
        assert bound.ok, str(bound)


def test_what_fits_the_cache_stays_whole(cache):
    model = fr.models.cifar_resnet(20).eval()
    for size in (1 << 40, 1):  # everything fits; not even one image does
        cache(size)
        assert list(run(model, torch.randn(4, 3, 32, 32))[1].values()) == [None]


def test_each_shape_is_cut_by_itself(cache):
    fused = fr.fuse(fr.models.cifar_resnet(20).eval())
    cache(600_000)
    with torch.no_grad():
        for batch in (8, 8, 8, 4, 4, 4, 1, 1):
            fused(torch.randn(batch, 3, 32, 32))
    cuts = {key[0][0]: cut for key, cut in plan_of(fused).cuts.items()}
    assert set(cuts) == {8, 4}  # one image cannot be cut
    assert cuts[8] is not None


class MixesImages(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        x = x - x.mean(0, keepdim=True)
        return torch.relu(self.bn2(self.conv2(x)))


class ReadsEarlyMaps(MixesImages):
    def forward(self, x):
        early = torch.relu(self.bn(self.conv(x)))
        late = torch.relu(self.bn2(self.conv2(early)))
        return torch.cat((early, late), 1), early, x.mean()


def test_a_step_that_looks_across_images_ends_the_cut(cache):
    model, x = MixesImages().eval(), torch.randn(6, 3, 32, 32)
    cache(200_000)
    results, cuts = run(model, x)
    (cut,) = cuts.values()
    assert cut is not None and cut.steps == 1
    with torch.no_grad():
        torch.testing.assert_close(results[-1], model(x))


def test_values_that_are_read_later_are_whole(cache):
    model, x = ReadsEarlyMaps().eval(), torch.randn(6, 3, 32, 32)
    cache(600_000)
    results, cuts = run(model, x)
    (cut,) = cuts.values()
    assert cut is not None and cut.steps == 2
    with torch.no_grad():
        for mine, theirs in zip(results[-1], model(x), strict=True):
            torch.testing.assert_close(mine, theirs)
            assert mine.stride() == theirs.stride()


def test_a_change_of_threads_is_another_cut():
    x = torch.randn(4, 3, 8, 8)
    before = torch.get_num_threads()
    keys = set()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            keys.add(slices.key_of((x,)))
    finally:
        torch.set_num_threads(before)
    assert len(keys) == 2 and None not in keys
    assert slices.key_of((x[:1],)) is None and slices.key_of((x, x)) is None and slices.key_of((x[0],)) is None


def test_parts_are_of_one_size(cache):
    ruler = slices.Ruler([], 2)
    ruler._most = [1000]
    threads = torch.get_num_threads()
    cache(2 * 1000 * 6 // 8)  # room for six of eight images: four and four are better than six and two
    assert ruler.cut(8) == Cut(1, max(4, threads))
