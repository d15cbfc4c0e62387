"""The layout for Hugging Face's kernel-builder (csrc/hub): what the builder documents and checks, and the kernel built
from it with the builder's definitions, loaded beside this package."""

import ast
import concurrent.futures
import importlib.util
import itertools
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import types

import pytest
import torch
from test_cpu_machine_code import SETS, loops_of

import weightalign_cuda as wa

ROOT = pathlib.Path(__file__).parents[1]
TORCH = pathlib.Path(torch.__file__).parent
NAMES = itertools.count()


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    target = tmp_path_factory.mktemp("hub")
    subprocess.run([sys.executable, "-c", f"import layout, pathlib; layout.write(pathlib.Path({str(target)!r}))"],
                   cwd=ROOT / "csrc/hub", check=True)  # fmt: skip
    return target


@pytest.fixture(scope="module")
def build(layout):
    return pytest.importorskip("tomllib").loads((layout / "build.toml").read_text())


def test_build_toml(build):
    """Names, and no others: the builder refuses what it does not know."""
    assert set(build) == {"general", "torch", "kernel"}
    assert set(build["general"]) == {"name", "version", "edition", "license", "backends"}
    assert build["general"]["edition"] == 5 and re.fullmatch("[a-z][a-z0-9-]*[a-z0-9]", build["general"]["name"])
    assert set(build["torch"]) == {"src", "stable-abi"}
    assert set(build["torch"]["stable-abi"]) == set(build["general"]["backends"]) == {"cpu", "cuda"}
    assert [set(kernel) for kernel in build["kernel"].values()] == [{"backend", "depends", "cuda-capabilities", "src"}]


def test_versions_and_architectures_are_those_of_cmake(build):
    cmake = (ROOT / "CMakeLists.txt").read_text()
    (major, minor) = re.search(r"TORCH_TARGET_VERSION=0x(..)(..)0{12}\)", cmake).groups()
    assert set(build["torch"]["stable-abi"].values()) == {f"{int(major, 16)}.{int(minor, 16)}"}
    (defaults,) = re.findall(r"set\(entries (.*)\)", (ROOT / "csrc/cuda/nvcc.cmake").read_text())
    assert build["kernel"]["cuda"]["cuda-capabilities"] == defaults.split()


def test_all_sources_are_listed(layout, build):
    """The builder copies what is listed and no more, and compiles each .cpp once."""
    host, cuda = build["torch"]["src"], build["kernel"]["cuda"]["src"]
    there = {str(path.relative_to(layout)) for path in layout.rglob("*.[chu]*") if path.suffix != ".toml"}
    assert {*host, *cuda} == there and len(host) == len({*host})
    assert not any(name.endswith((".cpp", ".cu")) for name in {*host} & {*cuda})
    compiled = re.findall(r"csrc/\S+\.(?:cpp|cu)\b", (ROOT / "CMakeLists.txt").read_text())
    per_instruction_set = {"csrc/cpu/align_kernels.cpp", "csrc/cpu/prepare_kernels.cpp"}
    assert {*compiled} - per_instruction_set == {
        name for name in there if name.endswith((".cpp", ".cu")) and not name.startswith(("torch-ext", "csrc/cpu/k"))
    }


def test_package(layout, build):
    """Its name is the kernel's; the builder refuses a second one inside."""
    package = layout / "torch-ext" / build["general"]["name"].replace("-", "_")
    assert (package / "__init__.py").is_file() and not (package / package.name).exists()


def test_python_imports(layout):
    """From the kernel itself relatively, as each load has another name; else from Python, torch and its Triton."""
    outside = {"torch", "triton", *sys.stdlib_module_names}
    for path in layout.rglob("*.py"):
        depth = len(path.relative_to(layout / "torch-ext").parts) - 1
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level <= depth, f"{path}: beyond the package"
                module = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                names = [module] if node.module else [module / name.name for name in node.names]
                for name in names:
                    assert name.name == "_ops" or name.with_suffix(".py").exists() or name.is_dir(), (path, name)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
                assert {name.partition(".")[0] for name in names} <= outside, path


def test_one_macro_names_the_namespace(layout):
    texts = {path.name: path.read_text() for path in layout.rglob("*.[chu]*") if path.suffix in (".h", ".cpp", ".cu")}
    registering = {name for name, text in texts.items() if "TORCH_LIBRARY" in re.sub("//.*", "", text)}
    assert registering == {"register_ops.h"}
    assert "TORCH_LIBRARY_IMPL(name, device, library)" in texts["register_ops.h"]


# What kernel-builder generates: the macro that makes a library a Python module, and _ops.py.
REGISTRATION = """
#include <Python.h>
#define REGISTER_EXTENSION(name) NAMED(name)
#define NAMED(name)                                                                      \\
    PyMODINIT_FUNC PyInit_##name() {                                                     \\
        static PyModuleDef module = {PyModuleDef_HEAD_INIT, #name, nullptr, 0, nullptr}; \\
        return PyModule_Create(&module);                                                 \\
    }
"""
OPS = """
from . import {name}

def add_op_namespace_prefix(op):
    return "{name}::" + op
"""


