"""What only a GPU can show: capture in CUDA graphs, no synchronisation with the host, streams."""

import pytest
import torch
from truth import BF16, check_align, formula, normal

import weightalign_cuda as wa


def leaves():
    shapes = (8, 3, 3, 3), (16, 8, 1, 1), (5, 1000)
    weights = [normal(*s, seed=i, device="cuda").requires_grad_() for i, s in enumerate(shapes)]
    return weights, [normal(w.shape[0], seed=9, device="cuda").requires_grad_() for w in weights]


def step(weights, gains, image):
    """Gradients of all leaves through align_foreach, align and conv2d."""
    aligned = wa.align_foreach(weights, gains)
    output = wa.conv2d(image, weights[0], gain=gains[0], padding=1, padding_mode="reflect", activation="relu")
    loss = sum(a.sin().sum() for a in (*aligned, wa.align(weights[2]), output))
    return torch.autograd.grad(loss, weights + gains)


def test_cuda_graph(backend):
    """Captured once, replayed on other numbers."""
    weights, gains = leaves()
    image = normal(2, 3, 8, 8, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(weights, gains, image)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(weights, gains, image)
    with torch.no_grad():
        for leaf in (*weights, *gains, image):
            leaf.mul_(1.5).add_(0.25)
    graph.replay()
    for found, expected in zip(captured, step(weights, gains, image), strict=True):
        assert torch.equal(found, expected)


def test_no_synchronisation_with_the_host(backend):
    weights, gains = leaves()
    image = normal(2, 3, 8, 8, device="cuda")
    step(weights, gains, image)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            step(weights, gains, image)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_runs_on_the_current_stream(backend):
    """A weight that is still being written on that stream."""
    weight = normal(512, 4608, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        late = weight * 2 + 1
        aligned = wa.align(late, dtype=BF16)
    torch.cuda.synchronize()
    torch.testing.assert_close(aligned.double(), formula(late.double()), rtol=2**-8, atol=2**-12)


@pytest.mark.parametrize("device", [f"cuda:{i}" for i in range(torch.cuda.device_count())])
def test_each_device_whichever_is_current(backend, device):
    check_align(normal(4, 9, device=device), normal(4, seed=1, device=device))
