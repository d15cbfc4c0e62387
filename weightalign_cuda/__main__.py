"""python -m weightalign_cuda: versions, compiled architectures, instruction set, driver, backends."""

import platform
import signal

import torch

from . import __version__, backends
from .ops import library
from .ops.backend import version
from .torch_private import missing


def main() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it, without a traceback
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    architectures = [f"sm_{a}" + (" with PTX" if a in library.ptx else "") for a in library.architectures]
    rows = {
        "weightalign_cuda": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda or "none",
        "CUDA of the library": version(library.cuda_runtime),
        "CUDA of the driver": version(library.cuda_driver()),
        "compiled architectures": ", ".join(architectures) or "none",
        "CPU kernels": library.cpu_kernels(),
        "private names of torch": f"without {', '.join(missing())}" if missing() else "all there",
        "CUDA devices": ", ".join(devices) or "none",
        **{f"backend {name}": state for name, state in backends().items()},
    }
    for name, value in rows.items():
        print(f"{name:32}{value}")


main()
