"""The choice of backend: per thread, kept for the backward, without side effects; and the reasons given."""

import re
import sys
import threading

import pytest
import torch
from count_ops import CountOps
from truth import normal

import weightalign_cuda as wa
from weightalign_cuda.ops import backend as ops_backend
from weightalign_cuda.ops.native_library import Library

ALL = (75, 80, 90, 100, 120)


def served_by_op(weight):
    with CountOps() as ops:
        wa.align(weight)
    return bool(ops.calls)


def test_names_and_states():
    assert list(wa.backends()) == ["cuda", "cpu", "triton", "reference"]
    assert wa.backends()["reference"] == "available"
    assert all(isinstance(state, str) and state for state in wa.backends().values())


def test_native_backend_is_the_default(device):
    assert ops_backend.choose(device) == device
    assert served_by_op(normal(4, 9, device=device))
    assert ops_backend.choose("meta") == "reference"


def test_nesting(device):
    weight = normal(4, 9, device=device)
    with wa.use_backend("reference"):
        assert not served_by_op(weight)
        with wa.use_backend(device):
            assert served_by_op(weight)
            with pytest.raises(KeyError), wa.use_backend("reference"):
                raise KeyError
            assert served_by_op(weight)
        assert not served_by_op(weight)
    assert served_by_op(weight)


def test_choice_is_per_thread(device):
    """Two threads inside `use_backend` at once, and this one outside. Of one that is started inside Python decides:
    free-threaded ones begin in the context of the thread that starts them."""
    weight = normal(4, 9, device=device)
    served, both_inside = {}, threading.Barrier(3)

    def run(name):
        with wa.use_backend(name):
            both_inside.wait(30)
            served[name] = served_by_op(weight)
            both_inside.wait(30)

    threads = [threading.Thread(target=run, args=(name,)) for name in (device, "reference")]
    for thread in threads:
        thread.start()
    with wa.use_backend("reference"):
        inside = threading.Thread(target=lambda: served.update(inside=served_by_op(weight)))
        inside.start()
        inside.join()
    both_inside.wait(30)
    served["outside"] = served_by_op(weight)
    both_inside.wait(30)
    for thread in threads:
        thread.join()
    inherits = getattr(sys.flags, "thread_inherit_context", False)
    assert served == {device: True, "reference": False, "outside": True, "inside": not inherits}


def test_choice_is_carried_to_backward_threads(device):
    """Autograd's threads for CUDA tensors start with torch's thread-local state, but without context variables."""
    found = {}
    with wa.use_backend("reference"), wa.use_backend(device), wa.use_backend("reference"):
        carried = torch._C._get_obj_in_tls("weightalign_backend")

    def backward():
        torch._C._stash_obj_in_tls("weightalign_backend", carried)
        found["there"] = ops_backend.choose(device)
        with wa.use_backend(device):
            found["inside"] = ops_backend.choose(device)
        found["after"] = ops_backend.choose(device)

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert found == {"there": "reference", "inside": device, "after": "reference"}
    assert ops_backend.choose(device) == device


@pytest.mark.parametrize("forward_by_op", [True, False])
def test_backward_uses_the_choice_of_its_forward(device, forward_by_op):
    names = (device, "reference") if forward_by_op else ("reference", device)
    weight = normal(4, 9, device=device).requires_grad_()
    with wa.use_backend(names[0]):
        aligned = wa.align(weight)
    with wa.use_backend(names[1]), CountOps() as ops:
        aligned.sum().backward()
    assert ops.calls == ({"align_backward": 1} if forward_by_op else {})


def test_forced_cuda_on_cpu_tensors():
    state = wa.backends()["cuda"]
    reason = "it does not serve tensors on 'cpu'" if state == "available" else re.escape(state)
    for run in (lambda: wa.align(normal(4, 9)), lambda: wa.align_foreach([normal(4, 9)])):
        with (
            wa.use_backend("cuda"),
            pytest.raises(RuntimeError, match=f"^backend 'cuda' was asked for, but:? {reason}$"),
        ):
            run()


def test_forced_cpu_on_other_tensors():
    with (
        wa.use_backend("cpu"),
        pytest.raises(RuntimeError, match=r"'cpu' was asked for, but it does not serve .* 'meta'"),
    ):
        wa.align(normal(4, 9, device="meta"))


@pytest.fixture
def plant(monkeypatch):
    """Replaces the states of the backends."""

    def plant(**states):
        monkeypatch.setattr(ops_backend, "state", lambda name: states.get(name, "available"))
        monkeypatch.setattr(ops_backend, "_known", {})

    return plant


