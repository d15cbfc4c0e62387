"""RESULTS.md and its plots, from the records."""

import math
import pathlib
from collections.abc import Callable, Sequence

from ..tables import head, row
from . import claims, experiments, logs, paper, plots
from .claims import VARIANTS, Records, label_of
from .logs import Record
from .measured import Estimate, Table, error_shifted, run_of

PLOTS = {"batch": plots.batch_sizes, "epochs": plots.epochs, "variance": plots.depths}
WITHIN = 2.0  # the paper's claim about the variance, as a factor


def shown(estimate: Estimate | None) -> str:
    return "" if estimate is None else str(estimate)


def all_records(folder: pathlib.Path) -> Records:
    return {name: logs.read(folder, name) for name in ("tuning", *experiments.EXPERIMENTS)}


def data_of(records: Sequence[Record]) -> str:
    return ", ".join(dict.fromkeys(record["data"] for record in records))


def setting(records: Sequence[Record]) -> list[str]:
    """What was run, and what is still missing, in a paragraph."""
    runs = [run_of(r) for r in records]
    networks = ", ".join(dict.fromkeys(run.network for run in runs))
    seeds = len({run.seed for run in runs})
    images = ", ".join(dict.fromkeys(f"{r.train_images} / {r.test_images}, {r.size}x{r.size}" for r in runs))
    epochs = ", ".join(str(each) for each in sorted({run.epochs for run in runs}))
    hours = sum(r["seconds"] for r in records) / 3600
    text = (
        f"{data_of(records)}; {networks}; training / test images: {images}; epochs: {epochs}; {len(runs)} runs, "
        f"{seeds} {'seed' if seeds == 1 else 'seeds'}, {hours:.1f} hours."
    )
    return [text, ""]


def batch(records: Sequence[Record]) -> list[str]:
    table = Table(records)
    lines = [*setting(records), *head("test error, %", *(f"batch {size}" for size in experiments.BATCHES))]
    for norm, align in experiments.SWEEP:
        cells = [shown(table.mean(norm=norm, align=align, batch=size)) for size in experiments.BATCHES]
        lines.append(row(plots.run_label(records, norm, align), *cells))
    lines += ["", "The paper, CIFAR-100:", "", *head("", *(f"batch {size}" for size in paper.BATCHES))]
    for network, by in paper.BATCH_SWEEP.items():
        lines += [row(f"{network}, {label}", *map(str, values)) for label, values in by.items()]
    return [*lines, "", "![Error against batch size](batch.png)", "", "![Error against epoch](epochs.png)"]


def norms(records: Sequence[Record]) -> list[str]:
    table = Table(records)
    papers = [f"paper, {data}" for data in paper.NORMS]
    lines = [*setting(records), *head("test error, %, batch 64", "without WA", "with WA", *papers)]
    for norm in dict.fromkeys(norm for norm, _ in experiments.EACH_NORM):
        ours = [shown(table.mean(norm=norm, align=align)) for align in ("none", "wa")]
        theirs = [" → ".join(f"{value:.2f}" for value in by[norm]) for by in paper.NORMS.values()]
        lines.append(row("none (Fixup)" if norm == "none" else norm.upper(), *ours, *theirs))
    return lines


def ablation(records: Sequence[Record]) -> list[str]:
    table, networks = Table(records), list(experiments.ABLATED)
    lines = [
        *setting(records),
        *head("test error, %, no norm", *networks, *(f"paper, {name}" for name in paper.ABLATION)),
    ]
    for align in experiments.ABLATION:
        cells = []
        for network in networks:
            runs = [r for r in records if (run_of(r).network, run_of(r).align) == (network, align)]
            lost = sum("diverged_at" in r for r in runs)
            cells.append(shown(table.mean(network=network, align=align)) + (f" ({lost} diverged)" if lost else ""))
        theirs = [paper_ablation(by, align) for by in paper.ABLATION.values()]
        lines.append(row(VARIANTS[align], *cells, *theirs))
    return [*lines, "", CHANCE_NOTE]


CHANCE_NOTE = (
    "**90 % is chance: such a network has not trained, and its row says that training is fragile, not which error "
    "could be reached.** Rates are chosen on 2 epochs (VGG16: 4) and then hold for 5 (10), each with a schedule of "
    "its own. At 0.3 ResNet-8 with plain weights, with scaling alone and with 1.21 times the scale trains in the "
    "shorter schedule and collapses in the first epoch of the longer one, whose rate stays high for longer; with WA "
    "or centring it trains in both. VGG16 with WA keeps 0.682 of the variance in each of 13 layers, 0.7 % of it in "
    "all (see above), and has not begun to train after 10 epochs, which contradicts the paper; with 1.21 times the "
    "scale it trains best."
)


