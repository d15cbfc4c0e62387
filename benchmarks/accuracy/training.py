"""One training run, which goes on exactly where it was killed.

A checkpoint holds the weights, the momentum, torch's random state (for dropout) and the position: batches follow from
the position alone. It is written next to its place, then moved there.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from . import alignment, networks
from .config import Run
from .sources import VOID, Batches, processes, source
from .variance import activation_variance

CHECKPOINT_SECONDS = 60.0
Advance = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where runs find images, keep checkpoints, and compute."""

    data: pathlib.Path
    work: pathlib.Path
    device: torch.device

    def checkpoint(self, run: Run) -> pathlib.Path:
        text = json.dumps(run.to_json(), sort_keys=True)
        return self.work / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.pt"


class Training:
    """The state of a run."""

    def __init__(self, run: Run, place: Place) -> None:
        self.run, self.place = run, place
        self.source = source(run, place.data, place.device)
        self.model = self._model().to(place.device)
        self.step_model = nn.parallel.DistributedDataParallel(self.model) if dist.is_initialized() else self.model
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), run.rate, run.momentum, weight_decay=run.weight_decay, fused=True
        )
        self.step, self.loss_sum = 0, 0.0
        self.epochs: list[dict[str, float]] = []
        self.diverged_at: int | None = None
        self.batches: Batches | None = None
        self.steps_per_epoch = len(self.source) // run.batch

    def _model(self) -> nn.Module:
        torch.manual_seed(self.run.seed)
        run, classes = self.run, self.source.classes
        if run.pretrained is None:
            return networks.build(run.network, run.norm, run.align, classes, run.gain)
        before = run.pretrained
        train(before, self.place)
        model = networks.build(before.network, before.norm, before.align, classes)
        model.load_state_dict(torch.load(self.place.checkpoint(before))["model"])
        return alignment.align(model, run.align, run.gain)

    @property
    def is_over(self) -> bool:
        return self.diverged_at is not None or self.step == self.run.epochs * self.steps_per_epoch

    def batch(self) -> tuple[Tensor, Tensor]:
        """Of the current step."""
        epoch, place = divmod(self.step, self.steps_per_epoch)
        if place == 0 or self.batches is None:
            self.batches = self.source.batches(epoch, place)
        return next(self.batches)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.place.device.type, torch.bfloat16, enabled=self.run.precision == "bfloat16")

    def advance(self) -> None:
        """One step of SGD."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.run.at(self.step / (self.run.epochs * self.steps_per_epoch))
        x, y = self.batch()
        with self.autocast():
            loss = loss_of(self.step_model(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.loss_sum += float(loss.detach())
        self.step += 1
        if self.loss_sum != self.loss_sum or self.loss_sum == float("inf"):
            self.diverged_at = self.step
        if self.step % self.steps_per_epoch == 0 or self.diverged_at is not None:
            done = (self.step - 1) % self.steps_per_epoch + 1
            self.epochs.append({"loss": averaged(self.loss_sum / done), "error": self.error()})
            self.loss_sum = 0.0

    @torch.no_grad()
    def error(self, shift: str = "none") -> float:
        """The share of test images that are classified wrongly; for segmentation 1 - mIoU. A network that gives NaN
        predicts class 0."""
        self.model.eval()
        classes = self.source.classes
        counts = torch.zeros(classes, classes, dtype=torch.long, device=self.place.device)
        for x, y in self.source.tests(shift):
            with self.autocast():
                scores = scores_of(self.model(x))
            known = y != VOID if y.dim() > 1 else ...
            pairs = classes * y[known] + scores.argmax(1)[known]
            counts += pairs.bincount(minlength=classes**2).view(classes, classes)
        self.model.train()
        right = counts.diagonal().double()
        if y.dim() > 1:
            return 1 - float((right / (counts.sum(0) + counts.sum(1) - right)).nanmean())
        return 1 - float(right.sum() / counts.sum())

    def variance(self) -> list[float]:
        return activation_variance(self.model, next(self.source.tests())[0])

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


def averaged(loss: float) -> float:
    """Over all processes, each of which has the loss of its share of a batch."""
    if not dist.is_initialized():
        return loss
    everywhere = torch.tensor([loss], dtype=torch.float64)
    everywhere = everywhere.cuda() if dist.get_backend() == "nccl" else everywhere
    dist.all_reduce(everywhere)
    return float(everywhere) / dist.get_world_size()


def scores_of(output: Any) -> Tensor:
    """torchvision's segmentation models give a dictionary."""
    return output["out"] if isinstance(output, dict) else output


def loss_of(output: Any, target: Tensor) -> Tensor:
    return F.cross_entropy(scores_of(output), target, ignore_index=VOID if target.dim() > 1 else -100)


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
