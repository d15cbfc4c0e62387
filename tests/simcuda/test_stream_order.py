"""Filters that are made on one stream and used on another: right in every legal order of the streams' work. Without a
wait, or if memory is given back too early, some order gives wrong numbers."""

import contextlib
import gc

import pytest
import simcuda
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from truth import normal

import weightalign_cuda as wa
from weightalign_cuda.model.streams import ReadyEvent

LATE, LATE_HERE = 0, 1  # every work as late as it may be; those of the current stream last
SEEDS = range(12)


@pytest.fixture(autouse=True)
def as_late_as_it_may():
    gc.freeze()  # `end` then looks at new objects alone
    yield
    gc.unfreeze()
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
    simcuda.runtime().simcuda_seed(seed if seed != LATE_HERE else 0)


def end(seed, side):
    """Overwrites the memory that the current stream's allocator has been given back, then lets both streams end."""
    gc.collect()
    blocks = [torch.full((n,), 7.0, device="cuda") for n in (32, 216, 576, 864, 4000, 8000) for _ in range(40)]
    streams = torch.cuda.current_stream(), side
    for stream in reversed(streams) if seed == LATE_HERE else streams:
        stream.synchronize()
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
        end(seed, side)
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
        end(seed, side)
    return output, expected


def accumulated_gradients(seed):
    """Sums of the current stream, turned into gradients on another one that has waited for nothing."""
    model, image = network(), normal(2, 3, 8, 8, device="cuda")
    aligned = [p for layer in (model[0], model[2]) for p in (layer.weight, layer.gain)]
    grads = torch.autograd.grad(model(image).square().sum(), aligned)
    begin(seed)
    side = torch.cuda.Stream()
    with contextlib.ExitStack() as context:
        context.enter_context(wa.accumulate(model))
        for _ in range(2):
            model(image).square().sum().backward()
        with torch.cuda.stream(side):
            context.close()
    end(seed, side)
    return flat(p.grad for p in aligned), 2 * flat(grads)


def sharded_gradients(seed):
    """Filters are aligned on one stream of FSDP2's, their gradients reduced on another; the rest may be left to the
    stream of the backward. FSDP2's own waits would hide a missing one: its calls are made here."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    plain, model = network(), wa.fully_shard(network(), mesh=init_device_mesh("cuda", (1,)))
    layers = plain[0], plain[2]
    aligned = [layer.align_filters() for layer in layers]
    outside = [normal(*t.shape, seed=i, device="cuda") for i, t in enumerate(aligned)]
    expected = torch.autograd.grad(aligned, [p for x in layers for p in (x.weight, x.gain)], outside)
    group = model[0].aligned_by.member.group
    begin(seed)
    gathering, reducing = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(gathering):
        for member in group.members:
            group.filters_of(member, None)
    with torch.cuda.stream(reducing):
        for member, grad in zip(group.members, outside, strict=True):
            group.reduced[member] = grad.clone(), ReadyEvent(grad.device)
    group.deliver()
    group.alignments.clear()
    current = torch.cuda.current_stream()
    with torch.cuda.stream(gathering):  # whose allocator is given back the statistics
        end(seed, current)
    return flat(p.grad.to_local() for x in (model[0], model[2]) for p in (x.weight, x.gain)), flat(expected)


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


SCENARIOS = {
    "frozen": frozen_outputs,
    "foreach": foreach_outputs,
    "accumulate": accumulated_gradients,
    "fully_shard": sharded_gradients,
}


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
    monkeypatch.setattr(ReadyEvent, "wait", lambda *_: None)
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

    winners = [winner(seed) for seed in range(1, 100)]
    assert set(winners) == {1, 2}
    assert winners == [winner(seed) for seed in range(1, 100)]
