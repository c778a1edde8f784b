"""Real photographs, prepared as for ImageNet, and norms calibrated on them."""

import pytest
import torch
from torch import nn

from fused_resnet import models
from fused_resnet.bench import pictures
from fused_resnet.bench.stock import plain

pytest.importorskip("skimage")
pytest.importorskip("PIL")


def test_bundled_pictures_are_read_from_the_installed_package():
    assert len(pictures.files()) >= 8


def test_pictures_are_normalised_and_all_different():
    batch = pictures.load(20, size=64)
    assert batch.shape == (20, 3, 64, 64) and batch.dtype == torch.float32 and batch.is_contiguous()
    assert abs(batch.mean()) < 1 and 0.5 < batch.std() < 2
    assert len({float(image.sum()) for image in batch}) == 20


def test_the_first_round_is_the_centre_crop(tmp_path):
    from PIL import Image

    Image.new("RGB", (256, 512), (255, 0, 0)).save(tmp_path / "red.png")
    image = pictures.load(1, folder=tmp_path)[0]
    assert image.shape == (3, 224, 224)
    expected = [(value - mean) / std for value, mean, std in zip((1.0, 0.0, 0.0), pictures.MEAN, pictures.STD)]
    assert image[:, 100, 100].tolist() == pytest.approx(expected, abs=1e-5)


def test_batches_go_round():
    found = pictures.batches(torch.arange(3.0).view(3, 1, 1, 1), 2, 4)
    assert [b.flatten().tolist() for b in found] == [[0, 1], [1, 2], [2, 0], [0, 1]]


def test_bad_folders_and_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no pictures"):
        pictures.load(1, folder=tmp_path)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"cannot read the picture .*a\.png"):
        pictures.load(1, folder=tmp_path)


def test_calibration_gives_every_norm_the_statistics_of_the_pictures():
    torch.manual_seed(0)
    model = plain(models.resnet18()).eval()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    photographs, said = pictures.load(8, size=64), []
    pictures.calibrate(model, photographs, say=said.append)
    assert len(said) == 1 and "no pretrained weights" in said[0] and "20 batch norms" in said[0]
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert not model.training and all(m.momentum == 0.1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    with torch.no_grad():
        stem = model.bn1(model.conv1(photographs))
    assert stem.mean((0, 2, 3)).abs().max() < 0.01 and (stem.std((0, 2, 3)) - 1).abs().max() < 0.01
