"""python -m benchmarks.gpu_report.build: the native library in the source tree, for the GPU that is here only.

By CMake itself, as CMakeLists.txt says: neither pip nor setuptools takes part. WEIGHTALIGN_CUDA_ARCHS=90 builds for
sm_90 whatever is here.
"""

import os
import pathlib
import shutil
import subprocess
import sys

import torch

from .. import machine

BUILD = machine.ROOT / "build" / "gpu-report"
PACKAGE = machine.ROOT / "weightalign_cuda"
CHECK = "import weightalign_cuda as wa; print(state := wa.backends()['cuda']); raise SystemExit(state != 'available')"


def architectures() -> str:
    """As CMake wants them: 90, or 80;90."""
    if asked := os.environ.get("WEIGHTALIGN_CUDA_ARCHS"):
        return asked.replace(",", ";")
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device: nothing to build for")
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ";".join(str(10 * major + minor) for major, minor in sorted(capabilities))


def main() -> None:
    options = {
        "WA_TORCH": pathlib.Path(torch.__file__).parent,
        "WA_CUDA": "ON",
        "WA_CUDA_ARCHITECTURES": architectures(),
    }
    for program in ("cmake", "ninja"):
        if shutil.which(program) is None:
            raise SystemExit(f"{program} was not found on PATH")
    configure = ["cmake", "-S", machine.ROOT, "-B", BUILD, "-G", "Ninja"]
    subprocess.run([*configure, *(f"-D{name}={value}" for name, value in options.items())], check=True)
    subprocess.run(["cmake", "--build", BUILD], check=True)
    # A new file: whoever has loaded the library keeps the old one.
    (PACKAGE / "_weightalign.so").unlink(missing_ok=True)
    subprocess.run(["cmake", "--install", BUILD, "--prefix", PACKAGE], check=True)
    raise SystemExit(subprocess.run([sys.executable, "-c", CHECK], cwd=machine.ROOT).returncode)


if __name__ == "__main__":
    main()
