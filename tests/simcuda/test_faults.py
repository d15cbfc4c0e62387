"""What a device does wrong, or others do: memory runs out, a launch fails, errors left behind, no device at all."""

import subprocess
import sys
import threading

import pytest
import simcuda
import torch
from truth import check_align, normal

import weightalign_cuda as wa

INVALID_CONFIGURATION, INSUFFICIENT_RESOURCES, ILLEGAL_ADDRESS = 9, 701, 700
MB = 1 << 20


@pytest.fixture(autouse=True)
def runtime():
    library = simcuda.runtime()
    yield library
    library.simcuda_leave_memory(-1)
    library.simcuda_fail_launch(-1, 0)
    torch.cuda.synchronize()


def python(code, **settings):
    """Runs code in a process with other devices."""
    environment = simcuda.environment(**settings)
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("fits", [0, 1, 2])
def test_memory_runs_out_within_a_list(runtime, with_grad, fits):
    """12 MB each, which torch's allocator takes from the device one by one."""
    weights = [normal(64, 49152, seed=i, device="cuda") for i in range(3)]
    for weight in weights:
        weight.requires_grad_(with_grad)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    runtime.simcuda_leave_memory(fits * 12 * MB + 4 * MB)
    launches = runtime.simcuda_launches()
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        wa.align_foreach(weights)
    assert (torch.cuda.memory_allocated(), runtime.simcuda_launches()) == (before, launches)
    runtime.simcuda_leave_memory(-1)
    wa.align_foreach(weights)
    assert runtime.simcuda_launches() == launches + 1


def test_memory_runs_out_in_the_backward(runtime):
    weights = [normal(64, 49152, seed=i, device="cuda").requires_grad_() for i in range(2)]
    aligned = wa.align_foreach(weights)
    grads = [torch.ones_like(a) for a in aligned]
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    runtime.simcuda_leave_memory(14 * MB)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        torch.autograd.grad(aligned, weights, grads, retain_graph=True)
    assert torch.cuda.memory_allocated() == before
    runtime.simcuda_leave_memory(-1)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(aligned, weights, grads))


@pytest.mark.parametrize("device", [f"cuda:{i}" for i in range(torch.cuda.device_count())])
def test_launch_fails(runtime, device):
    weight = normal(4, 3, 3, 3, device=device).requires_grad_()
    image = normal(1, 3, 6, 6, device=device).requires_grad_()
    for name, run in {
        "align": lambda: wa.align(weight),
        "prepare": lambda: wa.conv2d(image, weight, padding=1, padding_mode="reflect"),
    }.items():
        runtime.simcuda_fail_launch(0, INSUFFICIENT_RESOURCES)
        with pytest.raises(RuntimeError, match=rf"::{name}_forward on {device}: .* too many resources") as error:
            run()
        assert "earlier kernel" not in str(error.value)
        result = run()
        torch.cuda.synchronize()
        runtime.simcuda_fail_launch(0, INSUFFICIENT_RESOURCES)
        with pytest.raises(RuntimeError, match=rf"::{name}_backward on {device}: .* too many resources"):
            result.backward(torch.ones_like(result), retain_graph=True)
        result.backward(torch.ones_like(result))
    check_align(weight.detach())


def test_second_launch_of_a_call_fails(runtime):
    """More weights than a launch's table has place for."""
    weights = [normal(1, 4, seed=i, device="cuda") for i in range(500)]
    launches = runtime.simcuda_launches()
    runtime.simcuda_fail_launch(1, INVALID_CONFIGURATION)
    with pytest.raises(RuntimeError, match="invalid configuration"):
        wa.align_foreach(weights)
    assert runtime.simcuda_launches() == launches + 1
    for weight, aligned in zip(weights, wa.align_foreach(weights), strict=True):
        torch.testing.assert_close(aligned, wa.align(weight))


def test_an_earlier_kernel_failed(runtime):
    """As a device reports it: for whatever is launched next."""
    runtime.simcuda_fail_launch(0, ILLEGAL_ADDRESS)
    with pytest.raises(RuntimeError, match=r"illegal memory access.*may be an earlier kernel.*CUDA_LAUNCH_BLOCKING"):
        wa.align(normal(4, 9, device="cuda"))


def test_error_that_others_left_is_not_ours(runtime):
    weight = normal(4, 9, device="cuda")
    torch.cuda.synchronize()
    runtime.simcuda_leave_error(INVALID_CONFIGURATION)
    options = [0.1], [1.5], weight.dtype, torch.preserve_format
    with torch.no_grad():
        aligned = torch.ops.weightalign_cuda.align_forward([weight], [None], *options)
    assert runtime.cudaGetLastError() == INVALID_CONFIGURATION  # still there for those whose it is
    torch.testing.assert_close(aligned[0][0].cpu(), wa.align(weight.cpu(), eps=0.1, scale=1.5))