def paper_ablation(by: dict[str, float | None], align: str) -> str:
    if align in by:
        return "fails" if by[align] is None else str(by[align])
    return paper.SCALES.get(align, "")


def variance(records: Sequence[Record]) -> list[str]:
    columns = {
        "50 layers": ("chain50", "start_variance"),
        "150 layers": ("chain150", "start_variance"),
        "50, circular padding": ("chain50-circular", "start_variance"),
        "50, trained": ("chain50", "variance"),
    }
    lines = [*setting(records), *head("variance, last layer / first", *columns, "each layer")]
    for norm, align in dict.fromkeys((run_of(r).norm, run_of(r).align) for r in records):
        own = [r for r in records if (run_of(r).norm, run_of(r).align) == (norm, align)]
        cells = []
        for network, field in columns.values():
            there = [r for r in own if run_of(r).network == network and field in r]
            cells.append(spread([claims.variance_factor(r, field, len(r[field])) for r in there]))
        deep = [r for r in own if run_of(r).network == "chain50-circular"]
        by_layer = claims.variance_by_layer(deep, "start_variance", 50)
        each = "" if by_layer is None else f"x {by_layer.mean:.3f}"
        lines.append(row(label_of(norm, align), *cells, each))
    return [*lines, "", *variance_verdict(records), "", "![Variance against depth](variance.png)"]


def spread(values: Sequence[float]) -> str:
    """The geometric mean, and the range over seeds."""
    if not values or math.isnan(sum(values)):
        return "diverged" if values else ""
    if min(values) == 0:
        return "0"
    middle = math.exp(sum(map(math.log, values)) / len(values))
    return f"{middle:.2g}" + (f" ({min(values):.2g} to {max(values):.2g})" if len(values) > 1 else "")


def variance_verdict(records: Sequence[Record]) -> list[str]:
    """Whether it stays within WITHIN through 50 layers, and why not."""
    own = [r for r in records if run_of(r).network == "chain50" and (run_of(r).norm, run_of(r).align) == ("none", "wa")]
    factors = [claims.variance_factor(r) for r in own]
    if not factors:
        return ["Not run yet."]
    if all(1 / WITHIN <= factor <= WITHIN for factor in factors):
        return [f"With WA it stays within {WITHIN:g}x through 50 layers, as the paper derives."]
    kept = 1 - 1 / math.pi
    return [
        f"**With WA it does not stay within {WITHIN:g}x through 50 layers, which contradicts the paper's derivation.** "
        "That counts E[x²] of what a layer gets, as if the weights of a filter were independent. But an aligned filter "
        "sums to 0, so the mean of x cancels, and only its variance passes. After a ReLU that is (1 - 1/π)/2 of the "
        f"variance before it, not 1/2: each layer keeps 1 - 1/π = {kept:.3f}. The last column has the factor of each "
        f"layer with circular padding; zero padding takes more, at the borders. {kept**-0.5:.3f} times the scale "
        "(`scale=` of our layers) makes up for it. NFNets have that factor (Brock, De, Smith, ICLR 2021).",
        "",
        f"But then the variance of the gradients grows by 1/(1 - 1/π) = {1 / kept:.2f} in each layer, as it does with "
        "batch norm, while the paper's scale keeps the variance of the gradients (a test checks both). A network "
        "without shortcuts has one or the other.",
    ]


def shift(records: Sequence[Record]) -> list[str]:
    """Of the runs of `norms`."""
    there = [r for r in records if "shifts" in r]
    names = list(there[0]["shifts"]) if there else []
    tables = {name: Table(there, lambda r, name=name: 100 * r["shifts"][name]) for name in names}
    own, mean = Table(there), Table(there, error_shifted)
    lines = [*setting(there), *head("test error, %", "same domain", *names, "mean of the others")]
    for norm, align in experiments.EACH_NORM:
        fields = {"norm": norm, "align": align}
        cells = [own.mean(**fields), *(tables[name].mean(**fields) for name in names), mean.mean(**fields)]
        lines.append(row(plots.run_label(there, norm, align), *map(shown, cells)))
    theirs = ", ".join(f"{label} {value}" for label, value in paper.SHIFT.items())
    return [*lines, "", f"The paper, mean accuracy on Office-31: {theirs}. {SHIFT_NOTE}"]


