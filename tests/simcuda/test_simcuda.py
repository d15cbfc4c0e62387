"""What the simulated devices do, as the real ones would."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_copies(dtype):
    x = torch.arange(24, dtype=dtype).view(2, 3, 4)
    for there in (x.cuda(), x.cuda().transpose(0, 2), x.cuda(1)[:, ::2], x.pin_memory().cuda(non_blocking=True)):
        assert torch.equal(there.cpu(), there.to("cuda:1").to("cuda:0").cpu())
        assert torch.equal(there.double().cpu(), there.cpu().double())


def test_results_are_those_of_the_cpu():
    torch.manual_seed(0)
    model, x, y = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5)),
        torch.randn(2, 3, 8, 8),
        torch.tensor([1, 3]),
    )
    losses = []
    for device in ("cpu", "cuda:1"):
        model.to(device).zero_grad()
        loss = F.cross_entropy(model(x.to(device)), y.to(device))
        losses.append([loss.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(loss, list(model.parameters())))])
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


def test_in_place_out_and_resized():
    x, out = torch.arange(4.0).cuda(), torch.empty(0, device="cuda")
    address = x.data_ptr()
    x.add_(1)[2:].mul_(10)
    torch.add(x, 1, out=out)
    torch._foreach_add_([x, out], 1)
    assert (x.tolist(), out.tolist()) == ([2, 3, 31, 41], [3, 4, 32, 42]) and x.data_ptr() == address


def test_random_numbers_follow_the_devices_generator():
    torch.cuda.manual_seed(1)
    state, cpu = torch.cuda.get_rng_state(), torch.get_rng_state()
    first, second = torch.randn(5, device="cuda"), torch.randn(5, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(first, torch.randn(5, device="cuda")) and not torch.equal(first, second)
    assert torch.equal(cpu, torch.get_rng_state())


@pytest.mark.parametrize("other", ["cpu", "cuda:1"])
def test_devices_do_not_mix(other):
    with pytest.raises(RuntimeError, match="on the same device"):
        torch.ones(2, device="cuda:0") + torch.ones(2, device=other)


def test_a_stream_that_does_not_wait_sees_nothing():
    x = torch.zeros(4, device="cuda")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        x.fill_(1)
    seen = x.tolist()  # of the current stream, which did not wait
    torch.cuda.current_stream().wait_stream(side)
    assert (seen, x.tolist()) == ([0.0] * 4, [1.0] * 4)


def test_graph():
    x = torch.ones(4, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = (x * 2).relu_() + 1
        x.add_(1)
    assert x.tolist() == [1.0] * 4
    graph.replay()
    graph.replay()
    assert (x.tolist(), y.tolist()) == ([3.0] * 4, [5.0] * 4)


def test_synchronisation_breaks_a_capture():
    x = torch.ones(4, device="cuda")
    with pytest.raises(RuntimeError, match="captur"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.sum().item()


def test_synchronisation_is_told():
    x = torch.ones(4, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for wait in (x.nonzero, lambda: x[x > 0], x[0].item, x.cpu):
            with pytest.raises(RuntimeError, match="synchroniz"):
                wait()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_kernel_that_is_not_simulated():
    with pytest.raises(RuntimeError, match="no kernel image"):
        torch._fused_dropout(torch.ones(4, device="cuda"), 0.5)


def test_memory_runs_out():
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1 << 40, dtype=torch.uint8, device="cuda")


def test_memory_is_not_the_hosts():
    code = "import ctypes, torch; ctypes.string_at(torch.ones(4, device='cuda').data_ptr(), 4)"
    strict = {**os.environ, "SIMCUDA_STRICT": "1"}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=strict, capture_output=True).returncode == -11
