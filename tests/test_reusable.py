"""Foreach: filters are aligned in the memory of the last forward's if nobody can see that."""

import copy
import pickle
import sys
import threading

import pytest
import torch
from test_direct import needs_torch_2_14
from test_spent import Given
from torch import nn
from torch.profiler import profile
from truth import normal

import weightalign_cuda as wa
from weightalign_cuda.model import foreach
from weightalign_cuda.ops import direct
from weightalign_cuda.ops.reusable import which_are_free

pytestmark = needs_torch_2_14
CHANNELS = 64
INPUT = normal(2, CHANNELS, 5, 5)


class Model(nn.Sequential):
    """Convolutions of 36,864 values, which is worth it, of 4,096, which is not, and of 36,864."""

    def __init__(self, foreach=True):
        super().__init__(
            wa.WAConv2d(CHANNELS, CHANNELS, 3, eps=0.03),
            wa.WAConv2d(CHANNELS, CHANNELS, 1, eps=0.2),
            wa.WAConv2d(CHANNELS, CHANNELS, 3, eps=0.7),
        )
        self[1].register_parameter("gain", None)
        change(self, seed=0)
        wa.convert(self, foreach=foreach)
        self.held = {}

    def forward(self, x):
        """The output, and where the filters of each layer are."""
        places = []
        for layer in self:
            filters = layer.aligned_by()
            with torch.no_grad():
                true = wa.align(layer.weight, layer.gain, eps=layer.eps, dtype=filters.dtype)
            assert torch.equal(filters, true)
            places.append(filters.data_ptr())
            if layer in self.held:
                self.held[layer](filters)
            x = layer(x)
        return x, places


def change(model, seed):
    """Other values, which the filters that follow must show."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(normal(*p.shape, mean=float(p.dim() == 1), std=0.1, seed=10 * seed + i))


def step(model, seed):
    """Where the filters were. Outputs and gradients are those without foreach."""
    change(model, seed)
    alone = copy.deepcopy(model)
    wa.convert(alone, foreach=False)
    for layer in alone:
        layer.aligned_by = layer.align_filters
    outputs, gradients = [], []
    for each in (model, alone):
        output, places = each(INPUT)
        each.zero_grad()
        output.square().mean().backward()
        outputs.append((output.detach(), places))
        gradients += [[p.grad for p in each.parameters()]]
    assert torch.equal(outputs[0][0], outputs[1][0])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    return outputs[0][1]


def test_steps():
    model = Model()
    first = step(model, 1)
    for seed in (2, 3):
        assert step(model, seed)[::2] == first[::2]
    assert [memory is None for memory in model._foreach.memory] == [False, True, False]


@pytest.mark.parametrize("foreach", [2, 3])
def test_buckets(foreach):
    model = Model(foreach)
    first = step(model, 1)
    assert step(model, 2)[::2] == first[::2]


MODES = {"grad": torch.enable_grad, "no grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("before", MODES)
@pytest.mark.parametrize("after", MODES)
def test_modes(before, after):
    model = Model()
    with MODES[before]():
        first = model(INPUT)[1]
    change(model, 1)
    with MODES[after]():
        output, places = model(INPUT)
        assert places[::2] == first[::2]
        assert output.is_inference() == (after == "inference")
        assert output.requires_grad == (after == "grad")
    if after == "grad":
        output.sum().backward()
        assert step(model, 2)[::2] == first[::2]


def test_two_graphs_at_once():
    model = Model()
    (first, places), (second, others) = model(INPUT), model(INPUT)
    assert not {*places[::2]} & {*others[::2]}
    (first - second).sum().backward()
    assert all(p.grad.abs().max() < 1e-4 for p in model.parameters())
    del first, second
    assert step(model, 1)[::2] == others[::2]


HOLDERS = {
    "tensor": lambda t: t,
    "detached": lambda t: t.detach(),
    "view": lambda t: t.detach()[3:5, 1],
    "storage": lambda t: t.untyped_storage(),
    "numpy": lambda t: t.detach().numpy(),
    "dlpack": lambda t: torch.from_dlpack(t.detach()),
    "graph": lambda t: (t * t.detach()).sum(),
    "result's data": lambda t: t.data,
}


def values(held):
    return torch.tensor(held) if isinstance(held, torch.UntypedStorage) else torch.as_tensor(held).detach().clone()


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_held_filters_stay(hold):
    model, held = Model(), []
    model.held[model[0]] = lambda filters: held.append(hold(filters))
    first = step(model, 1)
    model.held.clear()
    before = values(held[0])
    second = step(model, 2)
    assert second[0] != first[0] and second[2] == first[2]
    assert torch.equal(values(held[0]), before)
    assert step(model, 3)[::2] == second[::2]  # memory of its own, from now on


def test_a_debugger_changes_nothing():
    """It reads the local variables of each frame, and so refers to them."""
    model, held, tracer = Model(), [], sys.gettrace()
    model.held[model[0]] = lambda filters: held.append(filters.untyped_storage())

    def read(frame, *_):
        frame.f_locals  # noqa: B018
        return read

    with torch.no_grad():
        first = model(INPUT)[1]
        before = values(held[0])
        change(model, 1)
        sys.settrace(read)
        try:
            second = model(INPUT)[1]
        finally:
            sys.settrace(tracer)
    assert second[0] != first[0] and second[2] == first[2]
    assert torch.equal(values(held[0]), before)


def test_memory_of_others():
    """Shared with another process, resized, or not the results' alone."""
    for spoil in (
        lambda t: t.detach().share_memory_(),
        lambda t: t.untyped_storage().resize_(0),
        lambda t: t.untyped_storage().resize_(2 * t.nbytes),
    ):
        model = Model()
        with torch.no_grad():
            places = model(INPUT)[1]
        spoil(model._foreach.memory[0])
        assert step(model, 1)[2] == places[2]


