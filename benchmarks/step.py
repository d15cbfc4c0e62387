"""python -m benchmarks.step: the cost of a training step with aligned weights, against the same model without.

ResNet-50 (torchvision), an NFNet and a BiT model (timm), random images, cross-entropy, SGD with momentum; float32 on
the CPU, autocast to bfloat16 in channels_last on CUDA. plain: the same model without alignment, timm's standardised
layers replaced by torch's; eager: the formula in PyTorch; timm: F.batch_norm of the weight, or in its models their own
layers; compile: torch.compile of the formula over all weights at once; ours: wa.convert, foreach or per layer.

Peak memory is what PyTorch has allocated for a model during one separate step: parameters, buffers, momentum and, at
its peak, all that the step adds. On the CPU it is summed from the profiler's allocation events (a library's own mallocs
are not included), and a step under autocast is measured as well, for memory only.
Writes step.jsonl, one record per line.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import command, console, goals, harness, machine, report
from .console import Console
from .harness import Limits, WrongResultError
from .providers import Setting, short, why_no_compile
from .stats import median_ratio, spread
from .step_models import NETWORKS, RESNET, Network, variants

# Largest relative difference of the first loss, and of the second, which depends on the first's gradients: those of a
# batch norm over one image differ by a few per cent between any two roundings. Checked in float32: rounded to bfloat16
# on the way, the losses of a residual network of 50 layers also differ by some per cent.
TOLERANCES = (2e-5, 1e-3)
LEARNING_RATE = 1e-5
PROVIDERS = ("plain", "eager", "timm", "compile", "ours per layer")
Record = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A network on images of one size. If not `timed`, only its memory is measured."""

    network: Network
    batch: int
    size: int
    setting: Setting
    timed: bool = True

    @property
    def name(self) -> str:
        return f"{self.network.name} batch {self.batch}" + ("" if self.timed else " autocast")

    @property
    def in_float32(self) -> "Case":
        return replace(self, setting=replace(self.setting, out_dtype=torch.float32))

    @property
    def with_compile(self) -> bool:
        """In one case only, because a model's list of weights takes long to compile."""
        return self.timed and self.network is RESNET and self.batch == 1

    @property
    def cost(self) -> int:
        """Roughly in seconds on two cores, for the estimate of the time left."""
        return 20 + 10 * self.batch if self.timed else 10


def cases(device: str, size: int) -> list[Case]:
    """On a GPU also a large batch, because a batch of one is bound by launches."""
    half = Setting(device, torch.float32, torch.bfloat16, torch.channels_last)
    networks = [network for network in NETWORKS if network.is_installed]
    if device == "cuda":
        return [Case(n, batch, size, half) for n in networks for batch in (*n.batches, 64)]
    timed = [Case(n, batch, size, Setting(device)) for n in networks for batch in n.batches]
    return timed + [Case(n, 1, size, half, timed=False) for n in networks]


class Training:
    """A model and what its steps need."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, setting: Setting) -> None:
        self.setting, self.labels = setting, labels
        self.model = model.to(setting.device, memory_format=setting.out_layout).train()
        self.images = images.to(memory_format=setting.out_layout)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, foreach=True)

    def step(self) -> Tensor:
        half = self.setting.out_dtype != self.setting.dtype
        with torch.autocast(self.setting.device, self.setting.out_dtype, enabled=half):
            loss = F.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def peak_bytes(self) -> int:
        self.step()  # allocates the momentum
        momentum = [each["momentum_buffer"] for each in self.optimizer.state.values()]
        lasting = sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers(), *momentum))
        return lasting + harness.peak_bytes(self.step, self.setting.device == "cuda")


def trainings(case: Case, with_compile: bool) -> dict[str, Training]:
    """Each provider's training, with the same weights and images."""
    torch.manual_seed(0)
    images = torch.randn(case.batch, 3, case.size, case.size, device=case.setting.device)
    labels = torch.randint(10, (case.batch,), device=case.setting.device)
    found = {}
    for name, variant in variants(case.network, case.setting, with_compile).items():
        torch.manual_seed(0)
        found[name] = Training(variant(case.network.build()), images, labels, case.setting)
    return found


def check(entrants: dict[str, Training]) -> dict[str, float | None]:
    """Relative difference of the first loss from timm's; None for plain, which computes another function.
    WrongResultError if that or the second loss exceeds the tolerance."""
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        losses = {name: torch.stack([entrant.step() for _ in range(2)]) for name, entrant in entrants.items()}
    errors: dict[str, float | None] = {}
    for name, found in losses.items():
        error = ((found - losses["timm"]) / losses["timm"]).abs().cpu()
        close = error <= torch.tensor(TOLERANCES)
        if not (found.isfinite() if name == "plain" else close).all():  # NaN is wrong too
            raise WrongResultError(f"{name}: losses {found.tolist()}, timm's {losses['timm'].tolist()}")
        errors[name] = None if name == "plain" else float(error[0])
    return errors


