"""Where a run's batches come from: images in memory, or files decoded by worker processes. Order and augmentation
follow from seed, epoch and place alone, so that a run can go on anywhere."""

import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from . import data
from .config import Run
from .shifts import shifted

Batches = Iterator[tuple[Tensor, Tensor]]
TESTED_AT_ONCE = 500
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VOID = 255  # pixels of VOC's masks that belong to no class


def processes() -> tuple[int, int]:
    """This process's number, and of how many it is, under torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def seed_of(*numbers: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "little", signed=True)


def order(run: Run, images: int, epoch: int) -> list[Tensor]:
    """This process's images of each batch of an epoch. Those beyond the last whole batch are left out."""
    rank, world = processes()
    random = torch.Generator().manual_seed(seed_of(run.seed, epoch))
    places = torch.randperm(images, generator=random)[: images // run.batch * run.batch]
    return [batch[rank::world] for batch in places.split(run.batch)]


class InMemory:
    """Images as tensors on the device."""

    def __init__(self, run: Run, path: pathlib.Path, device: torch.device) -> None:
        self.run, self.device = run, device
        training = data.read(run.dataset, path, run.splits[0], run.train_images, 0, run.size)
        if run.validate:
            test = data.read(run.dataset, path, run.splits[0], run.test_images, run.train_images, run.size)
        else:
            test = data.read(run.dataset, path, run.splits[1], run.test_images, 0, run.size)
        self.training, self.test = (
            replace(each, pixels=shifted(each.pixels, run.shift)).to(device) for each in (training, test)
        )
        self.classes = training.classes
        self.normalise = data.Normalise(self.training.pixels)

    def __len__(self) -> int:
        return len(self.training)

    def batches(self, epoch: int, first: int) -> Batches:
        for step, which in enumerate(order(self.run, len(self), epoch)[first:], first):
            pixels, labels = self.training.pixels[which], self.training.labels[which]
            if self.run.augment:
                random = torch.Generator().manual_seed(seed_of(self.run.seed, epoch, step, *processes()))
                pixels = data.augmented(pixels, random)
            yield self.normalise(pixels), labels

    def tests(self, shift: str = "none") -> Batches:
        """Each part has images of all classes."""
        pixels = shifted(self.test.pixels, shift)
        parts = -(-len(pixels) // TESTED_AT_ONCE)
        for i in range(parts):
            yield self.normalise(pixels[i::parts]), self.test.labels[i::parts]


class Decoded(Dataset):
    """An item is (epoch, index): its augmentation is drawn from a seed of its own, whichever worker decodes it."""

    def __init__(self, files: Any, transform: Callable[..., Any], seed: int) -> None:
        self.files, self.transform, self.seed = files, transform, seed

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.seed, *item))
            return self.transform(*self.files[item[1]])


class FromFiles:
    """Images that are decoded when they are needed: ImageNet's folders, or VOC's images and masks."""

    def __init__(self, run: Run, path: pathlib.Path, device: torch.device) -> None:
        self.run, self.device = run, device
        self.training, self.test, self.classes = FILES[run.dataset](run, path)

    def __len__(self) -> int:
        return len(self.training.files)

    def batches(self, epoch: int, first: int) -> Batches:
        chosen = order(self.run, len(self), epoch)[first:]
        yield from self._load(self.training, [[(epoch, int(i)) for i in batch] for batch in chosen])

    def tests(self, shift: str = "none") -> Batches:
        """One by one where images differ in size."""
        places = torch.arange(len(self.test.files)).split(1 if self.run.dataset == "voc" else 64)
        yield from self._load(self.test, [[(0, int(i)) for i in part] for part in places])

    def _load(self, images: Decoded, batches: list[list[tuple[int, int]]]) -> Batches:
        workers = min(8, os.cpu_count() or 1) if len(batches) > 8 else 0
        for x, y in DataLoader(images, batch_sampler=batches, num_workers=workers):
            yield x.to(self.device), y.to(self.device)


def imagenet(run: Run, path: pathlib.Path) -> tuple[Decoded, Decoded, int]:
    """train/CLASS/IMAGE, val/CLASS/IMAGE; crops as in torchvision's reference training."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    size = run.size or 224
    end = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    crop = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *end])
    middle = v2.Compose([v2.Resize(size * 256 // 224), v2.CenterCrop(size), *end])
    files = [ImageFolder(path / split) for split in run.splits]
    training, test = (
        Decoded(each, lambda image, label, to=to: (to(image), label), run.seed)
        for each, to in zip(files, (crop, middle), strict=True)
    )
    return training, test, len(files[0].classes)


def voc(run: Run, path: pathlib.Path) -> tuple[Decoded, Decoded, int]:
    """PASCAL VOC 2012 as torchvision's class finds it on disk, with masks of 20 classes and the background."""
    from torchvision import tv_tensors
    from torchvision.datasets import VOCSegmentation
    from torchvision.transforms import v2

    size = run.size or 513
    kinds = {tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64, "others": None}
    end = [v2.ToDtype(kinds, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD), v2.ToPureTensor()]
    fill = {tv_tensors.Image: 0, tv_tensors.Mask: VOID}
    zoom = v2.ScaleJitter((size, size), (0.5, 2.0))
    crop = v2.RandomCrop(size, pad_if_needed=True, fill=fill)
    steps = v2.Compose([zoom, crop, v2.RandomHorizontalFlip(), *end]), v2.Compose(end)
    training, test = (
        Decoded(
            VOCSegmentation(path, image_set=split),
            lambda image, mask, to=to: to(tv_tensors.Image(v2.functional.pil_to_tensor(image)), mask_of(mask)),
            run.seed,
        )
        for split, to in zip(run.splits, steps, strict=True)
    )
    return training, test, 21


def mask_of(image: Any) -> Any:
    """(height, width), of a palette image."""
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    return tv_tensors.Mask(v2.functional.pil_to_tensor(image)[0])


FILES = {"imagenet": imagenet, "voc": voc}


def source(run: Run, path: pathlib.Path, device: torch.device) -> InMemory | FromFiles:
    return (FromFiles if run.dataset in FILES else InMemory)(run, path, device)
