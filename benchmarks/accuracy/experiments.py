"""The experiments for two cores, as lists of runs: seed by seed, so that what is there at any time is balanced.

Network: ResNet-8 of width 16 (75,000 weights). Images: 3,000 to train with and 2,000 to test with, averaged to 16x16,
so that the last stage sees 4x4 positions, as that of a CIFAR ResNet-18 does. 5 epochs with a cosine schedule.

Learning rates: every combination of norm and alignment gets the same budget, RATES at the largest and, in the batch
sweep, at the smallest batch: one seed, 2 epochs, and the error on 1,000 training images that are not trained on. The
best one is used; between the two batches it is interpolated, linearly in the logarithms.
"""

import math
from collections.abc import Callable, Sequence

from .config import Run

SEEDS = (0, 1, 2)
BATCHES = (64, 16, 4, 2, 1)
RATES = {
    ("resnet8", 64): (0.03, 0.1, 0.3, 1.0),
    ("resnet8", 1): (0.001, 0.003, 0.01, 0.03),
    ("vgg16-16", 64): (0.003, 0.01, 0.03, 0.1),
}
BASE = Run("", "resnet8", size=16, train_images=3000, test_images=2000)
SWEEP = (("bn", "none"), ("gn", "none"), ("none", "wa"), ("bn", "wa"), ("gn", "wa"))
EACH_NORM = [(norm, align) for norm in ("none", "bn", "gn", "ln", "in") for align in ("none", "wa")]
ABLATION = ("none", "centre", "scale", "wa", "half", "double", "four", "corrected")
ABLATED = {"resnet8": 5, "vgg16-16": 10}  # networks, and for how many epochs
SHIFTS = ("grey", "dark", "flat", "blurred", "negative")
Tuned = Callable[[Run], Run]  # with its learning rate


def tuning() -> list[Run]:
    """All runs that choose a learning rate."""
    base = BASE.but(experiment="tuning", epochs=2, validate=True, test_images=1000)
    settings = [base.but(norm=norm, align=align) for norm, align in EACH_NORM]
    settings += [base.but(norm=norm, align=align, batch=1) for norm, align in SWEEP]
    for network, epochs in ABLATED.items():
        settings += [base.but(network=network, align=align, epochs=epochs * 2 // 5) for align in ABLATION]
    unique = dict.fromkeys(settings)
    return [run.but(rate=rate) for run in unique for rate in RATES[run.network, run.batch]]


def tuned(records: Sequence[dict]) -> Tuned:
    """By the records of `tuning`."""
    best: dict[tuple[str, str, str, int], tuple[float, float]] = {}
    for record in records:
        run = Run.from_json(record["run"])
        error = record["epochs"][-1]["error"], record["epochs"][-1]["loss"]
        key = run.network, run.norm, run.align, run.batch
        best[key] = min(best.get(key, (2.0, 0.0, 0.0)), (*error, run.rate))

    def rate(run: Run, batch: int) -> float:
        return best[run.network, run.norm, run.align, batch][-1]

    def with_rate(run: Run) -> Run:
        large = rate(run, 64)
        if run.batch == 64:
            return run.but(rate=large)
        share = math.log(run.batch) / math.log(64)
        return run.but(rate=float(f"{rate(run, 1) ** (1 - share) * large**share:.3g}"))

    return with_rate


def variance(tuned: Tuned) -> list[Run]:
    """(d) At initialisation through 50 and 150 layers, and for 50 layers after training."""
    base = BASE.but(experiment="variance", size=8, test_images=2000, variance=True)
    methods = (("none", "none"), ("none", "wa"), ("none", "corrected"), ("bn", "none"), ("bn", "wa"))
    runs = []
    for seed in SEEDS:
        for network, epochs in (("chain50-circular", 0), ("chain150", 0), ("chain50", 2)):
            runs += [
                base.but(network=network, epochs=epochs, norm=norm, align=align, seed=seed, rate=0.03)
                for norm, align in methods
            ]
    return runs


def batch(tuned: Tuned) -> list[Run]:
    """(a) The error at each batch size."""
    base = BASE.but(experiment="batch")
    return [
        tuned(base.but(norm=norm, align=align, batch=size, seed=seed))
        for seed in SEEDS
        for size in BATCHES
        for norm, align in SWEEP
    ]


def norms(tuned: Tuned) -> list[Run]:
    """(b) Each norm without and with alignment, and (e) the same networks tested on other domains."""
    base = BASE.but(experiment="norms", shifts=SHIFTS)
    return [tuned(base.but(norm=norm, align=align, seed=seed)) for seed in SEEDS for norm, align in EACH_NORM]


def ablation(tuned: Tuned) -> list[Run]:
    """(c) Each half of the formula, and other scales, in a residual network and in one without shortcuts."""
    base = BASE.but(experiment="ablation")
    return [
        tuned(base.but(network=network, epochs=epochs, align=align, seed=seed))
        for seed in SEEDS
        for network, epochs in ABLATED.items()
        for align in ABLATION
    ]


def finetuning(tuned: Tuned) -> list[Run]:
    """(f) A network with plain weights, trained on colour images, goes on with grey ones at batch 2: as it is, aligned
    at its own scale, or aligned with gains of 1; all at one learning rate."""
    runs = []
    for seed in SEEDS:
        for norm in ("none", "bn"):
            before = tuned(BASE.but(experiment="finetuning", norm=norm, seed=seed))
            base = before.but(pretrained=before, shift="grey", batch=2, epochs=1, rate=0.001)
            runs += [base, base.but(align="wa", gain="preserve"), base.but(align="wa", gain="ones")]
    return runs


def part(tuned: Tuned) -> list[Run]:
    """What a repetition within an hour on two cores runs: the first seed, without batch 1 and the larger network."""
    runs = [run for experiment in EXPERIMENTS.values() for run in experiment(tuned)]
    return [run for run in runs if run.seed == SEEDS[0] and run.batch > 1 and "vgg" not in run.network]


EXPERIMENTS: dict[str, Callable[[Tuned], list[Run]]] = {
    "variance": variance, "batch": batch, "ablation": ablation, "norms": norms, "finetuning": finetuning
}  # fmt: skip
