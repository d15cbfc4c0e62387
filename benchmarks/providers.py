"""What is measured: our alignment, its rivals, and three floors, each for a list of weights.

Floors: `multiply` is gain * weight: autograd, allocation and the same bytes moved, in PyTorch's own operation. `cast`
is what a plain convolution under autocast does to its weights (a clone if the dtype stays, whose backward then moves
nothing). `flat` moves the bytes of the alignment in one elementwise operation, without autograd.
"""

import math
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import weightalign_cuda as wa

from .console import one_line
from .layers import Shape

Direction = Literal["forward", "backward", "both"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward", "both")
EPS = 1e-5


@dataclass(frozen=True)
class Setting:
    """Where and in what dtypes and layout the weights are aligned."""

    device: str
    dtype: torch.dtype = torch.float32
    out_dtype: torch.dtype = torch.float32
    out_layout: torch.memory_format = torch.preserve_format

    def __str__(self) -> str:
        layout = "" if self.out_layout == torch.preserve_format else f" {short(self.out_layout)}"
        return f"{short(self.dtype)} -> {short(self.out_dtype)}{layout}"

    @property
    def fields(self) -> dict[str, str]:
        """Fields for records."""
        return {
            "dtype": short(self.dtype),
            "out_dtype": short(self.out_dtype),
            "layout": "contiguous_format",
            "out_layout": short(self.out_layout),
        }


@dataclass
class Inputs:
    """One set of buffers: weights and gains, which require grad, and gradients of the aligned weights."""

    weights: list[Tensor]
    gains: list[Tensor]
    grads: list[Tensor]
    setting: Setting


def short(name: Any) -> str:
    return str(name).removeprefix("torch.")


def make_inputs(shapes: Sequence[Shape], setting: Setting) -> Inputs:
    """He-initialised weights with a nonzero mean, gains around 1, normal gradients in the layout of the result."""
    device, weights, gains, grads = setting.device, [], [], []
    for shape in shapes:
        deviation = math.sqrt(2 / math.prod(shape[1:]))
        weight = torch.randn(shape, device=device).mul_(deviation).add_(0.1 * deviation).to(setting.dtype)
        gain = 1 + 0.1 * torch.randn(shape[0], device=device)
        grad = torch.randn(shape, device=device).to(setting.out_dtype, memory_format=setting.out_layout)
        weights.append(weight.requires_grad_())
        gains.append(gain.requires_grad_())
        grads.append(grad)
    return Inputs(weights, gains, grads, setting)


def formula(weight: Tensor, gain: Tensor, eps: float = EPS) -> Tensor:
    """The alignment, written in PyTorch."""
    dims, n = (1, 2, 3), weight[0].numel()
    mean = weight.mean(dims, keepdim=True)
    var = weight.var(dims, keepdim=True, unbiased=False)
    return gain.view(-1, 1, 1, 1) * (weight - mean) / torch.sqrt(n / 2 * var + eps)


def multiply(weight: Tensor, gain: Tensor) -> Tensor:
    return gain.view(-1, 1, 1, 1) * weight


def timm_trick(weight: Tensor, gain: Tensor) -> Tensor:
    """F.batch_norm over the filters, as in timm.layers.ScaledStdConv2d; gamma = sqrt(2), eps = 2 eps / n give ours."""
    n = weight[0].numel()
    scaled = (gain * (2**0.5 * n**-0.5)).view(-1)
    flat = weight.reshape(1, weight.shape[0], -1)
    aligned = F.batch_norm(flat, None, None, weight=scaled, training=True, momentum=0.0, eps=2 * EPS / n)
    return aligned.reshape_as(weight)


Align = Callable[[list[Tensor], list[Tensor]], list[Tensor]]
Truth = Callable[[Tensor, Tensor], Tensor]


class Provider:
    """A way to align, differentiated by autograd as in a training step."""

    def __init__(self, name: str, align: Align, truth: Truth | None = None, has_gains: bool = True) -> None:
        """truth: what `align` computes for a weight and a gain, if that is not the formula."""
        self.name, self.align, self.truth, self.has_gains = name, align, truth or formula, has_gains

    def call(self, direction: Direction, inputs: Inputs) -> Callable[[], list[Tensor]]:
        """The call to time: returns the aligned weights (forward) or the gradients of weights and gains."""
        weights, gains, grads = inputs.weights, inputs.gains, inputs.grads
        wanted = weights + gains if self.has_gains else weights
        if direction == "forward":
            return lambda: self.align(weights, gains)
        if direction == "both":
            return lambda: list(torch.autograd.grad(self.align(weights, gains), wanted, grads))
        aligned = self.align(weights, gains)
        return lambda: list(torch.autograd.grad(aligned, wanted, grads, retain_graph=True))

    def expected(self, direction: Direction, inputs: Inputs) -> list[Tensor]:
        """The same in float64."""
        weights, gains = ([t.detach().double().requires_grad_() for t in ts] for ts in (inputs.weights, inputs.gains))
        aligned = [self.truth(w, g) for w, g in zip(weights, gains, strict=True)]
        wanted = weights + gains if self.has_gains else weights
        if direction == "forward":
            return aligned
        return list(torch.autograd.grad(aligned, wanted, [g.double() for g in inputs.grads]))


class Flat(Provider):
    """The lower bound: forward w.to(dtype), backward w + G, each over one flat buffer into an existing one."""

    def __init__(self) -> None:
        super().__init__("flat", lambda weights, gains: [], has_gains=False)

    def call(self, direction: Direction, inputs: Inputs) -> Callable[[], list[Tensor]]:
        weight, grad = (torch.cat([t.detach().flatten() for t in ts]) for ts in (inputs.weights, inputs.grads))
        result = torch.full_like(grad, math.nan)
        total = torch.full_like(weight, math.nan)
        if direction == "forward":
            return lambda: [result.copy_(weight)]
        if direction == "backward":
            return lambda: [torch.add(weight, grad, out=total)]
        return lambda: [result.copy_(weight), torch.add(weight, grad, out=total)]

    def expected(self, direction: Direction, inputs: Inputs) -> list[Tensor]:
        weight, grad = (torch.cat([t.detach().flatten() for t in ts]).double() for ts in (inputs.weights, inputs.grads))
        return {"forward": [weight], "backward": [weight + grad], "both": [weight, weight + grad]}[direction]


def per_layer(function: Truth, setting: Setting) -> Align:
    """`function(weight, gain)` for each weight, then its dtype and layout."""
    dtype, layout = setting.out_dtype, setting.out_layout
    return lambda weights, gains: [
        function(w, g).to(dtype, memory_format=layout) for w, g in zip(weights, gains, strict=True)
    ]


def compiled(setting: Setting) -> Align:
    """torch.compile of the formula over the list, as a separate function, so that no other shape's guards are checked.

    Donated buffers are off because the backward is timed on a retained graph.
    """
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # type: ignore[attr-defined]
    align = per_layer(formula, setting)

    def over_list(weights: list[Tensor], gains: list[Tensor]) -> list[Tensor]:
        return align(weights, gains)

    own = types.FunctionType(over_list.__code__.replace(), globals(), "over_list", None, over_list.__closure__)
    mode = "max-autotune-no-cudagraphs" if setting.device == "cuda" else None
    return torch.compile(own, dynamic=False, fullgraph=True, mode=mode)  # type: ignore[no-any-return]


def ours(setting: Setting) -> Align:
    """wa.align for each weight."""
    dtype, layout = setting.out_dtype, setting.out_layout
    return lambda weights, gains: [
        wa.align(w, g, eps=EPS, dtype=dtype, memory_format=layout) for w, g in zip(weights, gains, strict=True)
    ]


def ours_foreach(setting: Setting) -> Align:
    """wa.align_foreach of the list."""
    dtype, layout = setting.out_dtype, setting.out_layout
    return lambda weights, gains: wa.align_foreach(weights, gains, eps=EPS, dtype=dtype, memory_format=layout)


def cast(setting: Setting) -> Align:
    dtype, layout = setting.out_dtype, setting.out_layout
    return lambda weights, gains: [w.to(dtype, memory_format=layout, copy=True) for w in weights]


def providers(setting: Setting, layers: int, with_compile: bool) -> list[Provider]:
    """All providers for a list of `layers` weights; ours comes first, for a list also ours layer by layer."""
    own = [Provider("ours", ours(setting))]
    if layers > 1:
        own = [Provider("ours", ours_foreach(setting)), Provider("ours per layer", ours(setting))]
    rivals = [Provider("eager", per_layer(formula, setting)), Provider("timm", per_layer(timm_trick, setting))]
    if with_compile:
        rivals.append(Provider("compile", compiled(setting)))
    floors = [
        Provider("multiply", per_layer(multiply, setting), multiply),
        Provider("cast", cast(setting), lambda w, g: w, has_gains=False),
        Flat(),
    ]
    return [*own, *rivals, *floors]


def why_no_compile(setting: Setting) -> str | None:
    """Why torch.compile does not work here, by compiling one tiny weight; None if it does."""
    inputs = make_inputs([(8, 4, 1, 1)], setting)
    try:
        Provider("compile", compiled(setting)).call("both", inputs)()
    except Exception as failure:
        return one_line(failure)
    return None
