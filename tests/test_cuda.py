"""What only a GPU can show: CUDA graphs, no synchronisation with the host, streams."""

import pytest
import torch
from count_ops import CountOps
from torch import nn
from torch.utils.checkpoint import checkpoint
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
    """Captured once, replayed on other values."""
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


def network():
    torch.manual_seed(0)
    layers = [wa.WAConv2d(3, 8, 3, padding=1, eps=0.2, scale=1.3), nn.ReLU(), wa.WAConv2d(8, 8, 3, scale=0.7)]
    return nn.Sequential(*layers).cuda()


@pytest.mark.parametrize("is_warm", [True, False])
def test_graph_captured_inside_of_frozen(backend, is_warm):
    """Replayed after the context, when its filters' memory has been reused; with eager forwards in between."""
    model, image = network().eval(), normal(2, 3, 8, 8, device="cuda")
    with torch.no_grad():
        expected = model(image)
        with wa.frozen(model):
            if is_warm:
                model(image)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = model(image)
            torch.testing.assert_close(model(image), expected)
        taken = [torch.full((n,), 7.0, device="cuda") for n in (216, 576) for _ in range(4)]
        graph.replay()
        torch.testing.assert_close(output, expected)
        model[0].gain.mul_(2)
        graph.replay()
        torch.testing.assert_close(output, model(image))
    del taken


def test_graph_captured_inside_of_accumulate(backend):
    """If only part of it were captured, that part would be added once, whatever is replayed."""
    model, image = network(), normal(2, 3, 8, 8, device="cuda")
    with pytest.raises(RuntimeError, match="capture all of the context, or none of it"), wa.accumulate(model):
        model(image).sum().backward()
        torch.cuda.synchronize()
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            model(image)


@pytest.fixture
def late():
    """Runs a model on a stream that waits only for its filters, which are still being made on the current one."""
    side = torch.cuda.Stream()

    def run(model, image, forward=nn.Sequential.forward):
        torch.cuda.synchronize()
        torch.cuda._sleep(50_000_000)
        for layer in (model[0], model[2]):
            layer.aligned_filters()
        with torch.cuda.stream(side):
            output = forward(model, image)
        torch.cuda.current_stream().wait_stream(side)
        return output

    return run


def test_filters_of_frozen_on_another_stream(backend, late):
    model, image = network().eval(), normal(2, 3, 8, 8, device="cuda")
    with torch.no_grad():
        expected = model(image)
        with wa.frozen(model):
            torch.testing.assert_close(late(model, image), expected)


def recomputed(model, image):
    return checkpoint(nn.Sequential.forward, model, image, use_reentrant=False)


@pytest.mark.parametrize("context", ["foreach", "recomputed", "accumulate"])
def test_filters_and_gradients_on_another_stream(backend, late, context):
    """Gradients of accumulate are summed on both."""
    model, image = network(), normal(2, 3, 8, 8, device="cuda")
    expected = torch.autograd.grad(model(image).square().sum(), list(model.parameters()))
    if context == "accumulate":
        with wa.accumulate(model):
            for run in (late, nn.Sequential.forward, late):
                run(model, image).square().sum().backward()
    else:
        wa.convert(model, foreach=True)
        model.forward = lambda image: late(model, image, *([recomputed] if context == "recomputed" else []))
        model(image).square().sum().backward()
    torch.cuda.synchronize()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        times = 3 if context == "accumulate" else 1
        torch.testing.assert_close(parameter.grad, times * grad, rtol=1e-4, atol=1e-5)


def test_backend_of_recomputation(backend):
    """In autograd's thread for the backward of CUDA tensors."""
    weight = normal(4, 9, device="cuda").requires_grad_()
    with CountOps() as ops:
        checkpoint(lambda w: wa.align(w).sin(), weight, use_reentrant=False).sum().backward()
    assert set(ops.calls) <= ({"align_forward", "align_backward"} if backend != "reference" else set())


@pytest.mark.parametrize("place", [0, 3])
def test_backward_of_tensors_on_another_device(ops, place):
    weights = [normal(4, 9, device="cuda")]
    aligned, statistics = ops.align_forward(weights, [None], [0.1], [1.5], torch.float32, torch.preserve_format)
    arguments = [aligned, weights, [None], statistics, [1.5]]
    arguments[place] = [aligned[0].cpu()] if place == 0 else statistics.cpu()
    with pytest.raises(RuntimeError, match=r"(grads|statistics): want"):
        ops.align_backward(*arguments)