SHIFT_NOTE = (
    "Office-31 has photographs of the same kinds of things by another camera or from a shop. Here the test images "
    "themselves are processed: content and frame stay, and only colour, light, contrast and sharpness change."
)


def finetuning(records: Sequence[Record]) -> list[str]:
    lines = [*setting(records), *head("test error on grey images, %, batch 2", "before a step", "after training")]
    before = Table(records, lambda r: 100 * r["start_error"])
    after = Table(records)
    for norm in dict.fromkeys(run_of(r).norm for r in records):
        for name, align, gain in (("plain weights", "none", "ones"), ('gain="preserve"', "wa", "preserve"),
                                  ('gain="ones"', "wa", "ones")):  # fmt: skip
            fields = {"norm": norm, "align": align, "gain": gain}
            kind = "no norm" if norm == "none" else norm.upper()
            lines.append(row(f"{kind}, {name}", shown(before.mean(**fields)), shown(after.mean(**fields))))
    return lines


def tuning(records: Sequence[Record]) -> list[str]:
    best = {}
    for r in sorted(records, key=lambda r: (-r["epochs"][-1]["error"], -r["epochs"][-1]["loss"])):
        run = run_of(r)
        best[run.network, run.batch, label_of(run.norm, run.align)] = run.rate
    lines = [
        *setting(records),
        *head("chosen learning rate", "rates"),
    ]
    tried: dict[tuple[str, int], set[float]] = {}
    for run in map(run_of, records):
        tried.setdefault((run.network, run.batch), set()).add(run.rate)
    for (network, size), rates in tried.items():
        edges = {min(rates), max(rates)}
        own = [
            f"{label} {rate:g}{'*' if rate in edges else ''}"
            for (n, s, label), rate in best.items()
            if (n, s) == (network, size)
        ]
        lines.append(row(f"{network}, batch {size}, of {', '.join(f'{r:g}' for r in sorted(rates))}", "; ".join(own)))
    return [*lines, "", "\\* at the edge of what was tried: more or less might be better still."]


SECTIONS: dict[str, tuple[str, Callable[[Sequence[Record]], list[str]]]] = {
    "variance": ("Variance of activations", variance),
    "batch": ("Batch sizes", batch),
    "norms": ("Each norm, without and with alignment", norms),
    "ablation": ("Halves and scales", ablation),
    "shift": ("Other domains", shift),
    "finetuning": ("Fine-tuning", finetuning),
    "tuning": ("Learning rates", tuning),
}


def verdicts(records: Records) -> list[str]:
    lines = head("claim", "ours, points of error", "paper", "verdict")
    for claim in claims.all_claims(records):
        lines.append(row(claim.text, shown(claim.difference), claim.paper, claim.verdict))
    return lines


INTRODUCTION = """\
# The paper's claims, on real images

Generated from the records in `logs` by `python -m benchmarks accuracy report`. Means over seeds, ± half a 95 % interval
(Student's t over seeds; differences are paired by seed). A verdict is "open" where the interval contains 0. Networks,
images and epochs are sized for two cores, so errors are higher than the paper's, and only differences can be compared.
The docstring of `experiments.py` has the budget, which is the same for all, and how learning rates were chosen.
"""


def text(records: Records) -> str:
    lines = [INTRODUCTION, "## Verdicts", "", *verdicts(records), ""]
    for name, (title, section) in SECTIONS.items():
        own = records["norms" if name == "shift" else name]
        lines += [f"## {title}", "", *(section(own) if own else ["Not run yet."]), ""]
    return "\n".join(lines)


def write(folder: pathlib.Path, target: pathlib.Path) -> list[pathlib.Path]:
    """RESULTS.md and the plots of what has records."""
    records = all_records(folder)
    (target / "RESULTS.md").write_text(text(records))
    written = [target / "RESULTS.md"]
    for name, plot in PLOTS.items():
        own = records["batch" if name == "epochs" else name]
        if own:
            path = target / f"{name}.png"
            plot(own, path, f"{data_of(own)}, {', '.join(dict.fromkeys(run_of(r).network for r in own))}")
            written.append(path)
    return written
