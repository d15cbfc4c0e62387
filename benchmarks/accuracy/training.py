"""One training run, which goes on exactly where it was killed.

The order of the images, and how each is augmented, follow from seed, epoch and step. A checkpoint needs the weights,
the momentum, torch's random state (dropout) and the position besides; it is written next to its place, then moved there.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from . import alignment, networks
from .config import Run
from .data import Images, Normalise, augmented, read
from .shifts import shifted
from .variance import activation_variance

CHECKPOINT_SECONDS = 60.0
EVALUATED_AT_ONCE = 500
Advance = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where runs find images, keep checkpoints, and compute."""

    data: pathlib.Path
    work: pathlib.Path
    device: torch.device = torch.device("cpu")

    def checkpoint(self, run: Run) -> pathlib.Path:
        text = json.dumps(run.to_json(), sort_keys=True)
        return self.work / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.pt"

    def images(self, run: Run) -> tuple[Images, Images]:
        """To train with, and to test with."""
        what = run.dataset, self.data
        training = read(*what, "train", run.train_images, 0, run.size)
        held_out = ("train", run.test_images, run.train_images) if run.validate else ("test", run.test_images, 0)
        test = read(*what, *held_out, run.size)
        training, test = (dataclasses.replace(x, pixels=shifted(x.pixels, run.shift)) for x in (training, test))
        return training.to(self.device), test.to(self.device)


def processes() -> tuple[int, int]:
    """This process's number, and of how many it is, under torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def generator(*numbers: int) -> torch.Generator:
    """Random numbers that depend on all of `numbers`."""
    seed = int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "little", signed=True)
    return torch.Generator().manual_seed(seed)


class Training:
    """The state of a run."""

    def __init__(self, run: Run, place: Place) -> None:
        self.run, self.place = run, place
        self.images, self.test = place.images(run)
        self.normalise = Normalise(self.images.pixels)
        self.model = self._model().to(place.device)
        self.step_model = nn.parallel.DistributedDataParallel(self.model) if dist.is_initialized() else self.model
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), run.rate, run.momentum, weight_decay=run.weight_decay, fused=True
        )
        self.step, self.loss_sum, self.epochs, self.diverged_at = 0, 0.0, [], None
        self.steps_per_epoch = len(self.images) // run.batch

    def _model(self) -> nn.Module:
        torch.manual_seed(self.run.seed)
        run, classes = self.run, self.images.classes
        if run.pretrained is None:
            return networks.build(run.network, run.norm, run.align, classes)
        before = run.pretrained
        train(before, self.place)
        model = networks.build(before.network, before.norm, before.align, classes)
        model.load_state_dict(torch.load(self.place.checkpoint(before))["model"])
        return alignment.align(model, run.align, run.gain)

    @property
    def is_over(self) -> bool:
        return self.diverged_at is not None or self.step == self.run.epochs * self.steps_per_epoch

    def batch(self) -> tuple[Tensor, Tensor]:
        """Of the current step; this process's share."""
        epoch, place = divmod(self.step, self.steps_per_epoch)
        rank, world = processes()
        if place == 0 or not hasattr(self, "order"):
            self.order = torch.randperm(len(self.images), generator=generator(self.run.seed, epoch))
        which = self.order[place * self.run.batch : (place + 1) * self.run.batch]
        pixels, labels = self.images.pixels[which], self.images.labels[which]
        if self.run.augment:
            pixels = augmented(pixels, generator(self.run.seed, self.step, 1))
        return self.normalise(pixels[rank::world]), labels[rank::world]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.place.device.type, torch.bfloat16, enabled=self.run.precision == "bfloat16")

    def advance(self) -> None:
        """One step of SGD."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.run.at(self.step / (self.run.epochs * self.steps_per_epoch))
        x, y = self.batch()
        with self.autocast():
            loss = F.cross_entropy(self.step_model(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.loss_sum += float(loss.detach())
        self.step += 1
        if self.loss_sum != self.loss_sum or self.loss_sum == float("inf"):
            self.diverged_at = self.step
        if self.step % self.steps_per_epoch == 0 or self.diverged_at is not None:
            done = (self.step - 1) % self.steps_per_epoch + 1
            self.epochs.append({"loss": self.loss_sum / done, "error": self.error()})
            self.loss_sum = 0.0

    @torch.no_grad()
    def error(self, shift: str = "none") -> float:
        """The share of test images that are classified wrongly: at random by a network that gives NaN."""
        self.model.eval()
        pixels, wrong = shifted(self.test.pixels, shift), 0
        for x, y in zip(pixels.split(EVALUATED_AT_ONCE), self.test.labels.split(EVALUATED_AT_ONCE), strict=True):
            with self.autocast():
                wrong += int((self.model(self.normalise(x)).argmax(1) != y).sum())
        self.model.train()
        return wrong / len(self.test)

    def variance(self) -> list[float]:
        return activation_variance(self.model, self.normalise(self.test.pixels[::10]))

    def state(self) -> dict[str, Any]:
        names = ("step", "loss_sum", "epochs", "diverged_at")
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "position": {name: getattr(self, name) for name in names},
        }

    def save(self) -> None:
        if processes()[0] == 0:
            path = self.place.checkpoint(self.run)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            torch.save(self.state(), partial)
            os.replace(partial, path)

    def resume(self) -> None:
        """From the checkpoint, if there is one."""
        path = self.place.checkpoint(self.run)
        if path.exists():
            state = torch.load(path, map_location=self.place.device)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["random"].cpu())
            for name, value in state["position"].items():
                setattr(self, name, value)


def train(run: Run, place: Place, advance: Advance = lambda images: None) -> dict[str, Any]:
    """The run's results. It goes on from its checkpoint, and leaves one of its end."""
    training = Training(run, place)
    start: dict[str, Any] = {}
    if run.pretrained is not None:
        start["start_error"] = training.error()
    if run.variance:
        start["start_variance"] = training.variance()
    training.resume()
    advance(training.step * run.batch)
    saved = time.monotonic()
    while not training.is_over:
        training.advance()
        advance(run.batch)
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            training.save()
            saved = time.monotonic()
    training.save()
    result = {**start, "epochs": training.epochs, "steps": training.step}
    if training.diverged_at is not None:
        result["diverged_at"] = training.diverged_at
    if run.shifts:
        result["shifts"] = {name: training.error(name) for name in run.shifts}
    if run.variance and run.epochs:
        result["variance"] = training.variance()
    return result
