"""benchmarks/scaling.py: the bytes and launches it predicts are those of steps on 2 to 4 processes."""

import collections

import pytest
import torch
import torch.distributed as dist
from count_ops import CountOps
from torch.utils._python_dispatch import TorchDispatchMode
from truth import BF16, F32

import weightalign_cuda as wa
from benchmarks import scaling

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
COUNTS = (2, 3, 4)


class Sent(TorchDispatchMode):
    """Bytes of the largest tensor of each collective: what is gathered, and what is reduced."""

    def __init__(self):
        super().__init__()
        self.bytes = collections.Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if op.namespace == "c10d":
            tensors = [t for t in torch.utils._pytree.tree_leaves((args, result)) if isinstance(t, torch.Tensor)]
            self.bytes[op._opname] += max(t.numel() * t.itemsize for t in tensors)
        return result


def step(wrap):
    """Bytes of each collective and launches, in a step of the model as it is wrapped; and its groups."""
    torch.manual_seed(0)
    model, block = scaling.small_network()
    groups = scaling.groups_of(model, [block])
    model = wrap(model, block)
    images = torch.randn(2, 3, 8, 8)
    for _ in range(2):  # DDP sends more until its buckets are made
        model(images).sum().backward()
    with Sent() as sent, CountOps() as ops:
        model(images).sum().backward()
    return sent.bytes, ops.calls["align_forward"] + ops.calls["align_backward"], groups


def sharded(rank, count, way):
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.fsdp import fully_shard as of_torch
    from torch.distributed.tensor import DeviceMesh

    mesh = DeviceMesh("cpu", list(range(count)))  # all processes have to make it
    if rank >= count:
        return
    fully_shard = wa.fully_shard if way.gathers_filters else of_torch
    options = {"mp_policy": MixedPrecisionPolicy(BF16, F32)} if way.gathered is BF16 else {}

    def wrap(model, block):
        fully_shard(block, mesh=mesh, **options)
        return fully_shard(model, mesh=mesh, **options)

    sent, launches, groups = step(wrap)
    predicted = scaling.gathered(groups, way, count), scaling.reduced(groups, way, count)
    assert sent == dict(zip(("_allgather_base_", "_reduce_scatter_base_"), predicted, strict=True))
    assert launches == scaling.alignment(groups, way, count).launches


@pytest.mark.parametrize("way", [*scaling.WAYS, scaling.Way("ours, float32", F32, True)], ids=lambda way: way.name)
@pytest.mark.parametrize("count", COUNTS)
def test_bytes_and_launches(in_four_processes, count, way):
    in_four_processes(sharded, count, way)


def replicated(rank, count):
    group = dist.new_group(range(count))
    if rank >= count:
        return

    def wrap(model, _):
        wa.convert(model, foreach=True)
        return torch.nn.parallel.DistributedDataParallel(model, process_group=group)

    sent, launches, groups = step(wrap)
    assert sent == {"allreduce_": scaling.all_reduced(groups) / 2}
    assert launches == scaling.replicated_alignment(groups).launches


@pytest.mark.parametrize("count", COUNTS)
def test_bytes_of_ddp(in_four_processes, count):
    in_four_processes(replicated, count)


def test_times():
    assert scaling.ring_seconds(int(0.8 * 450e9), 8) == pytest.approx(7 / 8)
    assert scaling.ring_seconds(int(0.8 * 400e9), 64) == pytest.approx(63 / 64)
    block = scaling.Group([(8, 10, 10)], [(8,)], [(8,)], gathers=2)  # 800 values, 200 of them on each of 4 GPUs
    moved = [scaling.alignment([block], way, 4).moved for way in scaling.WAYS]
    assert moved == [800 * 10 + 2 * 200 * 6, 800 * 16, 2 * 200 * 6 + 200 * 12]
    assert scaling.alignment([block], scaling.OURS, 512).moved == 100 * (2 * 6 + 12)  # one filter
    assert scaling.replicated_alignment([block]).moved == moved[1]
    assert scaling.Cost(int(0.8 * 3.35e12), 1000).seconds == pytest.approx(1.003)
