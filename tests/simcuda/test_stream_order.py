"""Filters that are made on one stream and used on another: right in every legal order of the streams' work. Without a
wait, or if memory is given back too early, some order gives wrong numbers."""

import gc

import pytest
import simcuda
import torch
from torch import nn
from truth import normal

import weightalign_cuda as wa

SEEDS = range(12)  # 0: every work as late as it may be


@pytest.fixture(autouse=True)
def as_late_as_it_may():
    yield
    simcuda.runtime().simcuda_seed(0)
    torch.cuda.synchronize()


def network():
    torch.manual_seed(0)
    layers = [wa.WAConv2d(3, 8, 3, eps=0.2, scale=1.3), nn.ReLU(), wa.WAConv2d(8, 8, 3, scale=0.7)]
    return nn.Sequential(*layers).cuda()


def begin(seed):
    """New memory is NaN; old memory might still hold the right numbers."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    simcuda.runtime().simcuda_seed(seed)


def end(side):
    """Overwrites the memory that the current stream's allocator has been given back, then lets the other stream end."""
    gc.collect()
    blocks = [torch.full((n,), 7.0, device="cuda") for n in (216, 576, 864, 4000, 8000) for _ in range(6)]
    torch.cuda.current_stream().synchronize()
    side.synchronize()
    del blocks


def frozen_outputs(seed):
    """Aligned on the current stream, used on another one, and dropped while that one may still be at work."""
    model, image = network().eval(), normal(2, 3, 8, 8, device="cuda")
    with torch.no_grad():
        expected = model(image)
        begin(seed)
        side = torch.cuda.Stream()
        with wa.frozen(model):
            for layer in (model[0], model[2]):
                layer.aligned_filters()
            with torch.cuda.stream(side):
                output = model(image)
        end(side)
    return output, expected


def foreach_outputs(seed):
    """One forward's filters, aligned on the current stream when the first layer asks for them."""
    model, image = wa.convert(network(), foreach=True), normal(2, 3, 8, 8, device="cuda")
    side = torch.cuda.Stream()

    def forward(image):
        model[0].aligned_filters()
        with torch.cuda.stream(side):
            return nn.Sequential.forward(model, image)

    with torch.no_grad():
        expected = model(image)
        begin(seed)
        model.forward = forward
        output = model(image)
        end(side)
    return output, expected


SCENARIOS = {"frozen": frozen_outputs, "foreach": foreach_outputs}


def wrong_seeds(scenario):
    """The seeds whose order of work gives wrong numbers."""
    wrong = []
    for seed in SEEDS:
        output, expected = SCENARIOS[scenario](seed)
        simcuda.runtime().simcuda_seed(0)
        torch.cuda.synchronize()
        if not torch.allclose(output.cpu(), expected.cpu(), rtol=1e-5, atol=1e-6):
            wrong.append(seed)
    return wrong


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_right_in_every_order(scenario):
    assert wrong_seeds(scenario) == []


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_missing_wait_is_seen(scenario, monkeypatch):
    monkeypatch.setattr(torch.cuda.Stream, "wait_event", lambda *_: None)
    assert wrong_seeds(scenario)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_missing_record_stream_is_seen(scenario, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    assert wrong_seeds(scenario)


def test_the_seed_decides_on_the_order():
    """A race of two streams without any wait."""
    streams = torch.cuda.Stream(), torch.cuda.Stream()

    def winner(seed):
        x = torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
        simcuda.runtime().simcuda_seed(seed)
        for value, stream in enumerate(streams, start=1):
            with torch.cuda.stream(stream):
                x.fill_(value)
        torch.cuda.synchronize()
        return x.item()

    winners = [winner(seed) for seed in range(1, 20)]
    assert set(winners) == {1, 2}
    assert winners == [winner(seed) for seed in range(1, 20)]


def test_accumulated_gradients_on_two_streams():
    model, image = network(), normal(2, 3, 8, 8, device="cuda")
    expected = torch.autograd.grad(model(image).square().sum(), list(model.parameters()))
    side = torch.cuda.Stream()
    for seed in SEEDS:
        model.zero_grad()
        torch.cuda.synchronize()
        simcuda.runtime().simcuda_seed(seed)
        with wa.accumulate(model):
            for stream in (side, torch.cuda.current_stream(), side):
                with torch.cuda.stream(stream):
                    model(image).square().sum().backward()
                torch.cuda.current_stream().wait_stream(side)
                side.wait_stream(torch.cuda.current_stream())
        for parameter, grad in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, 3 * grad, rtol=1e-4, atol=1e-5)
