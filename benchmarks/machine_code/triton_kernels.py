# mypy: ignore-errors
"""python -m benchmarks.machine_code.triton_kernels: what Triton's align kernels execute for each value.

Counted in the machine code that Triton makes for sm_90, float32 to bfloat16, for each width of a tile: it has no loop,
so that a thread executes what stands there but for a few branches (the gain's dtype, a transposition). An upper bound,
then; a filter that leaves lanes of its tile idle takes that much more. Needs Triton, and takes a minute.
"""

import math
import pathlib
import re
import tempfile
from bisect import bisect_left

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from weightalign_cuda.ops.triton import align_kernels as kernels
from weightalign_cuda.ops.triton.launch import OPTIONS

from .. import layers
from .cubin import cuobjdump

WIDTHS, FILTERS = kernels.WIDTHS.value, kernels.FILTERS.value
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)")


@triton.jit
def forward(table, statistics, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = table + tl.load(table + tl.program_id(0))
    kernels.forward_on_chip(row, statistics, tl.float32, tl.bfloat16, tl.float32, ROWS, WIDTH, True)


@triton.jit
def backward(table, statistics, grad_gain, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = table + tl.load(table + tl.program_id(0))
    kernels.backward_on_chip(row, statistics, grad_gain, tl.float32, tl.bfloat16, tl.float32, ROWS, WIDTH, True)


BOTH = forward, backward


def instructions(kernel, shape: int) -> int:
    """Of a thread, for tiles of that shape."""
    constants = {"ROWS": FILTERS[shape], "WIDTH": WIDTHS[shape]}
    types = {name: "constexpr" if name in constants else "*fp32" for name in kernel.arg_names} | {"table": "*i64"}
    source = triton.compiler.ASTSource(kernel, types, constants)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(triton.compile(source, GPUTarget("cuda", 90, 32), OPTIONS[torch.float32]).asm["cubin"])
        cubin.flush()
        found = INSTRUCTION.findall(cuobjdump(pathlib.Path(cubin.name), "-sass"))
    return len(found) - found[::-1].index("EXIT")  # what follows is padding


def lanes(n: int) -> float:
    """Lanes of a tile for each value of a filter that is read once."""
    return WIDTHS[bisect_left(WIDTHS, n)] / n


def main() -> None:
    threads = 32 * kernels.WARPS
    per_lane = {
        width: [instructions(kernel, shape) * threads / (width * FILTERS[shape]) for kernel in BOTH]
        for shape, width in enumerate(WIDTHS)
    }
    print(f"{'instructions a value, sm_90':28}{'lanes a value':>15}{'forward':>10}{'backward':>10}")
    for width, both in per_lane.items():
        print(f"{f'full tiles of {width}':28}{1:15.2f}{both[0]:10.1f}{both[1]:10.1f}")
    for name in layers.NETWORKS:
        sizes = [(math.prod(shape), math.prod(shape[1:])) for _, shape in layers.load(name).layers]
        total = sum(values for values, _ in sizes)
        of = [(values * lanes(n) / total, per_lane[WIDTHS[bisect_left(WIDTHS, n)]]) for values, n in sizes]
        means = (sum(share * both[i] for share, both in of) for i in range(2))
        print(f"{name:28}{sum(share for share, _ in of):15.2f}" + "".join(f"{mean:10.1f}" for mean in means))


if __name__ == "__main__":
    main()