def sample(entrants: dict[str, Training], cuda: bool, limits: Limits) -> dict[str, dict[str, list[float]]]:
    """Seconds of each provider's steps, by clock."""
    timers = {"wall": {name: harness.wall_timer([each.step], cuda)[0] for name, each in entrants.items()}}
    if cuda:
        stream = torch.cuda.current_stream()
        timers["graph"] = {name: harness.graph_timer([e.step], 1, stream)[0] for name, e in entrants.items()}
    return {clock: harness.interleave(own, limits) for clock, own in timers.items()}


def measure(case: Case, limits: Limits, with_compile: bool) -> list[Record]:
    """A record of each provider's memory, and one of its time for each clock."""
    cuda = case.setting.device == "cuda"
    with torch.cuda.stream(torch.cuda.Stream() if cuda else None):  # graphs cannot be captured on the default stream
        errors = check(trainings(case.in_float32, with_compile))
        entrants = trainings(case, with_compile)
        # As one sample each: their ratios have no interval.
        measured = {"memory": {name: [entrant.peak_bytes()] for name, entrant in entrants.items()}}
        if case.timed:
            measured |= sample(entrants, cuda, limits)
    with torch.device("meta"):
        n_layers = len(case.network.layers(case.network.build()))
    records = []
    for clock, samples in measured.items():
        for name, own in samples.items():
            rivals = [rival for rival in samples if rival != name] if name.startswith("ours") else []
            records.append({
                "suite": "step memory" if clock == "memory" else "step", "case": case.network.name, "provider": name,
                "direction": "both", "clock": clock, "dtype": short(case.setting.dtype),
                "out_dtype": short(case.setting.out_dtype), "layout": short(case.setting.out_layout),
                "out_layout": short(case.setting.out_layout), "shape": [case.batch, 3, case.size, case.size],
                "n_layers": n_layers, "batch": case.batch,
                "max_error": errors[name], **spread(own),
                "speedups": {rival: median_ratio(samples[rival], own).to_json() for rival in rivals},
                "overhead": median_ratio(own, samples["plain"]).to_json(),
            })  # fmt: skip
    return records


def print_report(screen: Console, records: Sequence[Record], left_out: Sequence[str]) -> None:
    """Times and memory, losses included, then the goals."""
    kinds = dict.fromkeys((r["clock"], r["out_dtype"]) for r in records)
    for clock, dtype in sorted(kinds):
        some = [r for r in report.pick(records, clock=clock, out_dtype=dtype) if r["provider"].startswith("ours")]
        rows = [(f"{r['case']}, {r['batch']}, {r['provider'].removeprefix('ours ')}", r) for r in some]
        what, unit = ("peak memory", "MB") if clock == "memory" else (f"{clock} time", "ms")
        screen.print(report.table(f"Training step, {dtype}, {what}", "network, batch, ours", rows, PROVIDERS, unit))
    screen.print("\n".join(goals.lines(records)), highlight=False, soft_wrap=True)
    for line in dict.fromkeys(left_out):
        screen.print(f"[yellow]left out: {line}[/yellow]", highlight=False)
    screen.print("Tables: median of the rival / of ours; yellow: the 95 % interval holds 1; red: ours takes more.")


def main() -> None:
    parser = command.parser(__doc__, 20.0, f"networks and batches such as '{RESNET.name} batch 1'")
    parser.add_argument("--size", type=int, help="height and width of the images (default: 224, simulated devices 128)")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes long to compile")
    arguments = parser.parse_args()
    limits = harness.limits(arguments.device, arguments.rounds, arguments.seconds)
    run = command.Run(arguments.device, arguments.out / "step.jsonl")
    left_out = [f"{n.name}: {n.package} is not installed" for n in NETWORKS if not n.is_installed]
    size = arguments.size or (128 if machine.is_simulated(run.facts) else 224)
    possible = {case.name: case for case in cases(arguments.device, size)}
    chosen = command.chosen(possible, arguments.only) if possible else []
    with console.progress(run.console) as progress:
        task = progress.add_task("torch.compile, first try", total=sum(case.cost for case in chosen))
        tried = [case for case in chosen if case.with_compile and not arguments.no_compile]
        reasons = {case: why_no_compile(case.setting) for case in tried}
        left_out += [f"compile: {reason}" for case, reason in reasons.items() if reason]
        for case in chosen:
            progress.update(task, description=case.name)
            with run.case(case.name):
                run.add(measure(case, limits, with_compile=reasons.get(case, "not asked") is None))
            progress.advance(task, case.cost)
    print_report(run.console, run.records, left_out)
    run.end()


if __name__ == "__main__":
    main()
