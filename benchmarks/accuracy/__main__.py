"""python -m benchmarks.accuracy run --data PATH: trains what has no record yet, and goes on where it was stopped.

PATH is a folder, or a zip file of one, with train/CLASS/IMAGE and test/CLASS/IMAGE.
"""

import argparse
import pathlib

import torch

from . import experiments, logs, running

NAMES = ("tuning", *experiments.EXPERIMENTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train")
    run.add_argument("--experiment", nargs="+", choices=NAMES, default=NAMES)
    run.add_argument("--data", type=pathlib.Path, required=True, help="a folder of images, or a zip file of one")
    run.add_argument("--label", help="what the records call the images (default: the name of the file)")
    run.add_argument("--logs", type=pathlib.Path, default=logs.LOGS, help="folder of the records")
    run.add_argument("--work", type=pathlib.Path, default=pathlib.Path("out/accuracy"), help="folder of checkpoints")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    where = running.place(arguments.data, arguments.work, arguments.device)
    label = arguments.label or arguments.data.stem
    if "tuning" in arguments.experiment:
        running.run_all(experiments.tuning(), where, arguments.logs, label)
    others = [name for name in arguments.experiment if name != "tuning"]
    running.run_all(running.runs_of(others, arguments.logs), where, arguments.logs, label)


if __name__ == "__main__":
    main()
