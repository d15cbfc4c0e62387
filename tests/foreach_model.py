"""The model of the foreach tests, and training steps with it."""

import torch
from count_ops import CountOps
from torch import nn
from torch.utils.checkpoint import checkpoint
from truth import normal
from varied import converted

import weightalign_cuda as wa
from weightalign_cuda.layers import aligned_layers


class Model(nn.Module):
    """With a fused activation, a transposed convolution and an unused layer; `run` decides how `middle` is called."""

    def __init__(self, run=lambda block, x: block(x)):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.middle = nn.Sequential(
            nn.Conv2d(6, 6, 3, padding=1, bias=False),
            nn.SiLU(),
            nn.ConvTranspose2d(6, 6, 2, groups=2),
            wa.WAConv2d(6, 6, 3, padding="same_tf", stride=2, activation="relu"),
        )
        self.last = nn.Conv2d(6, 4, 3)
        self.unused = nn.Conv2d(6, 4, 3)
        self.run = run

    def forward(self, x):
        return self.last(self.run(self.middle, self.first(x))).mean((2, 3))


def checkpointed(reentrant):
    return lambda block, x: checkpoint(block, x, use_reentrant=reentrant)


def image(device="cpu", seed=9, dtype=torch.float32):
    return normal(2, 3, 8, 7, seed=seed, device=device, dtype=dtype)


def step(model, forward=None, x=None):
    """The result and all gradients, None for unused parameters; ops of the forward; ops of the backward."""
    model.zero_grad()
    x = image(next(model.parameters()).device) if x is None else x
    with CountOps() as forward_ops:
        result = (model if forward is None else forward)(x)
    with CountOps() as backward_ops:
        result.float().square().sum().backward()
    found = [result.detach(), *(p.grad for p in model.parameters())]
    return found, forward_ops.calls, backward_ops.calls


def assert_same(found, expected, **tolerance):
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, **(tolerance or {"rtol": 0, "atol": 0}))


def alone(device="cpu", **kwargs):
    return step(converted(Model(**kwargs)).to(device))[0]


def layers(model):
    return aligned_layers(model.modules())


def kept(model):
    """How many aligned weights are kept for layers to be recomputed in the backward."""
    return sum(len(layer.aligned_by.kept) for layer in layers(model))