def test_a_kernel_fails_later(runtime):
    """The error comes from the call that waits; then the device works again."""
    index = torch.tensor([7], device="cuda")
    torch.ones(3, device="cuda")[index]
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        torch.cuda.synchronize()
    check_align(normal(4, 9, device="cuda"))


STATE = "import weightalign_cuda as wa; print(wa.backends()['cuda'])"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"devices": 0}, "sees no CUDA device"),
        ({"driver": 12080}, "CUDA"),
        ({"capability": 70}, "cuda:0 is sm_70, the native library has sm_"),
        ({"capability": 103}, "available"),
        ({"capability": 125}, "available"),
    ],
)
def test_devices_that_do_not_serve(settings, expected):
    done = python(STATE, **settings)
    assert (done.returncode, expected in done.stdout) == (0, True), done.stdout + done.stderr


def test_parameters_beyond_4_kb_on_an_old_driver():
    """With kernels of CUDA 12.0, whose drivers do not take them. Those of CUDA 13 refuse the driver before."""
    done = python("""
import simcuda, torch, weightalign_cuda as wa
weights = [torch.full((4, 9), float(i), device="cuda").cos_() for i in range(40)]
wa.align(weights[0])  # the device serves
simcuda.runtime().simcuda_set_driver(12000)
before = simcuda.runtime().simcuda_launches()
aligned = wa.align_foreach(weights)
print(simcuda.runtime().simcuda_launches() - before)
torch.testing.assert_close(aligned[-1], wa.align(weights[-1]))
""")
    assert (done.returncode, done.stdout.split()) == (0, ["3"]), done.stderr


ALIGN = """
import torch, weightalign_cuda as wa
weight = torch.arange(36.0).view(4, 9).sin()
print([wa.align(weight).sum().isfinite().item(), torch.cuda.is_available()])
if torch.cuda.is_available():
    torch.testing.assert_close(wa.align(weight.cuda()).cpu(), wa.align(weight))
"""


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"devices": 0}, "[True, False]"), ({"driver": 12080}, "[True, False]"), ({"capability": 70}, "[True, True]")],
)
def test_work_on_devices_that_do_not_serve(settings, expected):
    """On the CPU; or on the device by Triton or the reference."""
    done = python(ALIGN, **settings)
    assert (done.returncode, done.stdout.strip()) == (0, expected), done.stderr


def test_fork_before_the_first_cuda_call():
    """Import and CPU calls do not initialise CUDA, so that a child can."""
    done = python(f"""
import os, torch, weightalign_cuda as wa
wa.align(torch.ones(4, 9))
if os.fork() == 0:
    {ALIGN.strip().replace(chr(10), chr(10) + "    ")}
    os._exit(0)
print(os.waitstatus_to_exitcode(os.wait()[1]))
""")
    assert done.stdout.split()[-1] == "0", done.stderr


def test_fork_after_it():
    done = python("""
import os, torch, weightalign_cuda as wa
wa.align(torch.ones(4, 9, device="cuda"))
if os.fork() == 0:
    wa.align(torch.ones(4, 9))
    try:
        wa.align(torch.ones(4, 9, device="cuda"))
    except RuntimeError as error:
        print(error)
    os._exit(0)
os.wait()
""")
    assert "Cannot re-initialize CUDA in forked subprocess" in done.stdout or done.returncode == 0, done.stderr


def test_first_call_within_a_capture():
    """In a new process, where the kernels were never launched before, and autograd's device thread never ran."""
    done = python("""
import torch, weightalign_cuda as wa
weight = torch.arange(36.0).view(4, 9).sin().cuda().requires_grad_()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    aligned = wa.align(weight)
    (grad,) = torch.autograd.grad(aligned.sin().sum(), weight)
graph.replay()
expected = wa.align(weight)
torch.testing.assert_close(aligned, expected)
torch.testing.assert_close(grad, torch.autograd.grad(expected.sin().sum(), weight)[0])
print("captured")
""")
    assert done.stdout.strip() == "captured", done.stderr


def on_a_stream(i, found):
    device = torch.device("cuda", i % torch.cuda.device_count())
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream()):
        weight = normal(8, 27, seed=i).to(device).requires_grad_()
        for _ in range(5):
            aligned = wa.align(weight * (i + 1), eps=0.1 + i, scale=1 + i)
            (grad,) = torch.autograd.grad(aligned.sin().sum(), weight)
        found[i] = aligned.detach().cpu(), grad.cpu()


def test_threads_on_several_streams_and_devices():
    found = {}
    threads = [threading.Thread(target=on_a_stream, args=(i, found)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(8):
        weight = normal(8, 27, seed=i).requires_grad_()
        aligned = wa.align(weight * (i + 1), eps=0.1 + i, scale=1 + i)
        (grad,) = torch.autograd.grad(aligned.sin().sum(), weight)
        torch.testing.assert_close(found[i], (aligned.detach(), grad))