def test_another_dtype_or_order():
    model = Model()
    step(model, 1)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(INPUT)[1]
        assert model(INPUT)[1][::2] == low[::2]
    first = step(model, 2)
    model.to(memory_format=torch.channels_last)
    assert step(model, 3)[::2] == first[::2]


@pytest.mark.parametrize("i", [0, 2])
def test_other_layers(i):
    model = Model()
    step(model, 1)
    model[i].aligned_by = model[i].align_filters  # no longer together with the others
    first = step(model, 2)
    assert step(model, 3)[2 - i] == first[2 - i]
    assert len(model._foreach.memory) == 2


def test_what_fits():
    weights = [normal(4, 3, 2, seed=i) for i in range(2)]

    def is_used(memory):
        results, *_ = direct.forward(weights, [None] * 2, [0.1, 0.2], [1.0, 2.0], 6, 1, [None, memory])
        for weight, eps, scale, result in zip(weights, (0.1, 0.2), (1.0, 2.0), results, strict=True):
            assert torch.equal(result, wa.align(weight, eps=eps, scale=scale))
        return results[1].data_ptr() == memory.data_ptr()

    assert is_used(torch.empty(4, 3, 2)) and is_used(torch.empty(24)) and is_used(torch.empty(2, 4, 3).mT)
    assert not (is_used(torch.empty(4, 3, 1)) or is_used(torch.empty(5, 3, 2)))
    assert not (is_used(torch.empty(4, 3, 2).bfloat16()) or is_used(torch.empty(4, 3, 2).double()))


def test_wrong_lists_are_declined():
    call = [normal(4, 3)], [None], [0.1], [1.0], 6, 1
    resized = torch.empty(4, 3)
    resized.untyped_storage().resize_(8)
    for memory in ([], [None] * 2, 1, ["a"], [resized]):
        assert direct.forward(*call, memory) is None
    assert direct.forward(*call, [None]) is not None


def test_threads(monkeypatch):
    """A forward on another thread while this one chooses its memory."""
    model, others = Model(), []
    step(model, 1)

    def chosen(memory):
        found = which_are_free(memory)
        monkeypatch.undo()
        thread = threading.Thread(target=lambda: others.append(model(INPUT)))
        thread.start()
        thread.join()
        return found

    monkeypatch.setattr(foreach, "which_are_free", chosen)
    output, places = model(INPUT)
    ((other, other_places),) = others
    assert not {*places[::2]} & {*other_places[::2]}
    (output - other).sum().backward()


def test_copies_and_pickles_have_none():
    model = Model()
    model.held = None
    size = len(pickle.dumps(model))
    model.held = {}
    step(model, 1)
    for p in model.parameters():
        p.grad = None
    model.held = None
    assert len(pickle.dumps(model)) == size
    copied = copy.deepcopy(model)
    assert not hasattr(copied._foreach, "memory")
    model.held = copied.held = {}
    assert step(copied, 2)[0] != step(model, 2)[0]


def test_none_where_it_cannot_be_used(device):
    """On other devices, for small layers alone, and under a profiler, which must see what is allocated."""
    elsewhere = Model().to(device)
    elsewhere(INPUT.to(device))
    assert (elsewhere._foreach.memory == []) == (device != "cpu")
    small = wa.convert(nn.Sequential(wa.WAConv2d(8, 8, 3)), foreach=True)
    small(normal(1, 8, 5, 5))
    assert small._foreach.memory == []
    model = Model()
    step(model, 1)
    with profile(profile_memory=True):
        assert which_are_free(model._foreach.memory) == []
        model(INPUT)
    assert model._foreach.memory == []


def test_gradients_are_written_over_as_before():
    model = Model()
    for seed in (1, 2):
        change(model, seed)
        addresses = []
        model.held[model[0]] = lambda filters, to=addresses: filters.register_hook(lambda g: to.append(g.data_ptr()))
        model.zero_grad()
        output, places = model(INPUT)
        Given.apply(output, lambda: torch.ones(2, CHANNELS, 1, 1)).backward()
        assert model[0].weight.grad.data_ptr() == addresses[0] != places[0]
