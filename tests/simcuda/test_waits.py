"""No call waits for the device. PyTorch's debug mode sees its own waits alone, a capture those within it alone."""

import contextlib

import pytest
import simcuda
import torch
from test_stream_order import network
from truth import normal

import weightalign_cuda as wa

CONTEXTS = {"frozen": lambda model: wa.frozen(model.eval()), "accumulate": wa.accumulate}


@pytest.mark.parametrize("kind", ["each layer", "foreach", *CONTEXTS])
def test_nothing_waits(any_backend, kind):
    model, image = network(), normal(2, 3, 8, 8, device="cuda")
    if kind == "foreach":
        wa.convert(model, foreach=True)

    def run():
        with CONTEXTS.get(kind, contextlib.nullcontext)(model):
            for _ in range(2):
                output = model(image)
                if kind != "frozen":
                    output.square().sum().backward()

    run()  # allocates what later runs use again
    torch.cuda.synchronize()
    before = simcuda.runtime().simcuda_waits()
    run()
    assert simcuda.runtime().simcuda_waits() == before
    torch.cuda.synchronize()
    assert simcuda.runtime().simcuda_waits() > before
