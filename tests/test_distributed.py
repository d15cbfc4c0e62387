"""Two gloo processes: the losses of a single process under DDP and FSDP2, and checkpoints of sharded models."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from truth import normal
from varied import converted, vary

import weightalign_cuda as wa

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")


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


def sharded_network(is_varied=False, device="cpu", gains=(), is_sharded=True):
    """gains: the dimensions of each layer's gain, 1 if left out."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DeviceMesh

    torch.manual_seed(1)
    layers = [wa.WAConv2d(3, 5, 3, device=device), wa.WAConvTranspose2d(5, 4, 2, device=device)]
    model = nn.Sequential(*layers, wa.WALinear(6, 1, device=device))
    if is_varied:
        vary(model)
    for layer, rank in zip(model, gains, strict=False):
        layer.gain = nn.Parameter(layer.gain.detach().reshape(-1, *[1] * (rank - 1)))
    return fully_shard(model, mesh=DeviceMesh("cpu", [0, 1])) if is_sharded else model


def assert_gains(model, values):
    for layer, expected in zip(model, values, strict=True):
        assert layer.gain.placements == layer.weight.placements and layer.gain.device.type == "cpu"
        torch.testing.assert_close(layer.gain.full_tensor().detach().flatten(), expected, rtol=0, atol=0)
    model(normal(2, 3, 6, 7)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def without_gains(state):
    return {name: t for name, t in state.items() if "gain" not in name}


def load_sharded(rank):
    from torch.distributed.checkpoint.state_dict import set_model_state_dict

    varied, ones = (
        [layer.gain.detach() for layer in sharded_network(True, is_sharded=False)],
        [torch.ones(n) for n in (5, 4, 1)],
    )
    sharded = sharded_network(True).state_dict()
    for state, expected in ((without_gains(sharded), ones), (sharded, varied)):
        for is_assigned in (False, True):
            for gains in ((), (4, 4, 2)):
                model = sharded_network(expected is ones, gains=gains)
                model.load_state_dict(dict(state), strict=True, assign=is_assigned)
                assert_gains(model, expected)
                assert [layer.gain.dim() for layer in model] == list(gains or (1, 1, 1))
        for is_already_sharded in (True, False):
            model = sharded_network(device="meta", is_sharded=is_already_sharded)
            model.load_state_dict(dict(state), assign=True)
            if is_already_sharded:
                assert_gains(model, expected)
            assert [layer.gain.placements for layer in model] == [layer.weight.placements for layer in model]
        model = sharded_network(expected is ones)
        set_model_state_dict(model, dict(state))
        assert_gains(model, expected)
    model = sharded_network()
    model.load_state_dict(sharded_network(True, gains=(4, 4, 2)).state_dict())
    assert_gains(model, varied)


def load_full(rank):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    state = sharded_network(True, is_sharded=False).state_dict()
    ones = [torch.ones(n) for n in (5, 4, 1)]
    varied = [layer.gain.detach() for layer in sharded_network(True, is_sharded=False)]
    # Where each process has the whole, torch completes it with what the model has, which ours cannot tell from loaded.
    for options, is_varied, expected in (
        ({"broadcast_from_rank0": True}, True, ones),
        ({}, False, ones),
        ({}, True, varied),
    ):
        model = sharded_network(is_varied)
        set_model_state_dict(model, without_gains(state), options=StateDictOptions(full_state_dict=True, **options))
        assert_gains(model, expected)


@pytest.mark.parametrize("load", [load_sharded, load_full])
def test_loading(in_two_processes, load):
    in_two_processes(load)


def refuse_sharded_models(rank):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DeviceMesh

    plain = fully_shard(nn.Sequential(nn.Conv2d(3, 4, 3)), mesh=DeviceMesh("cpu", [0, 1]))
    with pytest.raises(ValueError, match=r"model: .*got a DTensor at '0'; convert it before sharding"):
        wa.convert(plain)
    assert type(plain[0]).__name__.endswith("Conv2d") and not wa.gain_parameters(plain)
    for inplace in (False, True):
        with pytest.raises(
            ValueError, match=r"model: .*got a DTensor at '0'; fold the unsharded model.*full state dict"
        ):
            wa.fold(sharded_network(), inplace=inplace)


def test_sharded_models(in_two_processes):
    in_two_processes(refuse_sharded_models)
