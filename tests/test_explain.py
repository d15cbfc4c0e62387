"""wa.explain: what aligns each layer and why, as data and as text; and what the logger says when it happens."""

import logging

import pytest
import torch
from count_ops import CountOps
from foreach_model import Model, checkpointed, image
from torch import nn
from torch.nn.utils import parametrizations
from truth import F16
from varied import network

import weightalign_cuda as wa
from weightalign_cuda.layers import aligned_layers
from weightalign_cuda.model.fingerprint import fingerprint, has_plain_parameters, why_not_plain


def aligned(model):
    return {row.name: row.aligned for row in wa.explain(model)}


def reasons(model):
    return {row.name: row.why for row in wa.explain(model)}


def test_before_and_after_convert():
    model = network()
    assert aligned(model) == {"0": "no", "3.0": "no", "3.1": "no"}
    assert set(reasons(model).values()) == {"wa.convert(model) would convert it"}
    wa.convert(model, exclude="3.1")
    assert aligned(model) == {"0": "alone", "3.0": "alone", "3.1": "no"}
    assert reasons(model)["0"] == "foreach is off: wa.convert(model, foreach=True)"
    assert wa.explain(model)[0][:3] == ("0", "WAConv2d", (8, 27))
    assert [row.filters for row in wa.explain(model)] == [(8, 27), (8, 36), (6, 32)]


@pytest.mark.parametrize("foreach", [1, 2, 3])
def test_launches_are_those_that_run(native, device, foreach):
    model = wa.convert(Model(), foreach=foreach).to(device)
    model.last.to(torch.float64)  # a launch takes weights of one dtype
    rows = wa.explain(model)
    assert all(row.aligned == "together" for row in rows)
    launches = {row.why.partition(",")[0] for row in rows}
    with CountOps() as ops, torch.no_grad():
        model.last.forward = lambda x: model.last._conv_forward(x.double(), model.last.aligned_filters(), None)
        model(image(device))
    assert len(launches) == ops.calls["align_forward"]
    assert all(f" of {len(launches)}" in launch for launch in launches)


def test_layers_that_cannot_join():
    model = wa.convert(nn.Sequential(*[nn.Conv2d(3, 3, 3) for _ in range(5)]), foreach=True)
    parametrizations.weight_norm(model[0])
    with torch.inference_mode():
        model[1].weight = nn.Parameter(model[1].weight.clone(), requires_grad=False)

    class Tensor(torch.Tensor):
        pass

    model[2].gain = nn.Parameter(model[2].gain.as_subclass(Tensor))
    assert aligned(model) == {"0": "alone", "1": "alone", "2": "alone", "3": "together", "4": "together"}
    found = reasons(model)
    assert found["0"] == "its weight is made at each use, as by a parametrization or pruning"
    assert found["1"] == "its weight was made in inference mode, where torch does not count changes"
    assert found["2"] == "its gain is a Tensor"
    assert found["3"] == "launch 1 of 1, with 1 others, by foreach"
    for layer in aligned_layers(model.modules()):
        assert (why_not_plain(layer) is None) == has_plain_parameters(layer) == bool(fingerprint(layer))


def test_what_else_gives_layers_their_filters():
    model = wa.convert(network())
    with wa.frozen(model):
        assert set(aligned(model).values()) == {"by frozen"}
        assert "aligned by frozen" in repr(model[0])
    with wa.accumulate(model):
        assert set(aligned(model).values()) == {"by accumulate"}
    assert "aligned by" not in repr(model)
    assert repr(wa.convert(model, foreach=True)).count("aligned by foreach") == 3


def test_models_in_each_other():
    inner = wa.convert(network(), foreach=True)
    outer = nn.Sequential(inner, wa.WAConv2d(3, 3, 3))
    assert aligned(outer) == {"0.0": "together", "0.3.0": "together", "0.3.1": "together", "1": "alone"}
    assert reasons(outer)["0.0"] == "launch 1 of 1, with 2 others, by foreach of '0'"
    assert reasons(outer)["1"] == "it is not in a part with foreach"
    wa.convert(outer, foreach=True)
    assert set(reasons(outer).values()) == {"launch 1 of 1, with 3 others, by foreach"}


def test_layers_that_convert_leaves_or_refuses():
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1))
    assert reasons(model)["0"] == "filters of one value, which would be constant 0"
    assert reasons(model)["2"] == "predictions"
    (lazy,) = wa.explain(nn.Sequential(nn.LazyConv2d(4, 3)))
    assert lazy[2:] == ((4, 0), "no", "not initialised yet")
    parametrizations.weight_norm(model[1])
    assert "expected the weight of '1' to be a plain torch.nn.Parameter" in reasons(model)["1"]
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got int"):
        wa.explain(3)


def test_as_text():
    text = str(wa.explain(wa.convert(network(), exclude="3.1")))
    lines = text.splitlines()
    assert [line.split()[0] for line in lines] == ["name", "0", "3.0", "3.1"]
    assert lines[1].split(maxsplit=5)[:5] == ["0", "WAConv2d", "8", "27", "alone"]
    assert lines[1].index("alone") == lines[0].index("aligned") == lines[3].index("no ")
    assert repr(wa.explain(nn.ReLU())).split() == ["name", "layer", "filters", "values", "aligned", "why"]


@pytest.fixture
def debug(caplog):
    caplog.set_level(logging.DEBUG, logger="weightalign_cuda")

    def said(run):
        caplog.clear()
        run()
        return [record.getMessage() for record in caplog.records]

    return said


def test_said_when_it_happens(debug, device):
    model = wa.convert(Model(), foreach=True).to(device)
    x = image(device)
    assert debug(lambda: model(x)) == ["foreach: 6 layers aligned together"]
    part = "foreach: a WAConv2d aligns itself: no forward of the model runs on this thread"
    assert debug(lambda: model.first(x)) == [part]

    def changed(block, x):
        with torch.no_grad():
            model.last.weight.mul_(1)
        return block(x)

    model.run = changed
    _, _, alone = debug(lambda: model(x))
    assert alone == "foreach: 'last' aligns itself: its weight, gain, eps or scale has changed since"
    model.run = lambda block, x: block(x)

    def transformed():
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(parameters)

    assert all(said.endswith("a transform of torch.func is active") for said in debug(transformed))
    parametrizations.weight_norm(model.first)
    assert (
        "foreach: 'first' aligns itself: its weight is made at each use, as by a parametrization or pruning"
        in debug(lambda: model(x))
    )


def test_said_in_the_second_run_of_a_checkpoint(debug, device):
    model = wa.convert(Model(checkpointed(True)), foreach=True).to(device)
    result = model(image(device))
    said = debug(lambda: result.sum().backward())
    assert said and all("aligns itself" in line for line in said)


def test_layers_in_half_precision_are_a_launch_of_their_own(native, device):
    model = wa.convert(nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3).to(F16), nn.Conv2d(3, 3, 3)), foreach=True)
    assert [row.why for row in wa.explain(model)] == [
        "launch 1 of 2, with 1 others, by foreach",
        "launch 2 of 2, with 0 others, by foreach",
        "launch 1 of 2, with 1 others, by foreach",
    ]
