"""Which tests run here, and the fixtures they share.

A test file that needs a package which is not installed is skipped, and named in the summary. Slow cases of a test whose
other cases always run are skipped as well, unless -m selects them. With WEIGHTALIGN_TESTS=all every test runs, and a
package that is not installed is an error.
"""

import dataclasses
import gc
import importlib.util
import itertools
import logging
import os
import shutil
import sys
import time

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IS_SIMULATED = DEVICE == "cuda" and torch.cuda.get_device_name().startswith("Simulated device")  # tests/simcuda
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which torch's compiler does

from processes import in_processes  # noqa: E402

import weightalign_cuda as wa  # noqa: E402

SERVING = {"cpu": ("cpu", "triton", "reference"), "cuda": ("cuda", "triton", "reference")}
ALL_BACKENDS = [name for name in SERVING[DEVICE] if wa.backends()[name] == "available"]
# Without a GPU Triton is interpreted, some hundred times slower: it has its own tests, and those that use any_backend.
# So has the reference on simulated devices, where it is PyTorch's operations on the CPU once more.
RARE = {"cpu": ["triton"], "cuda": ["triton", "reference"] if IS_SIMULATED else []}[DEVICE]
BACKENDS = [name for name in ALL_BACKENDS if name not in RARE]
if DEVICE == "cpu" and "triton" in ALL_BACKENDS:
    import triton_interpreter

    triton_interpreter.mend()

NEEDS = {
    "simcuda/test_commands.py": ["matplotlib", "numpy", "rich", "sklearn", "timm", "torchvision"],
    "simt": ["pybind11"],
    "simt/test_launch_plan.py": ["numpy", "rich"],
    "test_accuracy.py": ["numpy", "rich", "scipy", "sklearn", "torchvision"],
    "test_accuracy_recipes.py": ["numpy", "rich", "scipy", "torchvision"],
    "test_accuracy_report.py": ["matplotlib", "numpy", "rich", "scipy", "torchvision"],
    "test_accelerate.py": ["accelerate", "timm"],
    "test_abi_audit.py": ["torch_abi_audit"],
    "test_any_input.py": ["hypothesis"],
    "test_benchmarks.py": ["matplotlib", "numpy", "scipy", "torchvision"],
    "test_compare.py": ["numpy", "scipy"],
    "test_conv_layers_benchmark.py": ["numpy", "torchvision"],
    "test_exporters.py": ["onnx", "onnxruntime", "onnxscript"],
    "test_cubin.py": [] if shutil.which("cuobjdump") else ["triton"],  # Triton brings a cuobjdump
    "test_gpu_report.py": ["matplotlib", "numpy"],
    "test_fx.py": ["timm", "torchvision"],
    "test_head_libraries.py": ["segmentation_models_pytorch", "torchvision", "transformers"],
    "test_install.py": ["cmake", "ninja", "setuptools"],
    "test_machine_code_model.py": ["numpy"] if shutil.which("cuobjdump") else ["numpy", "triton"],
    "test_peft.py": ["peft"],
    "test_readme.py": ["peft", "timm", "torchvision"],
    "test_scaling.py": ["rich", "timm"],
    "test_step_benchmark.py": ["numpy", "timm", "torchvision"],
    "test_timm.py": ["timm", "torchvision"],
    "test_timm_models.py": ["timm", "torchvision"],
    "test_transformers.py": ["transformers"],
    "test_triton_compiled.py": ["triton"],
    "test_triton_kernels.py": ["triton"],
}
left_out = {
    name: absent
    for name, needed in NEEDS.items()
    if (absent := [package for package in needed if importlib.util.find_spec(package) is None])
}
NOT_SIMULATED = {
    "test_compile_without_graph_breaks": "inductor's kernels are Triton's, compiled",
    "test_data_parallel": "broadcasts by NCCL",
    "test_plain_models": "minutes of other people's layers, which are converted as on the CPU",
}
HAS_TWO = torch.cuda.is_available() and torch.cuda.device_count() > 1
collect_ignore = [
    *left_out,
    *(["test_cuda.py"] if DEVICE == "cpu" else []),
    *([] if HAS_TWO else ["test_several_devices.py"]),
    *([] if IS_SIMULATED and HAS_TWO else ["simcuda"]),
    *(["simt"] if IS_SIMULATED else []),
]
ALL = os.environ.get("WEIGHTALIGN_TESTS") == "all"
if left_out and ALL:
    raise pytest.UsageError(f"WEIGHTALIGN_TESTS=all, but packages are not installed: {left_out}")