def compile_kernel(layout, build, name, folder):
    include = sysconfig.get_path("include")
    if not shutil.which("g++") or not pathlib.Path(include, "Python.h").exists():
        pytest.skip("g++ or Python.h is not installed")
    (folder / "registration.h").write_text(REGISTRATION)
    major, minor = map(int, build["torch"]["stable-abi"]["cpu"].split("."))
    definitions = f"-DTORCH_EXTENSION_NAME={name}", "-DCPU_KERNEL", "-DPy_LIMITED_API=0x03090000"
    target = f"-DTORCH_TARGET_VERSION={major << 56 | minor << 48}ULL"
    options = "-std=gnu++20", "-O2", "-fPIC", "-fno-gnu-unique"
    includes = f"-I{folder}", f"-I{include}", "-isystem", TORCH / "include"

    def compile_(source):
        out = folder / f"{pathlib.Path(source).name}.o"
        subprocess.run(["g++", *options, *definitions, target, *includes, "-c", layout / source, "-o", out], check=True)
        return out

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_, (each for each in build["torch"]["src"] if each.endswith(".cpp"))))
    libraries = "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"
    library = folder / f"{name}.abi3.so"
    subprocess.run(["g++", "-shared", "-o", library, *objects, f"-L{TORCH / 'lib'}", *libraries], check=True)


@pytest.fixture(scope="module", params=["reference", pytest.param("compiled", marks=pytest.mark.slow)])
def kernel(request, layout, build, tmp_path_factory):
    """The kernel as it is loaded: under a name of its own. Without its library, the reference serves."""
    name = f"_weightalign_cpu_{next(NAMES)}"
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(layout / "torch-ext/weightalign", folder, dirs_exist_ok=True)
    (folder / "_ops.py").write_text(OPS.format(name=name))
    (folder / "metadata.json").write_text('{"backend": {"type": "cpu"}}')
    if request.param == "compiled":
        compile_kernel(layout, build, name, folder)
        return load(folder, name)
    (folder / f"{name}.py").touch()
    with pytest.warns(RuntimeWarning, match="is not a 64-bit ELF library"):
        return load(folder, name)


def load(folder, name):
    spec = importlib.util.spec_from_file_location(f"loaded{name}", folder / "__init__.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_functions_in_a_namespace_of_their_own(kernel):
    """They are those of the installed package, which stays as it is."""
    x, w = torch.randn(2, 4, 9, 9), torch.randn(8, 4, 3, 3)
    gain = torch.rand(8)
    assert set(kernel.__all__) - {"layers"} <= set(wa.__all__)
    results = []
    for package in (kernel, wa):
        inputs = [each.clone().requires_grad_() for each in (x, w, gain)]
        y = package.conv2d(*inputs[:2], gain=inputs[2], padding="same", activation="gelu", scale=1.5)
        results.append([y, package.align(w, gain), *torch.autograd.grad(y.square().sum(), inputs)])
    torch.testing.assert_close(*results)
    own = getattr(torch.ops, kernel.ops.schemas.NAMESPACE)
    assert kernel.ops.schemas.native.align_forward is own.align_forward.default
    assert wa.ops.schemas.native.align_forward is torch.ops.weightalign_cuda.align_forward.default
    if kernel.ops.library.error is None:
        assert kernel.backends()["cpu"] == "available"
        assert kernel.ops.library.cpu_kernels() == wa.ops.library.cpu_kernels()
        if platform.machine() in ("x86_64", "AMD64"):  # each instruction set was really compiled for
            assert {register for register, _, _ in loops_of(kernel.ops.native_library.PATH)} == set(SETS)


def test_architectures_come_from_the_builder(kernel):
    metadata = kernel.ops.native_library.PATH.with_name("metadata.json")
    before = metadata.read_text()
    metadata.write_text('{"backend": {"type": "cuda", "archs": ["7.5", "10.0+PTX"]}}')
    try:
        assert kernel.ops.installed.architectures_of(None) == ["75", "100+PTX"]
    finally:
        metadata.write_text(before)


@pytest.mark.parametrize("options", [{}, {"stride": 2, "dilation": 2, "groups": 2, "gamma": 1.7, "bias": False}])
def test_layer_for_timm(kernel, options):
    """Forward alone, without a state of its own, as the kernels library wants it."""
    std_conv = pytest.importorskip("timm.layers.std_conv")
    layer = std_conv.ScaledStdConv2d(4, 8, 3, **options).double()
    torch.nn.init.normal_(layer.gain)
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64, requires_grad=True)
    inputs = x, *layer.parameters()
    expected = layer(x)
    gradients = torch.autograd.grad(expected.square().sum(), inputs)

    ours = kernel.layers.ScaledStdConv2d
    members = {name for name in vars(ours) if not name.startswith("__")}
    assert ours.__init__ is torch.nn.Module.__init__ and members == {"forward", "can_torch_compile"}
    layer.forward = types.MethodType(ours.forward, layer)
    y = layer(x)
    torch.testing.assert_close([y, *torch.autograd.grad(y.square().sum(), inputs)], [expected, *gradients])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
