"""The compiled loops of the CPU kernels. Vectors wider than the registers, or too many of them, are spilled to the
stack at a third of the speed, and no result shows it."""

import pathlib
import platform
import re
import shutil
import subprocess

import pytest
from machine_code import functions, innermost_loops

from weightalign_cuda.ops import native_library

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads x86-64's machine code")

CPU = pathlib.Path(__file__).parents[1] / "csrc/cpu"
SETS = {"xmm": "x86-64", "ymm": "x86-64-v3", "zmm": "x86-64-v4"}  # instruction sets by their registers
STRAIGHT = r"(forward_filter|backward_filter|write_each|convert|add|activate|differentiate)<(float|double).*>\(.*\)"
VECTORS = r"^v?(add|sub|mul|div|fn?m(add|sub)\w*)p[sd]\b|^vcvt(ph2ps|ps2ph) .*%[yz]mm|^v?p(srl|sll)d\b"
STREAMED = r"^v?movnt"
VALUES = r"^v?(add|sub|mul|div|fn?m(add|sub)\w*)s[sd]\b|^call"  # scalar: a row's remainder, or libm


def loops_of(path):
    """(register, function, instructions) of each straight loop over vectors."""
    for name, code in functions(path):
        name = name.replace("(anonymous namespace)::", "").replace("wa::", "").replace("cpu::", "")
        if not re.search(STRAIGHT, name):
            continue
        for loop in innermost_loops(code):
            text = "\n".join(loop)
            if re.search(VECTORS, text, re.MULTILINE) and not re.search(VALUES, text, re.MULTILINE):
                frame = "[sb]" if any(re.match(r"mov\s+%rsp,%rbp", i) for _, i in code) else "s"
                register = next(r for r in ("zmm", "ymm", "xmm") if f"%{r}" in "\n".join(i for _, i in code))
                yield register, name, [re.sub(rf"(-?0x\w+)?\(%r{frame}p\)", "STACK", i) for i in loop]


def assert_off_the_stack(loops):
    for register, name, loop in loops:
        text = "\n".join([f"{name}, {register}:", *loop])
        assert not any(i.endswith(",STACK") and not i.startswith(("cmp", "test")) for i in loop), f"writes: {text}"
        # exp and erf have more constants than there are registers, and so does converting halves in software.
        if "activate" not in name and "differentiate" not in name and not (register == "xmm" and "Half" in name):
            assert not any("STACK" in i for i in loop), f"reads: {text}"


def test_loops_of_the_library_do_not_spill():
    loops = list(loops_of(native_library.PATH))
    conversions = 3 if b"clang version" in native_library.PATH.read_bytes() else 4  # clang inlines one more
    for register in SETS:
        names = {name for r, name, _ in loops if r == register}
        streaming = {name for r, name, loop in loops if r == register and any(re.match(STREAMED, i) for i in loop)}
        # 10 pairs of dtypes, and what is written of each: forward and backward, through the caches and past them.
        for start, found, count in (
            ("void forward_filter<", names, 10),
            ("double backward_filter<", names, 10),
            ("void write_each<", names, 20),
            ("void write_each<", streaming, 20),
        ):
            assert sum(name.startswith(start) for name in found) == count, (register, sorted(found))
        assert sum("convert<" in name for name in names) >= conversions, (register, sorted(names))
        assert any("activate<float" in name for name in names) and any("differentiate<float" in name for name in names)
    assert_off_the_stack(loops)


@pytest.mark.skipif(not shutil.which("clang++"), reason="clang++ is not installed")
@pytest.mark.parametrize("register", SETS)
def test_loops_compiled_by_clang(register, tmp_path):
    for source in ("align_kernels", "prepare_kernels"):
        flags = [
            "-O3",
            "-std=gnu++17",
            "-fPIC",
            "-Wno-psabi",
            "-fno-tree-vectorize",
            "-DWA_ISA=baseline",
            f"-march={SETS[register]}",
        ]
        path = tmp_path / f"{source}.o"
        subprocess.run(["clang++", *flags, "-c", str(CPU / f"{source}.cpp"), "-o", str(path)], check=True)
        loops = list(loops_of(path))
        assert len(loops) > 10
        assert_off_the_stack(loops)
