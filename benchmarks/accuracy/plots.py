"""Error against batch size and against epoch, and variance against depth."""

import pathlib
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from . import experiments
from .claims import label_of
from .logs import Record
from .measured import Table, run_of

BAND = 0.15


def batch_sizes(records: Sequence[Record], path: pathlib.Path, title: str) -> None:
    axes = plt.figure(figsize=(5.6, 3.4), layout="constrained").subplots()
    table = Table(records)
    for norm, align in experiments.SWEEP:
        label = run_label(records, norm, align)
        found = {size: table.mean(norm=norm, align=align, batch=size) for size in experiments.BATCHES}
        points = {size: each for size, each in found.items() if each is not None}
        if points:
            bars = [0 if each.low is None else each.mean - each.low for each in points.values()]
            means = [each.mean for each in points.values()]
            axes.errorbar(list(points), means, bars, label=label, marker="o", markersize=3, linewidth=1.2, capsize=2)
    axes.set_xscale("log", base=2)
    axes.set_xticks(experiments.BATCHES, [str(size) for size in experiments.BATCHES])
    axes.invert_xaxis()
    finish(axes, "batch size", "test error, %", title)
    save(path)


def epochs(records: Sequence[Record], path: pathlib.Path, title: str) -> None:
    """At the largest batch and at batch 2."""
    figure, both = plt.subplots(1, 2, figsize=(8, 3.4), sharey=True, layout="constrained")
    for axes, size in zip(both, (64, 2), strict=True):
        for norm, align in experiments.SWEEP:
            runs = [r for r in records if (run := run_of(r)).batch == size and (run.norm, run.align) == (norm, align)]
            if runs:
                errors = 100 * np.array([[epoch["error"] for epoch in r["epochs"]] for r in runs if is_whole(r)])
                steps = range(1, errors.shape[1] + 1)
                axes.plot(steps, errors.mean(0), label=run_of(runs[0]).label, linewidth=1.2)
                axes.fill_between(steps, errors.min(0), errors.max(0), alpha=BAND)
        finish(axes, "epoch", "test error, %" if size == 64 else "", f"batch {size}")
    figure.suptitle(title, fontsize=9)
    save(path)


def is_whole(record: Record) -> bool:
    return "diverged_at" not in record


def depths(records: Sequence[Record], path: pathlib.Path, title: str) -> None:
    """At initialisation through 150 layers, and through 50 after training."""
    figure, both = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    shown = ((both[0], "chain150", "start_variance"), (both[1], "chain50", "variance"))
    for axes, network, field in shown:
        chosen = [r for r in records if run_of(r).network == network and field in r]
        for norm, align in dict.fromkeys((run_of(r).norm, run_of(r).align) for r in chosen):
            runs = [r for r in chosen if (run_of(r).norm, run_of(r).align) == (norm, align)]
            values = np.array([r[field] for r in runs])
            layers = range(1, values.shape[1] + 1)
            axes.plot(layers, np.exp(np.log(values).mean(0)), label=label_of(norm, align), linewidth=1.2)
            axes.fill_between(layers, values.min(0), values.max(0), alpha=BAND)
        axes.set_yscale("log")
        finish(axes, "layer", "variance of activations", "at initialisation" if field != "variance" else "trained")
    figure.suptitle(title, fontsize=9)
    save(path)


def run_label(records: Sequence[Record], norm: str, align: str) -> str:
    return next((r.label for r in map(run_of, records) if (r.norm, r.align) == (norm, align)), "")


def finish(axes: Axes, x: str, y: str, title: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=9)
    axes.grid(linewidth=0.3)
    axes.legend(fontsize=8)


def save(path: pathlib.Path) -> None:
    """Without the version of matplotlib in the file, so that the same records give the same bytes more often."""
    plt.gcf().savefig(path, dpi=110, metadata={"Software": None})
    plt.close()
