"""Builds the native library with CMake; everything else is in pyproject.toml and CMakeLists.txt.

Also the build backend that pyproject.toml names: setuptools' own, which asks for a torch only where there is none to
build against.

Environment: WEIGHTALIGN_CUDA, WEIGHTALIGN_CUDA_ARCHS or TORCH_CUDA_ARCH_LIST, MAX_JOBS, CMAKE_ARGS, and what CMake and
CMakeLists.txt read. See docs/pages/install.md.
"""

import contextlib
import ctypes
import importlib.util
import os
import pathlib
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator

from setuptools import Extension, build_meta, setup
from setuptools.build_meta import (  # noqa: F401, hooks of the build backend
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent
LIBRARY = "_weightalign.so"
OLDEST_TORCH = 2, 11
TORCH = "torch>=2.11"
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent ends


def torches() -> Iterator[tuple[str, pathlib.Path]]:
    """Version and folder of each torch in sight; only its headers and libraries are needed, so it is not imported.

    First this process's; then that of a Python without the isolation of pip, which hides by environment variables what
    is installed where the package goes, in the user's site-packages or by way of a .pth file.
    """
    find = "import importlib.util; spec = importlib.util.find_spec('torch'); print(spec and spec.origin or '')"
    outside = subprocess.run([sys.executable, "-E", "-c", find], stdout=subprocess.PIPE, text=True).stdout.strip()
    inside = importlib.util.find_spec("torch")
    for init in (inside and inside.origin, outside):
        if init and (version := pathlib.Path(init).with_name("version.py")).is_file():
            (number,) = re.findall(r"^__version__\b.*?[\"'](.+?)[\"']", version.read_text(), re.MULTILINE)
            yield number, version.parent


def is_new_enough(version: str) -> bool:
    return tuple(map(int, version.split(".")[:2])) >= OLDEST_TORCH


def get_requires_for_build_wheel(config_settings: dict[str, str] | None = None) -> list[str]:
    """Hook of the build backend. Where the installed torch is too old, pip brings another one for the build, and then
    replaces the old one as well."""
    has_torch = any(is_new_enough(version) for version, _ in torches())
    return build_meta.get_requires_for_build_wheel(config_settings) + ([] if has_torch else [TORCH])


get_requires_for_build_editable = get_requires_for_build_wheel


def torch_to_build_against() -> pathlib.Path:
    found = list(torches())
    for version, folder in found:
        if is_new_enough(version):
            return folder
    what = f"torch {found[0][0]} is installed" if found else "torch is not installed"
    raise SystemExit(f"weightalign_cuda: {what}, 2.11 or later is needed: pip install '{TORCH}'")


def run(*command: str | pathlib.Path) -> None:
    """Runs a command that ends with this process, however that ends, and with the one that asked for the build: a pip
    that is killed leaves its build running. ninja ends its compilers when it is asked to end."""
    parent, prctl = os.getppid(), ctypes.CDLL(None).prctl
    process = subprocess.Popen(command, preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM))
    try:
        while process.poll() is None and os.getppid() == parent:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.5)
    finally:
        process.terminate()
    if process.wait():
        raise SystemExit(f"weightalign_cuda: {command[0]} failed, as it says above")


def files(folder: str) -> Iterator[str]:
    """The files in a folder, without what Python leaves there."""
    for path in sorted((ROOT / folder).rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so":
            yield str(path.relative_to(ROOT))


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")[:-1], LIBRARY)

    def get_source_files(self) -> list[str]:
        """What an sdist has beside the Python package: all that is needed to build, test and measure."""
        folders = [path for name in ("csrc", "tests", "benchmarks", "docs", ".ci", ".github") for path in files(name)]
        return [*folders, "CMakeLists.txt", "Makefile", "CHANGELOG.md", "CITATION.cff", ".clang-format"]

    def build_extension(self, ext: Extension) -> None:
        torch = torch_to_build_against()
        for program in ("cmake", "ninja"):
            if shutil.which(program) is None:
                raise SystemExit(f"{program} was not found: pip install {program}")
        target = pathlib.Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" / f"native-{platform.machine()}"
        cuda = {"": "AUTO", "1": "ON", "0": "OFF"}.get(os.environ.get("WEIGHTALIGN_CUDA", ""))
        if cuda is None:
            raise SystemExit(f"WEIGHTALIGN_CUDA: expected 0, 1 or nothing, got {os.environ['WEIGHTALIGN_CUDA']!r}")
        architectures = os.environ.get("WEIGHTALIGN_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST", "")
        # Afresh: compilers and options of an earlier build must not stay. What the same command has compiled does.
        configure = [
            "cmake", "--fresh", "-S", ROOT, "-B", build, "-G", "Ninja", f"-DWA_TORCH={torch}", f"-DWA_CUDA={cuda}",
            f"-DWA_CUDA_ARCHITECTURES={architectures}", *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        run(*configure)
        jobs = os.environ.get("MAX_JOBS") or os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL")
        run("ninja", "-C", build, *([f"-j{jobs}"] if jobs else []))
        run("cmake", "--install", build, "--prefix", target)


class AnyPythonWheel(bdist_wheel):
    """The library does not depend on Python: one wheel per platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(
        license="BSD-3-Clause",
        ext_modules=[Extension("weightalign_cuda._weightalign", sources=[])],
        cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
    )
