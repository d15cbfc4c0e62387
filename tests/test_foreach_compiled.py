"""wa.convert(model, foreach=True) under torch.compile and torch.export."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from foreach_model import Model, alone, assert_same, checkpointed, image
from torch import nn
from varied import converted


@pytest.fixture(autouse=True)
def one_thread(restore_threads):
    """Many small models, on machines that may be busy."""
    torch.set_num_threads(1)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("block", [lambda block, x: block(x), checkpointed(False)], ids=["plain", "checkpointed"])
def test_compiled(device, fresh_compiler, block):
    model = converted(Model(block), foreach=True).to(device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    aligned = []
    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: aligned.append(t) or t, lambda t: t):
            result = compiled(image(device))
        model.zero_grad()
        result.square().sum().backward()
        assert_same([result.detach(), *(p.grad for p in model.parameters())], alone(device), rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            model.first.weight.mul_(2), model.last.gain.mul_(1)
            model.first.weight.mul_(0.5)
    with ThreadPoolExecutor(2) as pool, torch.no_grad():
        expected = model(image(device))
        for found in pool.map(lambda _: compiled(image(device)), range(2)):
            torch.testing.assert_close(found, expected)


def graphs_of(function):
    """The compiled function, and the targets in each graph that compiling it makes."""
    graphs = []

    def backend(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    return torch.compile(function, fullgraph=True, backend=backend), graphs


def test_graphs_of_compile(device, fresh_compiler):
    """The compiled model's graph takes the aligned weights as inputs; a graph around the model aligns them itself,
    once; a compiled part of it aligns each layer."""
    model = converted(Model(), foreach=True).to(device).eval()
    around = nn.Sequential(model, nn.ReLU())
    expected = model(image(device))
    for function, count in ((model, 0), (around, 1)):
        compiled, graphs = graphs_of(function)
        for _ in range(3):
            found = compiled(image(device))
        torch.testing.assert_close(found, expected if function is model else expected.relu())
        assert [sum("align_forward" in target for target in graph) for graph in graphs] == [count]
    model.middle, graphs = graphs_of(model.middle)
    torch.testing.assert_close(model(image(device)), expected)
    assert [sum("align_forward" in target for target in graph) for graph in graphs] == [3]


def test_export(device):
    model = converted(Model(), foreach=True).to(device).eval()
    exported = torch.export.export(model, (image(device),))
    assert sum("align_forward" in str(node.target) for node in exported.graph.nodes) == 1
    torch.testing.assert_close(exported.module()(image(device)), model(image(device)))
