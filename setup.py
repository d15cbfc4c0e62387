"""Builds the native library with CMake; everything else is in pyproject.toml and CMakeLists.txt.

Also the build backend that pyproject.toml names: setuptools' own, which asks for a torch only where there is none to
build against.

Environment: WEIGHTALIGN_CUDA=1 (require nvcc) or 0 (no CUDA kernels; default: if nvcc is found),
WEIGHTALIGN_CUDA_ARCHS=80;90 (default: those of 75;80;90;100;120 that nvcc supports).
"""

import importlib.util
import os
import pathlib
import platform
import re
import shutil
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
    """Hook of the build backend. pip brings a torch for the build alone if the one that is installed is too old: it
    also updates that one, before or after."""
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
        configure = [
            "cmake", "-S", ROOT, "-B", build, "-G", "Ninja", f"-DWA_TORCH={torch}", f"-DWA_CUDA={cuda}",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",  # the cached one is of an earlier build environment
            f"-DWA_CUDA_ARCHITECTURES={os.environ.get('WEIGHTALIGN_CUDA_ARCHS', '').replace(',', ';')}",
            "-DWA_SIMULATED_GPU=OFF",  # the tests may have set it in this folder, and it needs nvcc
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", build], check=True)
        subprocess.run(["cmake", "--install", build, "--prefix", target], check=True)


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
