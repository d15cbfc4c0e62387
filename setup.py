"""Builds the native library with CMake; everything else is in pyproject.toml and CMakeLists.txt.

Environment: WEIGHTALIGN_CUDA=1 (require nvcc) or 0 (no CUDA kernels; default: if nvcc is found),
WEIGHTALIGN_CUDA_ARCHS=80;90 (default: those of 75;80;90;100;120 that nvcc supports).
"""

import os
import pathlib
import platform
import shutil
import subprocess
import sysconfig

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent
LIBRARY = "_weightalign.so"
TORCH = "torch>=2.11"


def installed_torch() -> pathlib.Path | None:
    """The torch of the target environment. pip's isolated build hides it from sys.path, but `sysconfig` still names
    that environment's site-packages. Only headers and libraries are needed."""
    for key in ("purelib", "platlib"):
        folder = pathlib.Path(sysconfig.get_paths()[key]) / "torch"
        if (folder / "include").is_dir():
            return folder
    try:
        import torch  # of the build environment (setup_requires) or the user's site-packages
    except ImportError:
        return None
    return pathlib.Path(torch.__file__).parent


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")[:-1], LIBRARY)

    def build_extension(self, ext: Extension) -> None:
        torch = installed_torch()
        if torch is None:
            raise SystemExit(
                f"weightalign_cuda is built against {TORCH}, which is not installed: pip install '{TORCH}'"
            )
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


setup(
    ext_modules=[Extension("weightalign_cuda._weightalign", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
    setup_requires=[] if installed_torch() else [TORCH],
)
