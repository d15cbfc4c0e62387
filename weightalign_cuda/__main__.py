"""python -m weightalign_cuda: versions, compiled architectures, instruction set, driver, backends."""

import platform

import torch

from . import __version__, backends
from .ops import library
from .torch_private import missing


def main() -> None:
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    architectures = ", ".join(f"sm_{a}" for a in library.architectures) or "none"
    rows = {
        "weightalign_cuda": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA of torch, library, driver": f"{torch.version.cuda}, {library.cuda_runtime}, {library.cuda_driver()}",
        "compiled architectures": architectures,
        "CPU kernels": library.cpu_kernels(),
        "private names of torch": f"without {', '.join(missing())}" if missing() else "all there",
        "CUDA devices": ", ".join(devices) or "none",
        **{f"backend {name}": state for name, state in backends().items()},
    }
    for name, value in rows.items():
        print(f"{name:32}{value}")


main()
