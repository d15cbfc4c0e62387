"""Two gloo processes: sharded weights aligned locally, and the losses of a single process under DDP and FSDP2."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from count_ops import CountOps
from processes import in_processes
from torch import nn
from truth import BF16, F64, formula, normal
from varied import converted, numbers

import weightalign_cuda as wa

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")


@pytest.fixture(scope="module")
def in_two_processes():
    with in_processes(2) as run:
        yield run


def align_sharded(rank):
    from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh, grid = DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [[0, 1]], mesh_dim_names=("a", "b"))
    cases = [  # uneven, empty on the second process, even; mixed meshes; channels_last
        ((5, 3, 3, 3), mesh, [Shard(0)]),
        ((1, 4), mesh, [Shard(0)]),
        ((4, 2, 3, 3), mesh, [Replicate()]),
        ((6, 7), grid, [Replicate(), Shard(0)]),
        ((4, 3, 2), grid, [Shard(0), Shard(0)]),
    ]
    plain, placed = [], []
    for i, (shape, where, placements) in enumerate(cases):
        weight, gain = normal(*shape, seed=i, dtype=F64), normal(shape[0], seed=50 + i, dtype=F64)
        weight = weight.contiguous(memory_format=torch.channels_last) if i == 2 else weight
        plain.append([t.clone().requires_grad_() for t in (weight, gain)])
        placed.append([distribute_tensor(t, where, placements).requires_grad_() for t in (weight, gain)])
    plain.append([normal(3, 4, dtype=F64).requires_grad_(), None])  # and one that is not a DTensor
    placed.append([plain[-1][0].detach().requires_grad_(), None])
    options = numbers(len(plain))
    each = list(zip(*options.values(), strict=True))
    expected = [formula(*pair, *own) for pair, own in zip(plain, each, strict=True)]
    with CommDebugMode() as communication, CountOps() as ops:
        together = wa.align_foreach(*zip(*placed, strict=True), **options)
        alone = [wa.align(*pair, eps=eps, scale=scale) for pair, (eps, scale) in zip(placed, each, strict=True)]
    assert ops.calls["align_forward"] == 1 + len(placed) and communication.get_total_counts() == 0
    for pair, one, other, truth in zip(placed, together, alone, expected, strict=True):
        outside = normal(*truth.shape, seed=9, dtype=F64)
        grads = []
        for result in (one, other):
            grad = outside
            if isinstance(pair[0], DTensor):
                assert (result.device_mesh, result.placements) == (pair[0].device_mesh, pair[0].placements)
                assert result.shape == pair[0].shape and result.stride() == pair[0].stride()
                grad = distribute_tensor(outside, result.device_mesh, result.placements)
            leaves = [t for t in pair if t is not None]
            with communication:
                grads.append(torch.autograd.grad(result, leaves, grad, retain_graph=True))
            assert communication.get_total_counts() == 0  # each `with` starts from 0
            assert all(
                getattr(g, "placements", 0) == getattr(t, "placements", 0)
                for g, t in zip(grads[-1], leaves, strict=True)
            )
            grads[-1] = [whole(t) for t in (result, *grads[-1])]
        index = [id(t) for t in expected].index(id(truth))
        leaves = [t for t in plain[index] if t is not None]
        true = [truth.detach(), *torch.autograd.grad(truth, leaves, outside, retain_graph=True)]
        for found in grads:
            for a, b in zip(found, true, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    weight, gain = placed[0]
    turned = DeviceMesh("cpu", [1, 0])
    for bad, message in (
        (Shard(1), r"weight: expected a DTensor placed by Shard\(0\).* got S(hard\(dim=)?\(?1"),
        (Partial(), r"weight: expected a DTensor placed by Shard\(0\).*got P"),
    ):
        with pytest.raises(ValueError, match=message):
            wa.align(DTensor.from_local(normal(4, 4), mesh, [bad]))
        with pytest.raises(ValueError, match=message.replace("weight", r"weights\[1\]")):
            wa.align_foreach([normal(4, 4), DTensor.from_local(normal(4, 4), mesh, [bad])])
    for pair in (
        (weight, plain[0][1]),
        (plain[0][0], gain),
        (weight, distribute_tensor(plain[0][1], mesh, [Replicate()])),
        (weight, distribute_tensor(plain[0][1], turned, [Shard(0)])),
    ):
        with pytest.raises(ValueError, match="gain: expected the weight's placement"):
            wa.align(*pair)
        with pytest.raises(ValueError, match=r"gains\[1\]: expected the weight's placement"):
            wa.align_foreach([weight, pair[0]], [gain, pair[1]])
    for last in (
        wa.align(weight.detach(), memory_format=torch.channels_last),
        *wa.align_foreach([weight.detach()], memory_format=torch.channels_last),
    ):
        assert last.stride() == (27, 1, 9, 3)
        assert last.to_local().is_contiguous(memory_format=torch.channels_last)
    pair = weight.detach().float(), gain.detach()
    for low in (wa.align(*pair, dtype=BF16), *wa.align_foreach(*zip(pair), dtype=BF16)):
        assert low.dtype == BF16 and low.placements == weight.placements


def whole(t):
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach()


def test_sharded_weights(in_two_processes):
    in_two_processes(align_sharded)


def network(**options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1, bias=False),
        nn.ReLU(),
        wa.WAConv2d(5, 6, 3, stride=2, padding="same_tf", activation="relu"),
        nn.Sequential(nn.ConvTranspose2d(6, 4, 2, groups=2), nn.ReLU(), nn.Conv2d(4, 3, 1)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 3),
    )
    return converted(model, **options)


def train(model, rank, count):
    """Losses of steps on this process's share of each batch, and the output afterwards."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for seed in range(3):
        optimizer.zero_grad()
        images, labels = normal(8, 3, 9, 8, seed=seed).chunk(count)[rank], (torch.arange(8) % 3).chunk(count)[rank]
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    losses = torch.stack(losses)
    if count > 1:
        dist.all_reduce(losses)
    return losses / count, model(normal(2, 3, 9, 8, seed=20)).detach()


