"""python -m benchmarks.align: the cost of alignment, against its rivals, on the convolutions of ResNet-50.

Forward, backward and both, with the autograd and allocation of a training step: each distinct weight shape alone, then
the whole network; the op alone, compared with a copy; the host's time, for tiny calls and models. Rivals: the formula
in eager PyTorch, timm's F.batch_norm trick, torch.compile of the formula; floors: gain * weight, the cast of a plain
convolution, a flat copy. Writes align.jsonl (one record per line) and a plot per dtype.
"""

from collections.abc import Sequence

import torch

from . import command, console, goals, harness, host, layers, op_alone, report
from .harness import Case, Limits
from .layers import Network
from .providers import DIRECTIONS, Setting, providers, why_no_compile

SUITES = ("layer", "network", "op", "host")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NETWORK_COST = 12  # time of the network relative to a layer's, roughly, for the estimate of the time left


def settings(device: str, dtype: str, out_dtype: str | None) -> list[Setting]:
    """Unless told otherwise fp32 -> fp32, on CUDA also fp32 -> bf16. On CUDA what changes its dtype is channels_last
    then, as convolutions under autocast take it."""
    both = ("float32", "bfloat16") if (device, dtype, out_dtype) == ("cuda", "float32", None) else (out_dtype or dtype,)
    layouts = {out: torch.channels_last if device == "cuda" and out != dtype else torch.preserve_format for out in both}
    return [Setting(device, DTYPES[dtype], DTYPES[out], layout) for out, layout in layouts.items()]


def cases(network: Network, suites: Sequence[str], only: str | None) -> list[Case]:
    """Distinct shapes and the whole network; `only` keeps those whose name contains it."""
    found = [Case("x".join(map(str, shape)), (shape,)) for shape in network.shapes] if "layer" in suites else []
    if "network" in suites:
        found.append(Case(network.name, tuple(shape for _, shape in network.layers)))
    return command.chosen({case.name: case for case in found}, only) if found else []


def measure(
    run: command.Run, setting: Setting, todo: Sequence[Case], suites: Sequence[str], with_compile: bool, limits: Limits
) -> None:
    """All of one setting."""
    torch.manual_seed(0)
    with console.progress(run.console) as progress:
        costs = [NETWORK_COST if len(case.shapes) > 1 else 1 for case in todo]
        task = progress.add_task("copy rate; torch.compile, first try", total=len(DIRECTIONS) * sum(costs))
        copy = harness.copy_rate(setting.device) if todo else None
        reason = why_no_compile(setting) if todo and with_compile else "not asked for"
        if reason and todo:
            run.left_out.append(f"compile, {setting}: {reason}")
        for case, cost in zip(todo, costs, strict=True):
            progress.update(task, description=f"{case.name:>16} {setting}")
            single = len(case.shapes) == 1
            entrants = providers(setting, len(case.shapes), with_compile=reason is None)
            within = limits if single else Limits(limits.rounds, 4 * limits.seconds)
            advance = lambda cost=cost: progress.advance(task, cost)  # noqa: E731
            with run.case(f"{case.name}, {setting}"):
                suite = "layer" if single else "network"
                run.add(harness.measure(suite, case, setting, entrants, within, copy, advance=advance))
        for suite, records in (("op", op_alone.records), ("host", host.records)):
            if suite in suites and (suite, setting.device) != ("op", "cuda"):
                progress.update(task, description={"op": "the op alone", "host": "the host's part"}[suite])
                with run.case(f"{suite}, {setting}"):
                    run.add(records(setting, limits))


def main() -> None:
    parser = command.parser(__doc__, 1.0, "shapes such as 64x64x1x1, and resnet50")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    parser.add_argument("--out-dtype", choices=DTYPES, help="of the result (default: --dtype; on CUDA bfloat16 too)")
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=SUITES, help="parts (default: all)")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes long to compile")
    arguments = parser.parse_args()
    limits = harness.limits(arguments.device, arguments.rounds, arguments.seconds)
    todo = cases(layers.load("resnet50"), arguments.suites, arguments.only)
    run = command.Run(arguments.device, arguments.out / "align.jsonl")
    for setting in settings(arguments.device, arguments.dtype, arguments.out_dtype):
        measure(run, setting, todo, arguments.suites, not arguments.no_compile, limits)
    report.print_report(run.console, run.records, run.left_out)
    run.console.print("\n".join(goals.lines(run.records)), highlight=False, soft_wrap=True)
    run.end(*report.plots(run.records, arguments.out))


if __name__ == "__main__":
    main()
