"""Writes the sources to build/hub, as Hugging Face's kernel-builder wants them (https://huggingface.co/docs/kernels).

The ops and functions of weightalign_cuda with the C++ and CUDA sources, as they are; what is in tree/, over them; and
what is written here: build.toml and a file of CPU kernels for each instruction set, as the builder compiles each file
once.
"""

import pathlib
import shutil

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
NAME = "weightalign"

# Names, options and macros of what CMakeLists.txt compiles with options of the command line. build.toml's options would
# be those of all machines, the pragma can be left out. The macros come with it, but before g++ 13 not in time for
# the preprocessor.
INSTRUCTION_SETS = {
    "baseline": ("", ()),
    "avx2": ("arch=x86-64-v3", ("AVX", "AVX2", "F16C")),
    "avx512": ("arch=x86-64-v4,prefer-vector-width=512", ("AVX", "AVX2", "F16C", "AVX512F")),
}
KERNELS = """\
#define WA_ISA {name}
#include "align_kernels.h"
#include "prepare_kernels.h"
"""
FOR_X86 = """\
#ifdef __x86_64__
#pragma GCC target("{target}")
{macros}{kernels}#endif
"""
MACRO = """\
#ifndef __{name}__
#define __{name}__ 1
#endif
"""

BUILD = """\
[general]
name = "{name}"
version = 0 # its API may change
edition = 5
license = "bsd-3-clause"
backends = ["cpu", "cuda"]

[torch]
src = [
{sources}
]

[torch.stable-abi]
cpu = "2.11"
cuda = "2.11"

[kernel.cuda]
backend = "cuda"
depends = ["torch"]
# As in csrc/cuda/nvcc.cmake. Those that the CUDA of a build does not know are left out.
cuda-capabilities = ["7.5", "8.0", "9.0", "10.0+PTX", "12.0+PTX"]
src = [
{cuda_sources}
]
"""


def write(target: pathlib.Path) -> None:
    package = target / "torch-ext" / NAME
    for folder in ("ops", "functional"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "weightalign_cuda" / folder, package / folder, ignore=ignored)
    shutil.copy(ROOT / "weightalign_cuda" / "torch_private.py", package)
    for folder in ("common", "cpu", "cuda"):
        shutil.copytree(ROOT / "csrc" / folder, target / "csrc" / folder, ignore=shutil.ignore_patterns("*.cmake"))
    shutil.copytree(HERE / "tree", target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "LICENSE", target)
    for name in ("align_kernels", "prepare_kernels"):
        (target / f"csrc/cpu/{name}.cpp").rename(target / f"csrc/cpu/{name}.h")
    for name, (options, macros) in INSTRUCTION_SETS.items():
        text = KERNELS.format(name=name)
        if options:
            defined = "".join(MACRO.format(name=macro) for macro in macros)
            text = FOR_X86.format(target=options, macros=defined, kernels=text)
        (target / "csrc/cpu" / f"kernels_{name}.cpp").write_text(text)
    cuda = [*sources(target, "csrc/cuda"), *(each for each in sources(target, "csrc/common") if each.endswith(".h"))]
    host = [each for folder in ("torch-ext", "csrc/common", "csrc/cpu") for each in sources(target, folder)]
    build = BUILD.format(name=NAME, sources=quoted(host), cuda_sources=quoted(cuda))
    (target / "build.toml").write_text(build)


def sources(target: pathlib.Path, folder: str) -> list[str]:
    return sorted(
        str(path.relative_to(target))
        for path in (target / folder).iterdir()
        if path.suffix in {".cpp", ".cu", ".cuh", ".h"}
    )


def quoted(names: list[str]) -> str:
    return "\n".join(f'    "{name}",' for name in names)


if __name__ == "__main__":
    folder = ROOT / "build" / "hub"
    shutil.rmtree(folder, ignore_errors=True)
    write(folder)
    print(f"written: {folder}")
