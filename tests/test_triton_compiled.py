"""The Triton kernels compiled ahead of time for each architecture: no GPU is needed."""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version

import pytest

import weightalign_cuda as wa


def compiled(architecture):
    """Resources used by forward and backward, each with an input that is transposed, padded and activated. Run in a
    separate process, where kernels are not interpreted."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget

    from weightalign_cuda.ops.triton import kernels
    from weightalign_cuda.ops.triton.activations import gelu
    from weightalign_cuda.ops.triton.launch import OPTIONS, TYPES
    from weightalign_cuda.ops.triton.prepare_kernels import REFLECT, TILE

    cuobjdump = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    cases = [(kernel, tl.float32, tl.bfloat16) for kernel in (kernels.forward, kernels.backward)]
    if architecture == 90:
        cases.append((kernels.backward, tl.float64, tl.float64))  # uses the most, and is slow to compile
    for kernel, weight, aligned in cases:
        from_, to = (weight, aligned) if kernel is kernels.forward else (aligned, weight)
        constants = {"WEIGHT": weight, "ALIGNED": aligned, "ACC": weight, "FROM": from_, "TO": to, "SAVED": to}
        constants |= {"FROM_BY_CHANNELS": True, "TO_BY_CHANNELS": False, "SAVED_BY_CHANNELS": False}
        constants |= {"MODE": REFLECT, "ACTIVATION": gelu, "SAVED_IS_RESULT": False}
        constants |= {"CHANNELS": 32, "POSITIONS": TILE // 32}
        constants = {name: constants[name] for name in kernel.arg_names if name in constants}
        signature = {name: "constexpr" if name in constants else f"*{weight}" for name in kernel.arg_names}
        source = triton.compiler.ASTSource(kernel, signature | {"table": "*i64"}, constants)
        options = next(options for dtype, options in OPTIONS.items() if TYPES[dtype] == weight)
        result = triton.compile(source, GPUTarget("cuda", architecture, 32), options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(result.asm["cubin"])
            cubin.flush()
            command = [cuobjdump, "-sass", "--dump-resource-usage", cubin.name]
            listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", listing).groups()
        yield {
            "kernel": f"{kernel.__name__}, {weight}, {aligned}",
            "registers": int(registers),
            "most": options["maxnreg"],
            "spilled": int(stack) + int(local),
            "shared": result.metadata.shared,
            "instructions": sorted(set(re.findall(r"\b(?:LDG|STG|LDL|STL|ATOMG?|RED)\b\S*", listing))),
        }


def in_own_process(*command):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(pathlib.Path(wa.__file__).parent.parent)
    return subprocess.run(
        [sys.executable, *command], env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def resources(architecture):
    return json.loads(in_own_process(__file__, str(architecture)))


ON_ROCM = """
import torch
torch.version.hip = "6.4"
from triton.backends.amd.compiler import HIPOptions
from weightalign_cuda.ops.triton.launch import OPTIONS
print(sorted(set().union(*OPTIONS.values()) - set(HIPOptions.__dataclass_fields__)))
"""


def test_triton_for_amd_knows_all_options():
    """It refuses others, such as maxnreg."""
    assert in_own_process("-c", ON_ROCM) == "[]\n"


@pytest.mark.parametrize("architecture", [90, *(pytest.param(a, marks=pytest.mark.slow) for a in (80, 100))])
def test_registers_spills_shared_memory_and_accesses(architecture):
    """One test, because compiling takes most of a minute."""
    kernels = resources(architecture)
    assert len(kernels) >= 2
    for kernel in kernels:
        assert 32 < kernel["registers"] <= kernel["most"], kernel
        assert kernel["spilled"] == 0, kernel
        assert kernel["shared"] <= 48 * 1024, kernel
        instructions = kernel["instructions"]
        for access in ("LDG", "STG"):
            assert any(re.match(rf"{access}\.E\..*128", i) for i in instructions), f"{kernel}: no {access} of 16 bytes"
        assert not any(re.match("LDL|STL|ATOM|RED", i) for i in instructions), kernel


def test_instructions():
    """Of a thread that has 16 values: 47.6 and 50.7 each by Triton 3.9, 61.1 and 63.8 by Triton 3.6."""
    code = "from benchmarks.machine_code.triton_kernels import *; print(*(instructions(each, 3) for each in BOTH))"
    forward, backward = map(int, in_own_process("-c", code).split())
    most = 70 if tuple(map(int, version("triton").split(".")[:2])) < (3, 9) else 55
    assert 16 * 30 < forward < 16 * most and 16 * 30 < backward < 16 * most


if __name__ == "__main__":
    print(json.dumps(list(compiled(int(sys.argv[1])))))
