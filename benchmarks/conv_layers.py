"""python -m benchmarks.conv_layers: the cost of whole convolution layers, against the unfused PyTorch steps.

Forward + backward, at batch 1 and 8: layers of ResNet-50 (padding done by the convolution), of a style-transfer network
(reflect padding) and as in NFNet-F0 (asymmetric "same"). prep: activation, padding and alignment, with wa.prepare or as
steps in eager PyTorch; conv: the same plus the convolution; plain: the convolution alone, on prep's results. Writes
conv_layers.jsonl, one record per line.
"""

import importlib.util
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import weightalign_cuda as wa

from . import command, console, harness, report
from .console import Console
from .harness import Limits, WrongResultError
from .layers import Shape
from .providers import EPS, Setting, formula, make_inputs
from .stats import median_ratio, spread

BATCHES = (1, 8)
# The layers that run without --all: from each stage, kernels of 1 and 3, stride 1 and 2, wide and narrow.
SUBSET = {"conv1", "layer1.0.conv2", "layer1.0.conv3", "layer2.0.conv2", "layer2.1.conv1", "layer3.1.conv2"}
SUBSET |= {"layer4.0.downsample.0", "layer4.1.conv2"}
# The weight gradient of a float32 convolution sums up to batch * 112 * 112 products, and alignment sums those.
TOLERANCES = {"prep": harness.TOLERANCES[torch.float32], "conv": 1e-4}
Step = Callable[..., tuple[Tensor, ...]]
Buffers = dict[str, tuple[list[Tensor], list[Tensor]]]


