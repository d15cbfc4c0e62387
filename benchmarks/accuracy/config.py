"""What a run is: data, network, norm, alignment, optimisation. Everything that a repetition needs, and nothing else."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Run:
    """One training run. Fields are those of the log, too."""

    experiment: str
    network: str
    norm: str = "none"  # of activations: none, bn, gn, ln, in
    align: str = "none"  # of weights: none, wa, or a variant of alignment.py
    batch: int = 64
    rate: float = 0.1
    seed: int = 0
    dataset: str = "folder"  # in data.DATASETS, or sources.FILES
    splits: tuple[str, str] = ("train", "test")  # to train and to test with
    size: int | None = None  # images are resized to this height and width; None: as they are
    train_images: int | None = None  # None: all
    test_images: int | None = None
    validate: bool = False  # test on images of the training split that are left out of the training
    epochs: int = 5
    schedule: str = "cosine"  # or steps
    drops: tuple[float, ...] = ()  # of the schedule "steps": after these shares of the training the rate falls tenfold
    momentum: float = 0.9
    weight_decay: float = 5e-4  # of gains, too, as in the paper
    augment: bool = False
    precision: str = "float32"  # or bfloat16: autocast
    shift: str = "none"  # what the training images go through: a name in shifts.SHIFTS
    shifts: tuple[str, ...] = ()  # also tested, after training, on images that went through these
    variance: bool = False  # records the variance of activations at each depth, before and after the training
    pretrained: "Run | None" = None  # fine-tunes the network of this run
    gain: str = "ones"  # or preserve: as wa.convert takes it, for weights that were trained before

    @property
    def label(self) -> str:
        """BN+WA; plain."""
        parts = [part.upper() if len(part) == 2 else part for part in (self.norm, self.align) if part != "none"]
        return "+".join(parts) or "plain"

    @property
    def name(self) -> str:
        """In the progress bar, and of the checkpoint."""
        label = self.label if self.pretrained is None else f"{self.label} ({self.gain})"
        return f"{self.experiment}: {self.network} {label}, batch {self.batch}, rate {self.rate:g}, seed {self.seed}"

    def at(self, progress: float) -> float:
        """The learning rate after a share of the training."""
        if self.schedule == "cosine":
            return self.rate * (1 + math.cos(math.pi * progress)) / 2
        return self.rate * 0.1 ** sum(progress >= drop for drop in self.drops)

    def but(self, **changes: Any) -> "Run":
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """Fields that differ from their default."""
        fields = {field.name: field.default for field in dataclasses.fields(self)}
        given = {name: getattr(self, name) for name, default in fields.items() if getattr(self, name) != default}
        return {name: value.to_json() if isinstance(value, Run) else value for name, value in given.items()}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Run":
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        if "pretrained" in values:
            values["pretrained"] = cls.from_json(values["pretrained"])
        return cls(**values)
