"""python -m benchmarks.numerics: errors of each backend and its rivals against float64, on difficult weights.

Writes benchmarks/results/numerics.md. Truth and bounds are those of tests/truth.py; tests/test_numerics.py checks every
backend on the same cases. Without a GPU the CUDA kernels run on the tests' emulator, if pybind11 is installed to build
it, and Triton's are interpreted.
"""

import importlib.util
import math
import os
import pathlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which torch's compiler does

import weightalign_cuda as wa  # noqa: E402

from . import machine, providers  # noqa: E402

sys.path[:0] = [str(machine.ROOT / "tests" / "simt"), str(machine.ROOT / "tests")]
import truth  # noqa: E402
from truth import normal  # noqa: E402

# How backends run that do not run as they are meant to.
HOW = {} if ON_GPU else {"triton": "interpreted"}
if ON_GPU and machine.is_simulated(machine.facts("cuda")):
    HOW = {"cuda": "simulated"}

TABLE = pathlib.Path(__file__).with_name("results") / "numerics.md"
SHAPE = (64, 64, 3, 3)
F16, BF16 = torch.float16, torch.bfloat16


def he(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(*shape, std=math.sqrt(2 / math.prod(shape[1:])), dtype=dtype)


def he_but(filters: dict[int, float], value: int | slice = slice(None)) -> Tensor:
    """He-initialised, except one value or all values of some filters."""
    weight = he(*SHAPE)
    for k, x in filters.items():
        weight.flatten(1)[k, value] = x
    return weight


@dataclass(frozen=True)
class Case:
    name: str
    weight: Callable[[], Tensor]
    gain: float = 1.0
    in_range: bool = True  # of float32 for sums of squares; otherwise results are 0 or NaN

    def inputs(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Weight, gain, and a gradient of the aligned weight in its dtype."""
        weight = self.weight()
        gain = torch.full((len(weight),), self.gain)
        grad = normal(*weight.shape, seed=7, dtype=weight.dtype)
        return weight.to(device), gain.to(device), grad.to(device)

    def check(self, results: tuple[Tensor, ...]) -> None:
        """Asserts what every backend must satisfy."""
        if self.in_range:
            truth.assert_right(*self.inputs(), *results)
        else:  # nothing that could be mistaken for a result
            assert all(bool(((t == 0) | t.isnan()).all()) for t in results)


CASES = (
    Case("He-initialised, 512x512x3x3", lambda: he(512, 512, 3, 3)),
    Case("mean 1e4, deviation 1e-3", lambda: normal(*SHAPE, mean=1e4, std=1e-3)),
    Case("subnormal: deviation 1e-40", lambda: normal(*SHAPE, std=1e-40)),
    Case("deviation 1e17: squares just fit float32", lambda: normal(*SHAPE, std=1e17)),
    Case("deviation 1e20", lambda: normal(*SHAPE, std=1e20), in_range=False),
    Case("mean 1e38, deviation 1e37", lambda: normal(*SHAPE, mean=1e38, std=1e37), in_range=False),
    Case("n = 9, mean 1e38, deviation 1e37", lambda: normal(64, 1, 3, 3, mean=1e38, std=1e37), in_range=False),
    Case("two constant filters, 0.1 and 1e30", lambda: he_but({0: 0.1, 1: 1e30})),
    Case("one NaN in one filter", lambda: he_but({1: math.nan}, value=5)),
    Case("n = 1", lambda: normal(64, 1, 1, 1)),
    Case("n = 2", lambda: normal(64, 2, 1, 1)),
    Case("float16, deviation 1000: squares overflow", lambda: normal(*SHAPE, std=1000, dtype=F16)),
    Case("float16, gain 6e5: results overflow", lambda: he(*SHAPE, dtype=F16), gain=6e5),
    Case("bfloat16", lambda: he(*SHAPE, dtype=BF16)),
)
RESULTS = ("aligned", "gradient of weight")
Results = tuple[Tensor, ...]  # aligned weight, gradients of weight and gain
Column = Callable[[Case], Results]


def by_autograd(align: Callable[[Tensor, Tensor], Tensor], device: str = "cpu") -> Column:
    def run(case: Case) -> Results:
        weight, gain, grad = case.inputs(device)
        inputs = weight.requires_grad_(), gain.requires_grad_()
        aligned = align(*inputs)
        return tuple(t.detach().cpu() for t in (aligned, *torch.autograd.grad(aligned, inputs, grad)))

    return run


def ours(backend: str) -> Column:
    def align(weight: Tensor, gain: Tensor) -> Tensor:
        with wa.use_backend(backend):
            return wa.align(weight, gain)

    return by_autograd(align, "cuda" if backend == "cuda" or (backend == "triton" and ON_GPU) else "cpu")


def rival(function: Callable[..., Tensor]) -> Column:
    return by_autograd(lambda weight, gain: function(weight, gain).to(weight.dtype))


def emulated(emulator: Any) -> Column:
    """The CUDA kernels on the CPU; `emulator` is that of tests/simt/emulator.py."""

    def run(case: Case) -> Results:
        weight, gain, grad = case.inputs()
        rows, settings = [weight.flatten(1)], ([truth.EPS], [1.0])
        forward = emulator.forward(rows, weight.dtype, [gain], *settings)
        backward = emulator.backward([grad.flatten(1)], rows, [gain], forward.statistics, settings[1])
        return forward.outs[0].view_as(weight), backward.grad_weights[0].view_as(weight), backward.grad_gain

    return run


def columns() -> dict[str, Column]:
    """Every backend that is available, and the rivals."""
    found = {}
    if not ON_GPU and importlib.util.find_spec("pybind11"):
        import emulator as simt

        found["cuda (emulated)"] = emulated(simt.Emulator(simt.load(simt.build(), "simt_check")))
    for name in ("cuda", "triton", "cpu", "reference"):
        if wa.backends()[name] == "available":
            found[f"{name} ({HOW[name]})" if name in HOW else name] = ours(name)
    if "triton (interpreted)" in found:
        import triton_interpreter

        triton_interpreter.mend()
    return {**found, "eager": rival(providers.formula), "timm": rival(providers.timm_trick)}


def cell(result: Tensor, true: Tensor, size: Tensor, bound: Tensor) -> str:
    error = truth.distance(result, true)
    error = error.masked_fill(result.isinf() & (error > bound), math.inf)
    text = f"{float(error.max() / size[size.isfinite()].max()):.2g}".replace("e-0", "e-")
    return text if truth.is_near(result, true, bound) else f"**{text}**"


def row(case: Case, column: Column) -> list[str]:
    """A cell for each of RESULTS."""
    weight, gain, grad = case.inputs()
    try:
        results = column(case)
    except (RuntimeError, ValueError):  # batch_norm rejects n = 1
        return ["refused"] * len(RESULTS)
    judgements = zip(results, truth.judged(weight, gain, grad, weight.dtype), strict=True)
    cells = {name: cell(result, *judgement) for result, (name, *judgement) in judgements}
    return [cells[name] for name in RESULTS]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(each)} |" for each in (head, ["---"] * len(head), *rows))


INTRODUCTION = """\
# Errors against float64

Written by `python -m benchmarks.numerics` (torch {version}). Largest error of a result, relative to the largest of the
terms that it sums; for an aligned weight that is its largest value (for a subnormal one, the smallest normal number).
**Bold**: beyond what rounding explains, about 1.3e-6 in sums, then half a unit in the last place of the dtype (float32
unless stated otherwise), as derived in `tests/truth.py`. Only expected NaN and infinity count as correct. Weights are
64x64x3x3 unless stated otherwise.

Sums of squares are float32's: a filter whose deviation exceeds about 1e19 / sqrt(n) overflows them, and gives 0 or NaN.
"""


def main() -> None:
    found = columns()
    cells = {(case.name, name): row(case, column) for case in CASES for name, column in found.items()}
    parts = [INTRODUCTION.format(version=torch.__version__.split("+")[0])]
    for i, result in enumerate(RESULTS):
        rows = [[case.name, *(cells[case.name, name][i] for name in found)] for case in CASES]
        parts.append(markdown([result, *found], rows) + "\n")
    TABLE.write_text("\n".join(parts))
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
