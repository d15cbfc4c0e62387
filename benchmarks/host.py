"""The host's time, on weights so tiny that little else remains: `wa.align` against an autograd.Function that does
nothing, lists against torch's own, and models of 53 tiny convolutions against the plain one and against one whose
weights pass through such a Function, interleaved in one process."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weightalign_cuda as wa
from weightalign_cuda.nn.layers import aligned_layers

from . import harness
from .harness import Call, Case, Limits
from .providers import Direction, Inputs, Setting, make_inputs, ours, ours_foreach
from .stats import median_ratio, spread

Calls = dict[tuple[Case, str], Call]  # by case and provider
SHAPE = (8, 4, 1, 1)
LAYERS = 53  # as many as ResNet-50 has


class Empty(torch.autograd.Function):
    """The minimum cost of a two-tensor autograd.Function in Python."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gain: Tensor) -> Tensor:
        ctx.tensors = weight, gain
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, ctx.tensors[1].detach()


class EmptyOfMany(torch.autograd.Function):
    """Likewise, of weights and as many gains."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.gains = tensors[len(tensors) // 2 :]
        return tuple([w.view_as(w) for w in tensors[: len(ctx.gains)]])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return *grads, *[gain.detach() for gain in ctx.gains]


class EmptyForeach(nn.Module):
    """A converted model whose filters all come from one `EmptyOfMany`: no way to align all layers together in an
    autograd.Function can cost less."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = wa.convert(model)
        layers = aligned_layers(self.model.modules())
        self.tensors = [*(layer.weight for layer in layers), *(layer.gain for layer in layers)]
        self.filters: list[Tensor] = []
        for i, layer in enumerate(layers):
            layer.aligned_by = lambda i=i: self.filters[i]  # type: ignore[misc]

    def forward(self, image: Tensor) -> Tensor:
        self.filters[:] = EmptyOfMany.apply(*self.tensors)  # type: ignore[no-untyped-call]
        return self.model(image)


def records(setting: Setting, limits: Limits) -> list[dict[str, Any]]:
    results = _measured(alignments(setting), setting, limits)
    with models(setting) as calls:
        return results + _measured(calls, setting, limits)


def alignments(setting: Setting) -> Calls:
    one, many = make_inputs([SHAPE], setting), make_inputs([SHAPE] * LAYERS, setting)

    def of(align: Any, inputs: Inputs) -> dict[str, Call]:
        forward = lambda: align(inputs.weights, inputs.gains)  # noqa: E731
        leaves = inputs.weights + inputs.gains
        return {
            "forward without grad": torch.no_grad()(forward),
            "forward with grad": forward,
            "forward + backward": lambda: torch.autograd.grad(forward(), leaves, inputs.grads),
        }

    subjects = {
        ("align, 1 weight", "ours"): of(ours(setting), one),
        ("align, 1 weight", "empty"): of(lambda weights, gains: [Empty.apply(weights[0], gains[0])], one),
        ("align, 1 weight", "layer_norm"): {
            "forward with grad": lambda: F.layer_norm(one.weights[0], SHAPE[1:]),
        },
        ("align_foreach, 53 weights", "ours"): of(ours_foreach(setting), many),
        ("align_foreach, 53 weights", "_foreach_mul"): {
            "forward with grad": lambda: torch._foreach_mul(many.weights, 2.0),
        },
    }
    return {
        (Case(f"{name}, {step}", (SHAPE,) * (LAYERS if "foreach" in name else 1)), provider): call
        for (name, provider), steps in subjects.items()
        for step, call in steps.items()
    }


@contextlib.contextmanager
def models(setting: Setting) -> Iterator[Calls]:
    """8x8x3x3 on 4x4 images, on one thread, relative to the plain model."""

    def plain() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(LAYERS))).to(setting.device)

    shapes = ((8, 8, 3, 3),) * LAYERS
    image = torch.randn(1, 8, 4, 4, device=setting.device)
    trained = {
        "plain": plain(),
        "empty": EmptyForeach(plain()),
        "ours per layer": wa.convert(plain()),
        "ours": wa.convert(plain(), foreach=True),
    }
    kept = wa.convert(plain()).eval()
    used = trained | {"ours frozen": kept, "ours folded": wa.fold(wa.convert(plain()))}

    def step(model: nn.Module) -> None:
        model.zero_grad()
        model(image).sum().backward()

    forward, both = (
        Case(f"{LAYERS} tiny convolutions, {what}", shapes) for what in ("forward without grad", "forward + backward")
    )
    without = {(forward, name): torch.no_grad()(lambda model=model: model(image)) for name, model in used.items()}
    steps = {(both, name): lambda model=model: step(model) for name, model in trained.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with wa.frozen(kept):
            yield without | steps
    finally:
        torch.set_num_threads(threads)


def _measured(calls: Calls, setting: Setting, limits: Limits) -> list[dict[str, Any]]:
    """Records of calls by case and provider, all interleaved."""
    timers = {key: harness.wall_timer([call], setting.device == "cuda")[0] for key, call in calls.items()}
    samples = harness.interleave(timers, limits)
    results = []
    for case, provider in calls:
        direction: Direction = "both" if "backward" in case.name else "forward"
        own = samples[case, provider]
        theirs = {rival: each for (other, rival), each in samples.items() if other == case and "ours" not in rival}
        speedups = {rival: median_ratio(each, own).to_json() for rival, each in theirs.items() if rival != provider}
        results.append({
            "suite": "host", "case": case.name, "provider": provider, "direction": direction, "clock": "wall",
            **setting.fields, "shape": list(case.shapes[0]), "batch": None, "n_layers": len(case.shapes),
            "bytes_min": case.bytes_min(direction, setting), **spread(own),
            "speedups": speedups if "ours" in provider else {},
        })  # fmt: skip
    return results
