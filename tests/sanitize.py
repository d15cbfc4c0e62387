"""Runs tests on a native library whose host code and CPU kernels are compiled with a sanitizer of g++:

    python tests/sanitize.py address,undefined    (the tests of the ops, wrong arguments, any arguments)
    python tests/sanitize.py thread               (tests/race.py: Python threads that call all ops at once)

The library is in build/sanitize-*. Python, torch and OpenMP are as they are: leaks are not looked for
(tests/test_growth.py does), nor races between the threads of one call, as OpenMP's barriers are not seen.
"""

import os
import pathlib
import shutil
import subprocess
import sys

import torch

ROOT = pathlib.Path(__file__).parents[1]
TESTS = [
    "align",
    "align_foreach",
    "prepare",
    "ops",
    "direct",
    "errors",
    "cpu_instruction_sets",
    "past_checks",
    "any_input",
    "spent",
    "reusable",
]
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    # Only what this library itself reads and writes: the others were not compiled with the sanitizer.
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:ignore_noninstrumented_modules=1",
}


def run(*command, **options):
    print(*command, flush=True)
    return subprocess.run(command, check=True, **options)


def runtime(sanitizer):
    """g++'s library, to be loaded before all others, and the one whose exceptions it watches. None if there is none."""
    names = {"address,undefined": "libasan.so", "thread": "libtsan.so"}[sanitizer], "libstdc++.so"
    paths = [subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in names]
    return " ".join(paths) if all(map(os.path.isabs, paths)) else None


def build(sanitizer):
    """The sanitized library."""
    folder, torch_folder = ROOT / "build" / f"sanitize-{sanitizer}", pathlib.Path(torch.__file__).parent
    run("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DWA_TORCH={torch_folder}", "-DWA_CUDA=OFF",
        f"-DWA_SANITIZE={sanitizer}", stdout=subprocess.DEVNULL)  # fmt: skip
    run("ninja", "-C", folder)
    return folder / "_weightalign.so"


def main(sanitizer, *arguments):
    if missing := [name for name in ("g++", "cmake", "ninja") if shutil.which(name) is None]:
        return print(f"left out: {sanitizer} sanitizer, because {', '.join(missing)} is not installed")
    if (library := runtime(sanitizer)) is None:
        return print(f"left out: {sanitizer} sanitizer, because g++ has no library for it")
    environment = {**os.environ, **OPTIONS, "LD_PRELOAD": library, "PYTHONPATH": str(ROOT)}
    environment["WEIGHTALIGN_LIBRARY"] = str(build(sanitizer))
    if sanitizer == "thread":
        # Without randomised addresses, which some kernels spread wider than the sanitizer can map.
        command = ["setarch", "-R", sys.executable, ROOT / "tests" / "race.py"]
        environment["OMP_NUM_THREADS"] = "1"
    else:
        # Not captured: what the sanitizer prints before it ends the process must be seen.
        tests = [ROOT / "tests" / f"test_{name}.py" for name in TESTS]
        command = [sys.executable, "-m", "pytest", "-s", "-p", "no:xdist", "-k", "not reference", *tests]
    run(*command, *arguments, cwd=ROOT, env=environment)


if __name__ == "__main__":
    main(*sys.argv[1:])