def train_wrapped(rank, wrap, options):
    return train(wrap(network(**options)), rank, 2)


def by_fsdp2(model):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (2,))  # the default would be the machine's GPUs
    fully_shard(model[3], mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.parametrize(
    ("wrap", "options"),
    [
        (nn.parallel.DistributedDataParallel, {}),
        (nn.parallel.DistributedDataParallel, {"foreach": True}),
        (nn.parallel.DistributedDataParallel, {"foreach": 2}),
        (by_fsdp2, {}),
    ],
    ids=["DDP", "DDP foreach", "DDP buckets", "FSDP2"],
)
def test_losses_equal_one_process(in_two_processes, wrap, options):
    found = in_two_processes(train_wrapped, wrap, options)
    for one, other in zip(found, train(network(), 0, 1), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def convert_wrapped(rank):
    with pytest.raises(TypeError, match=r"expected the model itself, .* got DistributedDataParallel"):
        wa.convert(nn.parallel.DistributedDataParallel(nn.Conv2d(2, 2, 3)))


def test_convert_asks_for_the_model_itself(in_two_processes):
    in_two_processes(convert_wrapped)


def refuse_fsdp2(rank):
    before, after = by_fsdp2(network()), by_fsdp2(network(foreach=True))
    with pytest.raises(RuntimeError, match=r"foreach: .*FSDP2 gathers.*convert\(model, foreach=False\)"):
        wa.convert(before, foreach=True)
    with pytest.raises(RuntimeError, match=r"foreach: .*FSDP2 gathers"):
        after(normal(2, 3, 9, 8))
    wa.convert(after)
    after(normal(2, 3, 9, 8)).sum().backward()
    with pytest.raises(RuntimeError, match=r"wa\.accumulate: .*FSDP2 gathers"), wa.accumulate(after):
        pass


def test_incompatible_with_fsdp2(in_two_processes):
    in_two_processes(refuse_fsdp2)


def accumulate_under_ddp(model, rank, count, options):
    """Parameters after steps of three micro-batches, only the last of which synchronises, with validation between."""
    model = wa.convert(model, **options)
    model = nn.parallel.DistributedDataParallel(model) if count > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for seed in range(3):
        optimizer.zero_grad()
        with wa.accumulate(model):
            for i in range(3):
                x = normal(4, 3, 9, 8, seed=10 * seed + i).chunk(count)[rank]
                with model.no_sync() if count > 1 and i < 2 else contextlib.nullcontext():
                    model(x).square().mean().backward()
                with torch.no_grad():
                    model(x)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def accumulate_in_each(rank, options):
    found = accumulate_under_ddp(network(), rank, 2, options)
    for parameter in found:
        first = parameter.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, parameter)
    return found


@pytest.mark.parametrize("options", [{}, {"foreach": True}], ids=["each layer", "foreach"])
def test_accumulation_under_ddp(in_two_processes, options):
    found, expected = in_two_processes(accumulate_in_each, options), accumulate_under_ddp(network(), 0, 1, options)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    before = list(network().parameters())
    assert not torch.equal(before[0], found[0])


def accumulate_wrongly(rank):
    rule, x = r"wa\.accumulate: under DistributedDataParallel all micro-batches but the last", normal(2, 3, 9, 8)
    model = nn.parallel.DistributedDataParallel(network())
    with pytest.raises(RuntimeError, match=f"{rule}.*got another one after"), wa.accumulate(model):
        for _ in range(2):
            model(x).sum().backward()
    model = nn.parallel.DistributedDataParallel(network())
    with (
        pytest.raises(RuntimeError, match=f"{rule}.*got none that synchronises"),
        wa.accumulate(model),
        model.no_sync(),
    ):
        model(x).sum().backward()
    for option in ("find_unused_parameters", "static_graph"):
        model = nn.parallel.DistributedDataParallel(network(), **{option: True})
        with pytest.raises(RuntimeError, match=f"DistributedDataParallel with .*{option}"), wa.accumulate(model):
            pass


def test_accumulation_without_synchronisation_is_an_error(in_two_processes):
    in_two_processes(accumulate_wrongly)
