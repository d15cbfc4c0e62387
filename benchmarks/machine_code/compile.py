"""Compiles this package's C++ and CUDA programs, and keeps them in build/machine_code until their sources change."""

import hashlib
import pathlib
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "machine_code"


def compiled(suffix: str, command: Sequence[str | pathlib.Path], sources: Iterable[pathlib.Path]) -> pathlib.Path:
    """What `command` makes of the sources; it is given `-o FILE`. `suffix`: of the file's name."""
    digest = hashlib.sha256(repr(command).encode())
    for source in sorted(sources):
        digest.update(source.read_bytes())
    program = BUILD / f"{digest.hexdigest()[:16]}{suffix}"
    if not program.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as own:  # others may compile the same at the same time
            unfinished = pathlib.Path(own, program.name)
            done = subprocess.run([*command, "-o", unfinished], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")
            unfinished.rename(program)
    return program


def cuda_headers() -> pathlib.Path:
    """The folder of CUDA's headers: of the toolkit that nvcc belongs to, or of the packages that torch brings."""
    folders = list(pathlib.Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/include"))
    if nvcc := shutil.which("nvcc"):
        dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
        folders = [pathlib.Path(found) for found in re.findall(r'"-I([^"]+)"', dry)] + folders
    for folder in folders:
        if (folder / "crt/host_defines.h").exists() and (folder / "cuda_bf16.h").exists():
            return folder
    raise RuntimeError("CUDA's headers (crt/host_defines.h, cuda_bf16.h) were not found: put nvcc on PATH")