if importlib.util.find_spec("hypothesis"):
    from hypothesis import HealthCheck, settings

    # Fixtures are not reset between examples: the backend should stay the same.
    quiet = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}
    # The same examples every time; `make fuzz`, which selects the other profile, draws others and many more, after
    # those that failed before.
    settings.register_profile("same", derandomize=True, max_examples=30, **quiet)
    most = int(os.environ.get("WEIGHTALIGN_FUZZ_EXAMPLES", 1_000_000))
    settings.register_profile("fuzz", max_examples=most, print_blob=True, **quiet)
    settings.load_profile("same")


def pytest_configure(config):
    if not ALL and not config.option.markexpr:
        config.option.markexpr = "not slow"


def pytest_collection_modifyitems(config, items):
    """Marks what runs on the device. On a simulated one, all else is left out: it runs where there is none."""
    for item in items:
        fixtures = {"device", "backend", "any_backend", "fuzzed", "native", "ops"} & set(item.fixturenames)
        is_about = item.path.name in ("test_cuda.py", "test_several_devices.py") or item.path.parent.name == "simcuda"
        if fixtures or is_about:
            item.add_marker("device")
    if IS_SIMULATED:
        out = [item for item in items if item.originalname in NOT_SIMULATED or not item.get_closest_marker("device")]
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in set(out)]


def pytest_terminal_summary(terminalreporter):
    if terminalreporter.config.option.markexpr == "not slow":
        terminalreporter.write_line("left out: slow tests, which -m slow or WEIGHTALIGN_TESTS=all runs")
    if count := sum(map(examples_of, itertools.chain(*terminalreporter.stats.values()))):
        terminalreporter.write_line(f"{count} examples of the Hypothesis tests")
    if DEVICE == "cpu":
        terminalreporter.write_line(
            "left out: tests/test_cuda.py, because torch sees no CUDA device: make simulated-gpu"
        )
    elif not HAS_TWO:
        terminalreporter.write_line("left out: tests/test_several_devices.py, because there is one CUDA device")
    if IS_SIMULATED:
        terminalreporter.write_line("left out: tests that use no device")
        for name, reason in NOT_SIMULATED.items():
            terminalreporter.write_line(f"left out: {name}: {reason}")
    for name, absent in left_out.items():
        terminalreporter.write_line(f"left out: tests/{name}, because {', '.join(absent)} is not installed")


def examples_of(report):
    """How many a Hypothesis test ran, in its last report: the earlier ones do not have the number yet."""
    return dict(report.user_properties).get("examples", 0) if getattr(report, "when", None) == "teardown" else 0


@pytest.fixture(autouse=IS_SIMULATED)
def memory_is_returned(request):
    """No test leaves device memory behind. A device's thread of autograd drops what it holds after the backward has
    returned, or failed, and cannot while this one keeps the interpreter busy."""
    before = _allocated()
    yield
    if _allocated() > before:
        request.node.funcargs.clear()
        if "weightalign_cuda.ops.triton.launch" in sys.modules:  # keeps tables for later calls
            sys.modules["weightalign_cuda.ops.triton.launch"]._cached.cache_clear()
        gc.collect()
        deadline = time.monotonic() + 10
        while _allocated() > before and time.monotonic() < deadline:
            time.sleep(0.01)
            gc.collect()
        assert _allocated() <= before


def _allocated():
    return sum(torch.cuda.memory_allocated(device) for device in range(torch.cuda.device_count()))


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


@pytest.fixture(params=[pytest.param(b, marks=[pytest.mark.slow] if b in RARE else []) for b in ALL_BACKENDS])
def fuzzed(request):
    """Like `any_backend`, of which the slow ones are left to `make fuzz` and CI."""
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


@pytest.fixture(scope="session")
def in_two_processes():
    with in_processes(2) as run:
        yield run


@pytest.fixture(scope="session")
def in_four_processes():
    with in_processes(4) as run:
        yield run


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
    monkeypatch.setitem(harness.REPEATS, "cpu", dataclasses.replace(harness.REPEATS["cpu"], sets=2))
