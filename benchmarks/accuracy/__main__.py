"""python -m benchmarks.accuracy: the paper's claims, on real images.

run      trains what has no record yet; killed, it goes on where it was
report   writes RESULTS.md and its plots from the records
repeat   trains a part again, and exits with 1 if it disagrees with the records
recipe   trains one of the paper's own settings at full size; also under torchrun
"""

import argparse
import json
import pathlib

import torch

from . import compare, experiments, logs, recipes, report, running
from .config import Run

HERE = pathlib.Path(__file__).parent


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = result.add_subparsers(dest="command", required=True)
    names = ("tuning", *experiments.EXPERIMENTS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run, repeat, recipe = (commands.add_parser(name) for name in ("run", "repeat", "recipe"))
    run.add_argument("--experiment", nargs="+", choices=names, default=names)
    recipe.add_argument("name", choices=recipes.RECIPES)
    recipe.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="of config.Run: norm=gn batch=2")
    for command in (run, repeat, recipe):
        command.add_argument("--data", type=pathlib.Path, required=True, help="a folder, or a zip file of one")
        command.add_argument("--label", help="what records call the images (default: the name of the file)")
        command.add_argument("--device", choices=("cpu", "cuda"), default=device)
        command.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/accuracy"), help="checkpoints")
    commands.add_parser("report")
    for command in commands.choices.values():
        command.add_argument("--logs", type=pathlib.Path, default=logs.LOGS, help="folder of the committed records")
    return result


def changed(run: Run, settings: list[str]) -> Run:
    """Values are JSON, or else strings."""

    def value(text: str) -> object:
        try:
            return json.loads(text)
        except ValueError:
            return text

    return run.but(**{name: value(text) for name, _, text in (each.partition("=") for each in settings)})


def main() -> None:
    arguments = parser().parse_args()
    if arguments.command == "report":
        print("\n".join(f"wrote {path}" for path in report.write(arguments.logs, HERE)))
        return
    where = running.place(arguments.data, arguments.out, arguments.device)
    label, own = arguments.label or arguments.data.stem, arguments.out / "logs"
    if arguments.command == "recipe":
        running.run_all([changed(recipes.RECIPES[arguments.name], arguments.set)], where, own, label, keep=True)
    elif arguments.command == "repeat":
        runs = experiments.part(experiments.tuned(logs.read(arguments.logs, "tuning")))
        running.run_all(runs, where, own, label)
        found = compare.of_folders(own, arguments.logs)
        print("\n".join(map(str, found)))
        raise SystemExit(not all(each.agrees for each in found))
    else:
        if "tuning" in arguments.experiment:
            running.run_all(experiments.tuning(), where, arguments.logs, label)
        others = [name for name in arguments.experiment if name != "tuning"]
        running.run_all(running.runs_of(others, arguments.logs), where, arguments.logs, label)


if __name__ == "__main__":
    main()
