"""python -m benchmarks.instructions: how many instructions each call of the host's benchmark executes, by valgrind.

Wall times of a few microseconds say little on a machine that others use; these counts are the same from run to run, but
for a hundredth. Takes minutes: valgrind is 50 times as slow as the machine. The calls' profiles stay in --out, in the
order of what is printed, for callgrind_annotate.
"""

import argparse
import gc
import os
import pathlib
import re
import shutil
import subprocess
import sys

from . import host
from .providers import Setting

MARK = "getloadavg"  # a function of libc that nothing else calls, for valgrind to count between its calls
WARM_UP, REPEATS = 30, 10


def run_calls(only: str) -> None:
    """In valgrind: each call, warmed up, between two marks."""
    setting = Setting("cpu")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    turn_on = subprocess.Popen(["callgrind_control", "--instr=on", str(os.getpid())], **quiet)
    while turn_on.poll() is None:
        pass  # valgrind obeys between two instructions
    gc.disable()  # a collection in one of ten calls would be a third of their instructions
    with host.models(setting) as models:
        for (case, provider), call in (host.alignments(setting) | models).items():
            name = f"{case.name}; {provider}"
            if only not in name:
                continue
            for repeats in (WARM_UP, REPEATS):
                os.getloadavg()
                for _ in range(repeats):
                    call()
            os.getloadavg()
            print(name, flush=True)


def count(folder: pathlib.Path, only: str) -> dict[str, int]:
    """Instructions a call, by its name."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("callgrind.*"):
        stale.unlink()
    options = "-q", "--tool=callgrind", "--instr-atstart=no", "--compress-strings=no", f"--dump-before={MARK}"
    command = "valgrind", *options, f"--callgrind-out-file={folder / 'callgrind'}"
    child = sys.executable, "-m", __spec__.name, "--child", "--only", only
    names = subprocess.run([*command, *child], stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    # The third mark of a call dumps what lies between it and the second one.
    dumps = [folder / f"callgrind.{3 * (i + 1)}" for i in range(len(names))]
    totals = [int(re.search(r"^(?:totals|summary): (\d+)", d.read_text(), re.M)[1]) for d in dumps]  # type: ignore[index]
    return {name: total // REPEATS for name, total in zip(names, totals, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/instructions"), help="of the profiles")
    parser.add_argument("--only", default="", help="just the calls whose name contains this")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_calls(arguments.only)
    elif shutil.which("callgrind_control") is None:
        print("left out: valgrind is not installed")
    else:
        for name, instructions in count(arguments.out, arguments.only).items():
            print(f"{instructions:12,} {name}")


if __name__ == "__main__":
    main()
