"""Which tests run here, and the fixtures they share.

A test file that needs a package which is not installed is skipped, and named in the summary. Slow cases of a test whose
other cases always run are skipped as well, unless -m selects them. With WEIGHTALIGN_TESTS=all every test runs, and a
package that is not installed is an error.
"""

import importlib.util
import logging
import os
import shutil

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which torch's compiler does

import weightalign_cuda as wa  # noqa: E402

SERVING = {"cpu": ("cpu", "triton", "reference"), "cuda": ("cuda", "triton", "reference")}
ALL_BACKENDS = [name for name in SERVING[DEVICE] if wa.backends()[name] == "available"]
# On the CPU Triton is interpreted, some hundred times slower: it has its own tests, and those that use any_backend.
BACKENDS = [name for name in ALL_BACKENDS if (name, DEVICE) != ("triton", "cpu")]
if "triton" in set(ALL_BACKENDS) - set(BACKENDS):
    import triton_interpreter

    triton_interpreter.mend()

NEEDS = {
    "simt": ["pybind11"],
    "simt/test_launch_plan.py": ["numpy", "rich"],
    "test_accelerate.py": ["accelerate", "timm"],
    "test_abi_audit.py": ["torch_abi_audit"],
    "test_benchmarks.py": ["matplotlib", "numpy", "rich", "torchvision"],
    "test_conv_layers_benchmark.py": ["numpy", "rich", "torchvision"],
    "test_cpu_instruction_sets.py": ["hypothesis"],
    "test_exporters.py": ["onnx", "onnxruntime", "onnxscript"],
    "test_cubin.py": [] if shutil.which("cuobjdump") else ["triton"],  # Triton brings a cuobjdump
    "test_fx.py": ["timm", "torchvision"],
    "test_head_libraries.py": ["segmentation_models_pytorch", "torchvision", "transformers"],
    "test_layout.py": ["hypothesis"],
    "test_machine_code_model.py": ["numpy"] if shutil.which("cuobjdump") else ["numpy", "triton"],
    "test_peft.py": ["peft"],
    "test_prepare.py": ["hypothesis"],
    "test_readme.py": ["peft", "timm", "torchvision"],
    "test_step_benchmark.py": ["numpy", "rich", "timm", "torchvision"],
    "test_timm.py": ["timm", "torchvision"],
    "test_timm_models.py": ["timm", "torchvision"],
    "test_transformers.py": ["transformers"],
    "test_triton_compiled.py": ["triton"],
    "test_triton_kernels.py": ["hypothesis", "triton"],
}
left_out = {
    name: absent
    for name, needed in NEEDS.items()
    if (absent := [package for package in needed if importlib.util.find_spec(package) is None])
}
collect_ignore = [*left_out, *(["test_cuda.py"] if DEVICE == "cpu" else [])]
ALL = os.environ.get("WEIGHTALIGN_TESTS") == "all"
if left_out and ALL:
    raise pytest.UsageError(f"WEIGHTALIGN_TESTS=all, but packages are not installed: {left_out}")

if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    # The same examples every time; `make fuzz`, which selects the other profile, draws others and many more.
    settings.register_profile("same", derandomize=True, deadline=None, max_examples=60)
    settings.register_profile("fuzz", deadline=None, max_examples=3000, print_blob=True)
    settings.load_profile("same")


def pytest_configure(config):
    if not ALL and not config.option.markexpr:
        config.option.markexpr = "not slow"


def pytest_terminal_summary(terminalreporter):
    if terminalreporter.config.option.markexpr == "not slow":
        terminalreporter.write_line("left out: slow tests, which -m slow or WEIGHTALIGN_TESTS=all runs")
    if DEVICE == "cpu":
        terminalreporter.write_line("left out: tests/test_cuda.py, because torch sees no CUDA device")
    for name, absent in left_out.items():
        terminalreporter.write_line(f"left out: tests/{name}, because {', '.join(absent)} is not installed")


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each backend that serves `device` here, selected for the test."""
    with wa.use_backend(request.param):
        yield request.param


@pytest.fixture(params=ALL_BACKENDS)
def any_backend(request):
    """Like `backend`, plus Triton even if it is interpreted."""
    with wa.use_backend(request.param):
        yield request.param


@pytest.fixture(params=[name for name in BACKENDS if name != "reference"])
def native(request):
    """Like `backend`, without the reference (PyTorch's own autograd): for promises of the registered ops alone."""
    with wa.use_backend(request.param):
        yield request.param


@pytest.fixture(params=["native", *(["in_triton"] if "triton" in ALL_BACKENDS else [])])
def ops(request):
    """Each set of registered ops."""
    return getattr(wa.ops, request.param)


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger="weightalign_cuda")
    return caplog


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def quick(monkeypatch, restore_threads):
    """For benchmarks: one thread, so that a busy machine matters little, and few sets of buffers."""
    from benchmarks import harness

    torch.set_num_threads(1)
    monkeypatch.setitem(harness.MAX_SETS, "cpu", 2)
