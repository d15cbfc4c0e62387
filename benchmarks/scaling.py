"""python -m benchmarks.scaling: what a sharded step sends and aligns on 8, 64 and 512 GPUs, by a model on paper.

Nothing here was measured on GPUs. A test compares bytes and numbers of launches with those of 2 to 4 processes. Times
are bytes over rates, and assume:

- Each block and the rest of the model is a group: one message a collective. In a step a block is gathered for the
  forward and again for the backward, the rest once; every gradient is reduced once, in float32.
- FSDP2 shards every parameter along dimension 0, and pads to as many rows for each process.
- Collectives are rings: each GPU sends (P-1)/P of the bytes, at 0.8 of the rate of the slower link. That is NVLink 4's
  450 GB/s a direction and GPU; on several nodes of 8 GPUs that of InfiniBand NDR, 8 adapters of 50 GB/s a node, a ring
  through each. All three ways of FSDP2 send the same number of messages, whose latency is left out.
- Alignment moves bytes at 0.8 of an H100's 3.35 TB/s, and every launch costs 3 us besides. Filters, and the gradients
  that convolutions return for them, are bfloat16, by the policy or by autocast. The time is that of the process with
  the most filters.
- Nothing overlaps. In a training step communication hides behind computation as long as there is enough of it, and then
  costs next to nothing.
- Copies into and out of messages, the same in all ways for each byte sent, are left out.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

import weightalign_cuda as wa
from weightalign_cuda.layers import aligned_layers

from . import console

GPUS = (8, 64, 512)
NODE = 8
NVLINK, INFINIBAND, MEMORY = 450e9, 50e9, 3.35e12  # bytes a second and GPU; of links, in each direction
EFFICIENCY = 0.8
LAUNCH = 3e-6  # seconds
FILTER = torch.bfloat16.itemsize
MASTER = torch.float32.itemsize  # of weights and their gradients where they lie
# By their names in timm, with the class of their residual blocks.
MODELS = {
    "ResNet-50": ("resnet50", "Bottleneck"),
    "NFNet-F6": ("nfnet_f6", "NormFreeBlock"),
    "BiT-R152x4": ("resnetv2_152x4_bit", "PreActBottleneck"),
}
Shape = tuple[int, ...]
Cells = list[list[str]]  # the first row is the head


@dataclass(frozen=True)
class Group:
    """The parameters that one call of fully_shard takes."""

    filters: list[Shape]
    gains: list[Shape]
    others: list[Shape]
    gathers: int  # in a step


@dataclass(frozen=True)
class Way:
    """Of sharding by FSDP2. Gradients are reduced in float32."""

    name: str
    gathered: torch.dtype
    gathers_filters: bool = False  # instead of raw weights, and their gains

    def sent(self, group: Group) -> list[Shape]:
        return [*group.filters, *group.others, *(() if self.gathers_filters else group.gains)]


PLAIN = Way("FSDP2, bfloat16", torch.bfloat16)
PRECISE = Way("FSDP2, float32", torch.float32)
OURS = Way("wa.fully_shard, bfloat16", torch.bfloat16, gathers_filters=True)
WAYS = PLAIN, PRECISE, OURS


@dataclass(frozen=True)
class Cost:
    """Of alignment, in a step."""

    moved: int  # bytes, from and to memory
    launches: int

    @property
    def seconds(self) -> float:
        return self.moved / (EFFICIENCY * MEMORY) + self.launches * LAUNCH


def groups_of(model: nn.Module, blocks: Iterable[nn.Module]) -> list[Group]:
    """As fully_shard forms them, called on these blocks and then on the model."""
    found, taken = [], set[nn.Module]()
    for root in (*blocks, model):
        modules = [m for m in root.modules() if m not in taken]
        taken.update(modules)
        layers = aligned_layers(modules)
        filters, gains = [layer.weight for layer in layers], wa.gain_parameters(nn.ModuleList(layers))
        parameters = {p for m in modules for p in m._parameters.values() if p is not None}
        others = parameters.difference(filters, gains)
        shapes = ([tuple(p.shape) for p in some] for some in (filters, gains, others))
        found.append(Group(*shapes, gathers=1 if root is model else 2))
    return found


def values(shapes: Iterable[Shape]) -> int:
    return sum(map(math.prod, shapes))


def share(shapes: Iterable[Shape], processes: int) -> int:
    """Values of the process that has the most: what each one sends, padded."""
    return sum(-(-shape[0] // processes) * math.prod(shape[1:]) for shape in shapes)


def gathered(groups: Iterable[Group], way: Way, processes: int) -> int:
    """Bytes of the results of all-gathers."""
    return sum(g.gathers * share(way.sent(g), processes) for g in groups) * processes * way.gathered.itemsize


def reduced(groups: Iterable[Group], way: Way, processes: int) -> int:
    """Bytes that a process gives to reduce-scatters."""
    return sum(share(way.sent(g), processes) for g in groups) * processes * MASTER


def ring_seconds(size: int, processes: int) -> float:
    rate = NVLINK if processes <= NODE else min(NVLINK, INFINIBAND * NODE)
    return size * (processes - 1) / processes / (EFFICIENCY * rate)


def alignment(groups: Sequence[Group], way: Way, processes: int) -> Cost:
    """From shards in float32 to filters; from the filters' gradients to those of raw weights, before they are reduced
    or, where filters are gathered, after."""
    own = sum(g.gathers * share(g.filters, processes) for g in groups)
    all_filters = [shape for g in groups for shape in g.filters]
    if way.gathers_filters:
        backward = 3 * MASTER * share(all_filters, processes)  # gradients and weights in, gradients out
        launches = sum(g.gathers + 1 for g in groups if g.filters)
        return Cost(own * (MASTER + FILTER) + backward, launches)
    size = way.gathered.itemsize
    each = size + FILTER, FILTER + size + size
    cast = own * (MASTER + size) if size != MASTER else 0  # by a launch that biases need in any way
    return Cost(values(all_filters) * sum(each) + cast, 2 * len(all_filters))


def replicated_alignment(groups: Iterable[Group]) -> Cost:
    """With DistributedDataParallel and foreach=True: as FSDP2 in float32, in one launch."""
    return Cost(values(s for g in groups for s in g.filters) * (3 * MASTER + 2 * FILTER), 2)


def all_reduced(groups: Iterable[Group]) -> int:
    """Bytes of DistributedDataParallel, which sends them twice: to sum, and to spread the sum."""
    return 2 * MASTER * values(s for g in groups for s in (*g.filters, *g.gains, *g.others))


@functools.cache
def groups_of_model(name: str) -> list[Group]:
    import timm

    architecture, block = MODELS[name]
    with torch.device("meta"):
        model = wa.convert(timm.create_model(architecture))
    return groups_of(model, [m for m in model.modules() if type(m).__name__ == block])


def small_network() -> tuple[nn.Module, nn.Module]:
    """A model, and the block in it. Numbers of filters from 1 to 8, so that shards are uneven or empty."""
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1, bias=False),
        nn.GroupNorm(1, 5),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(5, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1), nn.Conv2d(2, 1, 3, padding=1)),
        nn.Conv2d(1, 8, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    return wa.convert(model), model[3]


def bytes_table() -> Cells:
    with torch.device("meta"):
        model, block = small_network()
    groups = groups_of(model, [block])
    rows = [["processes", *(f"{way.name}: gathered; reduced" for way in WAYS)]]
    for count in (2, 3, 4):
        rows.append([str(count), *(f"{gathered(groups, w, count)}; {reduced(groups, w, count)}" for w in WAYS)])
    return rows


def models_table() -> Cells:
    rows = [["", "parameters", "in aligned filters", "aligned layers", "groups"]]
    for name in MODELS:
        groups = groups_of_model(name)
        filters = [s for g in groups for s in g.filters]
        parameters = values(s for g in groups for s in PLAIN.sent(g))
        rows.append([name, f"{parameters / 1e6:.1f} M", f"{values(filters) / parameters:.0%}", str(len(filters))])
        rows[-1].append(str(len(groups)))
    return rows


def communication_table() -> Cells:
    def cell(size: int, gpus: int) -> str:
        return f"{1e3 * ring_seconds(size, gpus):.2f} ms ({size / 1e9:.2f} GB)"

    rows = [["", "GPUs", *(way.name for way in WAYS), "DDP, float32", "padding of wa.fully_shard"]]
    for name in MODELS:
        groups = groups_of_model(name)
        for gpus in GPUS:
            sizes = (gathered(groups, way, gpus) + reduced(groups, way, gpus) for way in WAYS)
            without = gathered(groups, OURS, 1) + reduced(groups, OURS, 1)
            padding = (gathered(groups, OURS, gpus) + reduced(groups, OURS, gpus)) / without
            cells = [cell(size, gpus) for size in (*sizes, all_reduced(groups))]
            rows.append([name, str(gpus), *cells, f"{padding:.2f}x"])
    return rows


def alignment_table() -> Cells:
    rows = [["", "GPUs", *(way.name for way in WAYS), "DDP, foreach"]]
    for name in MODELS:
        groups = groups_of_model(name)
        for gpus in GPUS:
            costs = [*(alignment(groups, way, gpus) for way in WAYS), replicated_alignment(groups)]
            rows.append([name, str(gpus), *(f"{1e3 * cost.seconds:.2f} ms ({cost.launches})" for cost in costs)])
    return rows


def main() -> None:
    screen = console.Console(width=160)
    for title, (head, *rows) in (
        ("Models", models_table()),
        ("Bytes of a step of the small network", bytes_table()),
        ("Communication in a step", communication_table()),
        ("Alignment in a step, with its launches", alignment_table()),
    ):
        screen.print(console.table(title, head, rows))


if __name__ == "__main__":
    main()