@dataclass(frozen=True)
class Layer:
    """A convolution, its activation and padding, and the size of its input."""

    group: str
    name: str
    shape: Shape  # of the weight
    size: tuple[int, int]
    stride: int = 1
    padding: int | str = 0  # on every side, or "same_tf"
    mode: str = "zeros"
    activation: str = "relu"
    groups: int = 1

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(before, after) of height and width; TensorFlow's "SAME" puts the odd one after."""
        if isinstance(self.padding, int):
            return [(self.padding, self.padding)] * 2
        sizes = zip(self.size, self.shape[2:], strict=True)
        totals = [max((math.ceil(n / self.stride) - 1) * self.stride + kernel - n, 0) for n, kernel in sizes]
        return [(total // 2, total - total // 2) for total in totals]

    @property
    def implicit_padding(self) -> list[int]:
        """The padding that the convolution itself does: zeros, equal before and after."""
        symmetric = all(before == after for before, after in self.pairs)
        return [before if self.mode == "zeros" and symmetric else 0 for before, _ in self.pairs]


def resnet50() -> list[Layer]:
    """Each distinct convolution of torchvision's ResNet-50 at 224 x 224, named after the first layer that has it."""
    import torchvision

    found: dict[Any, Layer] = {}

    def note(conv: Any, args: Any) -> None:
        fields = tuple(conv.weight.shape), tuple(args[0].shape[2:]), conv.stride[0], conv.padding[0]
        found.setdefault(fields, Layer("ResNet-50", names[conv], *fields))

    with torch.device("meta"):
        model = torchvision.models.resnet50()
        names = {module: name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)}
        for module in names:
            module.register_forward_pre_hook(note)
        model(torch.empty(1, 3, 224, 224))
    return list(found.values())


# Padding that no convolution can do itself: reflect, and TensorFlow's "SAME" at stride 2.
REFLECT, SAME = "style transfer, reflect", "NFNet-like, asymmetric same"
EXPLICIT = (
    Layer(REFLECT, "3->32 k9 at 128", (32, 3, 9, 9), (128, 128), 1, 4, "reflect"),
    Layer(REFLECT, "32->64 k3 s2 at 128", (64, 32, 3, 3), (128, 128), 2, 1, "reflect"),
    Layer(REFLECT, "64->128 k3 s2 at 64", (128, 64, 3, 3), (64, 64), 2, 1, "reflect"),
    Layer(REFLECT, "128->128 k3 at 32", (128, 128, 3, 3), (32, 32), 1, 1, "reflect"),
    Layer(SAME, "3->16 k3 s2 at 192", (16, 3, 3, 3), (192, 192), 2, "same_tf", "zeros", "silu"),
    Layer(SAME, "64->128 k3 s2 at 96", (128, 64, 3, 3), (96, 96), 2, "same_tf", "zeros", "silu"),
    Layer(SAME, "256 groups 2 k3 s2 at 48", (256, 128, 3, 3), (48, 48), 2, "same_tf", "zeros", "silu", 2),
)


def steps(layer: Layer) -> dict[str, Step]:
    """The functions to time, of input, weight and gain; "conv plain" of prepared input and aligned weight."""
    options: dict[str, Any] = {"padding_mode": layer.mode, "activation": layer.activation, "eps": EPS}
    convolution = layer.stride, layer.padding, 1, layer.groups
    spread = [n for pair in reversed(layer.pairs) for n in pair]  # in F.pad's order
    pads = any(spread) and not any(layer.implicit_padding)

    def prep_eager(x: Tensor, weight: Tensor, gain: Tensor) -> tuple[Tensor, ...]:
        x = getattr(F, layer.activation)(x)
        return F.pad(x, spread, layer.mode.replace("zeros", "constant")) if pads else x, formula(weight, gain)

    def plain(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (F.conv2d(x, weight, None, layer.stride, layer.implicit_padding, 1, layer.groups),)

    return {
        "prep ours": lambda x, weight, gain: wa.prepare(x, weight, gain, padding=layer.pairs, **options),
        "prep eager": prep_eager,
        "conv ours": lambda x, weight, gain: (wa.conv2d(x, weight, None, *convolution, gain=gain, **options),),
        "conv eager": lambda *leaves: plain(*prep_eager(*leaves)),
        "conv plain": plain,
    }


def buffers(layer: Layer, batch: int, device: str) -> Buffers:
    """One set of buffers for each of steps(): leaves, and gradients of the results."""
    made = make_inputs([layer.shape], Setting(device))
    x = torch.randn(batch, layer.shape[1] * layer.groups, *layer.size, device=device).requires_grad_()
    leaves = [x, made.weights[0], made.gains[0]]
    with torch.no_grad():
        prepared = steps(layer)["prep eager"](*leaves)
        grads = [torch.randn_like(steps(layer)["conv plain"](*prepared)[0])]
    prep, conv = (leaves, [torch.randn_like(prepared[0]), made.grads[0]]), (leaves, grads)
    plain = [t.detach().requires_grad_() for t in prepared], grads
    return {"prep ours": prep, "prep eager": prep, "conv ours": conv, "conv eager": conv, "conv plain": plain}


def check(layer: Layer, sets: Buffers) -> dict[str, float]:
    """Largest error / largest value over results and gradients; WrongResultError beyond the tolerance."""
    functions, errors = steps(layer), {}
    for name, (leaves, grads) in sets.items():
        kind, _, who = name.partition(" ")
        exact = functions[name if who == "plain" else f"{kind} eager"]
        doubles = [t.detach().double().requires_grad_() for t in leaves]
        expected = exact(*doubles)
        expected += torch.autograd.grad(expected, doubles, [g.double() for g in grads])
        cudnn = torch.backends.cudnn
        with cudnn.flags(enabled=cudnn.enabled, allow_tf32=False):  # tf32's rounding would mask ours
            found = tuple(functions[name](*leaves))
            found += torch.autograd.grad(found, leaves, grads)
        errors[name] = 0.0
        for result, reference in zip(found, expected, strict=True):
            difference = (result.double() - reference if result.shape == reference.shape else reference / 0).detach()
            error = float(difference.abs().max() / reference.detach().abs().max())
            if not error <= TOLERANCES[kind]:  # NaN is wrong too
                raise WrongResultError(f"{name}, {layer.name}, {tuple(result.shape)}: error {error:.1e}")
            errors[name] = max(errors[name], error)
    return errors


def measure(layer: Layer, batch: int, device: str, limits: Limits) -> list[dict[str, Any]]:
    """A record for each of steps(), all of which are checked first."""
    first = buffers(layer, batch, device)
    errors = check(layer, first)
    footprint = sum(t.nbytes for name in ("prep ours", "conv plain") for ts in first[name] for t in ts)
    sets = [first, *(buffers(layer, batch, device) for _ in range(harness.sets(device, footprint) - 1))]
    timers = {}
    for name, step in steps(layer).items():
        chosen = [each[name] for each in sets]
        calls = [lambda a=a, g=g, step=step: torch.autograd.grad(step(*a), a, g) for a, g in chosen]  # type: ignore
        timers[name] = harness.wall_timer(calls, device == "cuda")
    samples: dict[str, list[float]] = {}
    for kind in ("prep", "conv"):  # separate: prep is fast and should not be limited to the few rounds of a slow conv
        samples |= harness.interleave({n: timer for n, (timer, _) in timers.items() if n.startswith(kind)}, limits)
    records = []
    for name, own in samples.items():
        rivals = [r for r in samples if r != name and r.startswith(name[:4])] if name.endswith("ours") else []
        ratios = {rival: median_ratio(samples[rival], own).to_json() for rival in rivals}
        overhead = median_ratio(own, samples["conv plain"]).to_json() if name.startswith("conv") else None
        records.append({
            "suite": "conv", "group": layer.group, "case": layer.name, "provider": name, "direction": "both",
            "clock": "wall", "dtype": "float32", "out_dtype": "float32", "layout": "contiguous_format",
            "out_layout": "preserve_format", "shape": layer.shape, "n_layers": 1, "batch": batch, "size": layer.size,
            "stride": layer.stride, "padding": layer.pairs, "padding_mode": layer.mode, "activation": layer.activation,
            "groups": layer.groups, "sets": len(sets), "calls": timers[name][1], "max_error": errors[name],
            **spread(own), "speedups": ratios, "overhead": overhead,
        })  # fmt: skip
    return records


def print_report(screen: Console, records: Sequence[dict[str, Any]]) -> None:
    """A table for each group, then prep's overall speedup."""
    heads = "layer|batch|prep us|eager|conv us|eager|plain us|ours/plain".replace(" us", "\nus").replace("/", "/\n")
    for group in dict.fromkeys(r["group"] for r in records):
        rows = []
        for prep in report.pick(records, group=group, provider="prep ours"):
            fields = {"group": group, "case": prep["case"], "batch": prep["batch"]}
            conv, plain = (report.pick(records, provider=f"conv {who}", **fields)[0] for who in ("ours", "plain"))
            cells = [prep["case"], str(prep["batch"])]
            for kind, ours in (("prep", prep), ("conv", conv)):
                cells += [f"{ours['p50'] * 1e6:.0f}", report.ratio_text(ours["speedups"][f"{kind} eager"])]
            rows.append([*cells, f"{plain['p50'] * 1e6:.0f}", f"{conv['overhead']['ratio']:.2f}x"])
        screen.print(console.table(f"{group}, forward + backward", heads.split("|"), rows))
    for kind in ("prep", "conv") if records else ():
        ratios = [r["speedups"][f"{kind} eager"]["ratio"] for r in report.pick(records, provider=f"{kind} ours")]
        numbers = f"{geometric_mean(ratios):.2f}x  minimum {min(ratios):.2f}x  >= 1x: {sum(r >= 1 for r in ratios)}"
        screen.print(f"{kind} eager/ours: geomean {numbers} of {len(ratios)}", highlight=False)
    screen.print("Ratios of median times; yellow: the 95 % interval holds 1; red: ours is slower.")


def main() -> None:
    parser = command.parser(__doc__, 1.0, "groups and layers, of all of them, such as reflect")
    parser.add_argument("--all", action="store_true", help="all distinct layers of ResNet-50, not some of each stage")
    arguments = parser.parse_args()
    limits = harness.limits(arguments.device, arguments.rounds, arguments.seconds)
    has_resnet = importlib.util.find_spec("torchvision") is not None
    every = [*(resnet50() if has_resnet else ()), *EXPLICIT]
    chosen = [e for e in every if arguments.all or arguments.only or e.group != "ResNet-50" or e.name in SUBSET]
    chosen = command.chosen({f"{e.group}: {e.name}": e for e in chosen}, arguments.only)
    run = command.Run(arguments.device, arguments.out / "conv_layers.jsonl")
    torch.manual_seed(0)
    with console.progress(run.console) as progress:
        task = progress.add_task("", total=len(chosen) * len(BATCHES))
        for layer, batch in itertools.product(chosen, BATCHES):
            progress.update(task, description=f"{layer.name}, batch {batch}")
            with run.case(f"{layer.name}, batch {batch}"):
                run.add(measure(layer, batch, arguments.device, limits))
            progress.advance(task)
    print_report(run.console, run.records)
    if not has_resnet:
        run.console.print("[yellow]left out: ResNet-50: torchvision is not installed[/yellow]", highlight=False)
    run.end()


if __name__ == "__main__":
    main()
