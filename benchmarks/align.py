"""python -m benchmarks.align: the cost of alignment, against its rivals, on the convolutions of ResNet-50.

Forward, backward and both, with the autograd and allocation of a training step: each distinct weight shape alone, then
the whole network; the op alone, compared with a copy; the host's time, for tiny calls and models. Rivals: the formula
in eager PyTorch, timm's F.batch_norm trick, torch.compile of the formula; floors: gain * weight, the cast of a plain
convolution, a flat copy. Writes align.jsonl (one record per line) and a plot per dtype.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console

import weightalign_cuda as wa

from . import command, harness, host, layers, machine, op_alone, report
from .harness import Case, Limits
from .layers import Network
from .providers import DIRECTIONS, Setting, providers, short, why_no_compile

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NETWORK_COST = 12  # time of the network relative to a layer's, roughly, for the estimate of the time left


def settings(device: str, dtype: str, out_dtype: str | None) -> list[Setting]:
    """fp32 -> fp32; on CUDA also fp32 -> bf16 channels_last, as convolutions under autocast take it."""
    if out_dtype is not None or dtype != "float32":
        return [Setting(device, DTYPES[dtype], DTYPES[out_dtype or dtype])]
    half = Setting(device, torch.float32, torch.bfloat16, torch.channels_last)
    return [Setting(device), half] if device == "cuda" else [Setting(device)]


def cases(network: Network, only: str | None) -> list[Case]:
    """Distinct shapes and the whole network; `only` keeps those whose name contains it."""
    single = [Case("x".join(map(str, shape)), (shape,)) for shape in network.shapes]
    everything = [*single, Case(network.name, tuple(shape for _, shape in network.layers))]
    return command.chosen({case.name: case for case in everything}, only)


def run(
    chosen: Sequence[Setting], network: Network, only: str | None, limits: Limits, console: Console
) -> tuple[list[dict[str, Any]], list[str]]:
    """All records, and what was skipped and why."""
    records: list[dict[str, Any]] = []
    left_out = []
    todo = cases(network, only)
    device = chosen[0].device
    facts = machine.facts(device)
    console.print(f"{machine.label(facts)}; backends: {wa.backends()}", highlight=False)
    with command.progress(console) as progress:
        costs = [NETWORK_COST if len(case.shapes) > 1 else 1 for case in todo]
        task = progress.add_task("copy rate", total=len(chosen) * len(DIRECTIONS) * sum(costs))
        copy = harness.copy_rate(device)
        for setting in chosen:
            torch.manual_seed(0)
            progress.update(task, description="torch.compile, first try")
            if reason := why_no_compile(setting):
                left_out.append(f"compile, {setting}: {reason}")
            for case, cost in zip(todo, costs, strict=True):
                progress.update(task, description=f"{case.name:>16} {setting}")
                single = len(case.shapes) == 1
                entrants = providers(setting, len(case.shapes), with_compile=reason is None)
                within = limits if single else Limits(limits.rounds, 4 * limits.seconds)
                suite = "layer" if single else "network"
                advance = lambda cost=cost: progress.advance(task, cost)  # noqa: E731
                records += harness.measure(suite, case, setting, entrants, within, copy, advance=advance)
            progress.update(task, description="the op alone, and the host")
            if device == "cpu":
                records += op_alone.records(setting, limits)
            records += host.records(setting, limits)
    return [{**record, **facts} for record in records], left_out


def main() -> None:
    parser = command.parser(__doc__, 1.0, "shapes such as 64x64x1x1, and resnet50")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    parser.add_argument("--out-dtype", choices=DTYPES, help="of the result (default: --dtype; on CUDA bfloat16 too)")
    arguments = parser.parse_args()
    console = Console()
    chosen = settings(arguments.device, arguments.dtype, arguments.out_dtype)
    limits = Limits(arguments.rounds, arguments.seconds)
    records, left_out = run(chosen, layers.load("resnet50"), arguments.only, limits, console)
    command.write(records, path := arguments.out / "align.jsonl")
    report.print_report(console, records, left_out)
    written = [path]
    for setting in chosen:
        clock = "graph" if setting.device == "cuda" else "wall"
        fields = {"dtype": short(setting.dtype), "out_dtype": short(setting.out_dtype), "clock": clock}
        plotted = report.pick(records, suite="layer", provider="ours", direction="both", **fields)
        if plotted and importlib.util.find_spec("matplotlib") is None:
            console.print("no plot: matplotlib is not installed")
        elif plotted:
            written.append(arguments.out / f"align-{setting.device}-{fields['dtype']}-{fields['out_dtype']}.png")
            report.plot(plotted, written[-1])
    console.print("wrote " + ", ".join(map(str, written)), highlight=False)


if __name__ == "__main__":
    main()