def test_default_backend_of_each_device(plant):
    plant()
    assert [ops_backend.choose(device) for device in ("cuda", "cpu", "meta")] == ["cuda", "cpu", "reference"]
    plant(cuda="no nvcc")
    assert [ops_backend.choose(device) for device in ("cuda", "cpu")] == ["triton", "cpu"]
    plant(cuda="no nvcc", triton="not installed", cpu="not built")
    assert [ops_backend.choose(device) for device in ("cuda", "cpu")] == ["reference", "reference"]


def test_unavailable_backend_never_falls_back(plant):
    plant(cpu="broken: mend it")
    with (
        wa.use_backend("cpu"),
        pytest.raises(RuntimeError, match=r"^backend 'cpu' was asked for, but: broken: mend it$"),
    ):
        wa.align(normal(4, 9))
    assert ops_backend.choose("cpu") == "reference"


@pytest.mark.parametrize(
    ("compiled", "ptx", "serves", "serves_not"),
    [
        (ALL, (100, 120), (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121, 130), (50, 61, 70, 72)),
        ((80,), (80,), (80, 86, 89, 90, 120), (70, 75)),  # beyond 8.x: PTX
        ((90,), (90,), (90, 100), (80, 89)),
        ((75, 100), (100,), (75, 100, 103, 120), (80, 90)),
        ((75, 90), (75,), (75, 80, 90, 100), (70,)),
        ((86, 90), (90,), (86, 89, 90), (75, 80)),  # machine code never serves an older minor version
    ],
    ids=str,
)
def test_architectures_that_a_library_supports(monkeypatch, compiled, ptx, serves, serves_not):
    monkeypatch.setattr(ops_backend, "library", Library(architectures=compiled, ptx=ptx))
    assert [c for c in sorted((*serves, *serves_not)) if ops_backend._runs_on(c)] == list(serves)


@pytest.fixture
def cuda_machine(monkeypatch):
    """Two devices, sm_90 and one more, with a given library and driver."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def plant(architectures=ALL, runtime=13000, driver=13000, second=(7, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(9, 0), second][device])
        monkeypatch.setattr(ops_backend, "library", Library(None, architectures, (), runtime, lambda: driver))
        return ops_backend._cuda()

    return plant


def test_why_cuda_is_not_available(cuda_machine, monkeypatch):
    assert cuda_machine(architectures=()).startswith("the native library has no CUDA kernels: put nvcc on PATH")
    assert "built with CUDA 13.0, the driver serves up to 12.4: update" in cuda_machine(driver=12040)
    assert "cuda:1 is sm_70, the native library has sm_75, sm_80" in cuda_machine()
    assert cuda_machine().endswith("; the kernels need sm_75 or later")
    assert cuda_machine((75, 90), second=(8, 0)).endswith(": install again with TORCH_CUDA_ARCH_LIST=8.0")
    assert cuda_machine((60, 70, 90)) == "available"
    assert cuda_machine((60, 70, 90), runtime=12080, driver=12020) == "available"  # same major version
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert cuda_machine() == f"torch {torch.__version__} sees no CUDA device"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda_machine() == f"torch {torch.__version__} is a CPU-only build"


@pytest.mark.parametrize(
    ("library", "serving"),
    [({"architectures": ()}, "triton"), ({"driver": 12040}, "triton"), ({"architectures": (70, 90)}, "cuda")],
    ids=["no nvcc", "old driver", "kernels"],
)
def test_triton_serves_cuda_tensors_without_the_kernels(cuda_machine, monkeypatch, library, serving):
    pytest.importorskip("triton")
    reason = cuda_machine(**library)
    monkeypatch.setattr(ops_backend, "_known", {})
    monkeypatch.setattr(ops_backend, "state", ops_backend.state.__wrapped__)
    assert wa.backends()["cuda"] == reason and wa.backends()["triton"] == "available"
    assert (ops_backend.choose("cuda"), ops_backend.choose("cpu")) == (serving, "cpu")


def test_forced_triton(monkeypatch, plant):
    """CPU tensors only if it is interpreted."""
    pytest.importorskip("triton")
    monkeypatch.setattr(ops_backend, "_is_interpreted", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plant(triton=ops_backend._triton())
    with wa.use_backend("triton"), pytest.raises(RuntimeError, match=r"'triton' was asked for, but: .*TRITON"):
        wa.align(normal(4, 9))
    plant()  # a CUDA machine
    with wa.use_backend("triton"), pytest.raises(RuntimeError, match="does not serve tensors on 'cpu'"):
        wa.align(normal(4, 9))
