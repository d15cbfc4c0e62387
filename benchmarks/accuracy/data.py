"""Images as uint8 tensors: decoded once, kept in memory, chosen and ordered the same way every time."""

import functools
import pathlib
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Images:
    pixels: Tensor  # uint8, (N, 3, height, width)
    labels: Tensor  # int64, (N,)
    classes: int

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Images":
        return Images(self.pixels.to(device), self.labels.to(device), self.classes)


def chosen(labels: Sequence[int], classes: int, count: int | None, skip: int) -> list[int]:
    """Where `count` images are: as many of each class, after the first `skip`, in a fixed order, by class."""
    per_class, skipped = (None if n is None else n // classes for n in (count, skip))
    places: list[list[int]] = [[] for _ in range(classes)]
    for place, label in enumerate(labels):
        places[label].append(place)
    kept = [of_class[skipped : None if per_class is None else skipped + per_class] for of_class in places]
    if per_class is not None and any(len(of_class) < per_class for of_class in kept):
        raise ValueError(f"there are fewer than {skip} + {count} images, evenly of {classes} classes")
    return [place for of_class in kept for place in of_class]


def decoded(images: Sequence[Any], size: int | None) -> Tensor:
    """PIL images as one tensor. Pillow's box filter averages what it shrinks."""
    import numpy as np
    from PIL import Image

    shape = (size, size) if size else images[0].size
    arrays = [np.asarray(image.convert("RGB").resize(shape, Image.Resampling.BOX)) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def folder(path: pathlib.Path, split: str, count: int | None, skip: int, size: int | None) -> Images:
    """SPLIT/CLASS/IMAGE, in a folder or a zip file."""
    from PIL import Image

    root: Any = zipfile.Path(path) if zipfile.is_zipfile(path) else path
    top = root / split
    if not top.is_dir():
        raise ValueError(f"{path}: there is no folder {split} with a folder for each class")
    classes = sorted((each for each in top.iterdir() if each.is_dir()), key=lambda each: each.name)
    files = [(file, i) for i, each in enumerate(classes) for file in sorted(each.iterdir(), key=lambda f: f.name)]
    kept = [files[place] for place in chosen([label for _, label in files], len(classes), count, skip)]
    images = []
    for file, _ in kept:
        with file.open("rb") as stream:
            images.append(Image.open(stream).convert("RGB"))
    return Images(decoded(images, size), torch.tensor([label for _, label in kept]), len(classes))


def cifar(name: str, path: pathlib.Path, split: str, count: int | None, skip: int, size: int | None) -> Images:
    """CIFAR10 or CIFAR100 as torchvision's classes find them on disk."""
    import torchvision
    from PIL import Image

    data = getattr(torchvision.datasets, name)(path, train=split == "train")
    kept = chosen(data.targets, len(data.classes), count, skip)
    pixels = decoded([Image.fromarray(data.data[place]) for place in kept], size)
    return Images(pixels, torch.tensor(data.targets)[kept], len(data.classes))


def digits(path: pathlib.Path, split: str, count: int | None, skip: int, size: int | None) -> Images:
    """scikit-learn's 8x8 digits, which need no path: of 1797 images 1347 to train with, 450 to test."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels, labels, test_size=450, random_state=0, stratify=labels)
    x, y = (parts[0], parts[2]) if split == "train" else (parts[1], parts[3])
    kept = chosen(y.tolist(), 10, count, skip)
    grey = [Image.fromarray((15 * x[place]).astype("uint8").reshape(8, 8)) for place in kept]
    return Images(decoded(grey, size), torch.tensor(y)[kept], 10)


DATASETS: dict[str, Callable[..., Images]] = {
    "folder": folder,
    "cifar10": functools.partial(cifar, "CIFAR10"),
    "cifar100": functools.partial(cifar, "CIFAR100"),
    "digits": digits,
}


@functools.lru_cache(maxsize=8)
def read(dataset: str, path: pathlib.Path, split: str, count: int | None, skip: int, size: int | None) -> Images:
    """Images of a split. Those with another `skip`, by as many as `count`, are other images."""
    return DATASETS[dataset](path, split, count, skip, size)


class Normalise:
    """uint8 pixels to floats of mean 0 and deviation 1 for each channel, by the statistics of the training images."""

    def __init__(self, training: Tensor) -> None:
        values = training.float()
        self.mean, self.std = (f((0, 2, 3), keepdim=True) for f in (values.mean, values.std))

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels.float() - self.mean) / self.std


def augmented(pixels: Tensor, random: torch.Generator, margin: int = 4) -> Tensor:
    """Flipped or not, and cropped from the image with a margin of zeros, differently for each image."""
    count, _, height, width = pixels.shape
    flip = torch.rand(count, 1, 1, 1, generator=random).to(pixels.device) < 0.5
    pixels = torch.where(flip, pixels.flip(3), pixels)
    padded = torch.nn.functional.pad(pixels, [margin] * 4)
    top, left = torch.randint(2 * margin + 1, (2, count, 1), generator=random).to(pixels.device)
    rows = (top + torch.arange(height, device=pixels.device))[:, None, :, None]
    columns = (left + torch.arange(width, device=pixels.device))[:, None, None, :]
    which = torch.arange(count, device=pixels.device)[:, None, None, None]
    channels = torch.arange(pixels.shape[1], device=pixels.device)[None, :, None, None]
    return padded[which, channels, rows, columns]
