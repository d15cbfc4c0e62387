"""wa.fully_shard: gradients equal those of one process, in float64, whatever FSDP2 is asked to do."""

import functools
import re
import shutil
import tempfile

import pytest
import torch
import torch.distributed as dist
from count_ops import CountOps
from sharded import (
    assert_same,
    batch,
    check_gradients,
    gradients,
    loss_of,
    network,
    shard,
    true_gradients,
    whole,
    with_mesh,
)
from torch import nn
from torch.utils.checkpoint import checkpoint
from truth import F64
from varied import vary

import weightalign_cuda as wa
from weightalign_cuda.layers import aligned_layers

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")


class Checkpointed(nn.Module):
    def __init__(self, inner, use_reentrant):
        super().__init__()
        self.inner, self.use_reentrant = inner, use_reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


def checkpointed(rank, count, mesh, use_reentrant):
    model = network()
    wa.fully_shard(model[3], mesh=mesh)
    model[3] = Checkpointed(model[3], use_reentrant)
    wa.fully_shard(model, mesh=mesh)
    check_gradients(model, rank, count, {re.sub("^3", "3.inner", name): g for name, g in true_gradients().items()})


def non_reentrant_checkpoint(rank, count, mesh):
    checkpointed(rank, count, mesh, use_reentrant=False)


def reentrant_checkpoint(rank, count, mesh):
    checkpointed(rank, count, mesh, use_reentrant=True)


def prefetch_and_unshard(rank, count, mesh):
    model = shard(network(), mesh)
    model.set_modules_to_forward_prefetch([model[3]])
    check_gradients(model, rank, count)
    model.zero_grad()
    model.unshard()
    model[3].unshard()
    check_gradients(model, rank, count)


def one_layer_and_a_list(rank, count, mesh):
    model = network()
    wa.fully_shard(model[0], mesh=mesh)
    assert wa.fully_shard([model[2], model[3]], mesh=mesh)[1] is model[3]
    check_gradients(wa.fully_shard(model, mesh=mesh), rank, count)


def used_twice(rank, count, mesh):
    def step(model, rank, count):
        images, labels = batch(0, rank, count)
        nn.functional.cross_entropy(model(images) + model(images.flip(3)), labels).backward()
        return gradients(model)

    assert_same(step(shard(network(), mesh), rank, count), step(network(), 0, 1))


class WithSpare(nn.Module):
    """A layer that is not used, as in a search over architectures."""

    def __init__(self, inner):
        super().__init__()
        self.spare = wa.WAConv2d(2, 3, 1, dtype=F64)
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def unused_layer(rank, count, mesh):
    model = WithSpare(network())
    check_gradients(wa.fully_shard(model, mesh=mesh), rank, count, true_gradients(WithSpare(network())))


def shared_weights(rank, count, mesh):
    def model():
        torch.manual_seed(0)
        layers = [wa.WAConv2d(3, 3, 3, padding=1) for _ in range(2)]
        layers[1].weight = layers[0].weight
        rest = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        return vary(nn.Sequential(layers[0], rest[0], layers[1], *rest[1:])).double()

    found = wa.fully_shard(model(), mesh=mesh)
    assert found[0].weight is found[2].weight and found[0].gain is not found[2].gain
    calls = []
    found[0].weight.register_post_accumulate_grad_hook(calls.append)
    check_gradients(found, rank, count, true_gradients(model()))
    assert len(calls) == 1 and calls[0] is found[0].weight


def frozen_parameters(rank, count, mesh):
    expected = true_gradients()
    model = shard(network(), mesh)
    for layer in aligned_layers(model.modules()):
        layer.weight.requires_grad_(False)
    check_gradients(
        model, rank, count, {k: g for k, g in expected.items() if "gain" in k or "bias" in k or k[0] == "7"}
    )
    for layer in aligned_layers(model.modules()):
        layer.weight.requires_grad_(True)
    model.zero_grad()
    check_gradients(model, rank, count)
    model = network()
    model[2].requires_grad_(False)
    shard(model, mesh)
    check_gradients(model, rank, count, {k: g for k, g in expected.items() if k[0] != "2"})
    model.zero_grad()
    model[2].requires_grad_(True)
    check_gradients(model, rank, count)


def without_gain(rank, count, mesh):
    models = network(), network()
    for model in models:
        model[2].register_parameter("gain", None)
    check_gradients(shard(models[0], mesh), rank, count, true_gradients(models[1]))


def meta_initialisation(rank, count, mesh):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    with torch.device("meta"):
        model = network()
    shard(model, mesh).to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all((whole(gain) == 1).all() for gain in wa.gain_parameters(model))
    loss_of(model, 1, rank, count).backward()
    model.zero_grad()
    set_model_state_dict(model, network().state_dict(), options=StateDictOptions(full_state_dict=True))
    check_gradients(model, rank, count)


def dtypes_before_the_first_forward(rank, count, mesh):
    model = shard(network().float(), mesh).to("cpu").double()
    with torch.no_grad():
        for p, true in zip(model.parameters(), network().parameters(), strict=True):
            p.copy_(dist.tensor.distribute_tensor(true, p.device_mesh, p.placements))
    check_gradients(model, rank, count)
    assert {p.grad.dtype for p in model.parameters()} == {F64}
    with pytest.raises(RuntimeError, match=r"weights were torch.float64 in the first forward.*got torch.float32"):
        model.float()(batch(0)[0].float())


def states(rank, count, mesh):
    """State dicts are those of one process. Loaded after a forward without backward, which leaves the root's filters
    gathered, and so are outdated."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

    full, images = StateDictOptions(full_state_dict=True), batch(3)[0]
    model, true = shard(network(), mesh), network()
    assert_same({name: whole(t) for name, t in model.state_dict().items()}, true.state_dict(), rtol=0)

    def scale(model):
        for layer in aligned_layers(model.modules()):
            layer.weight.mul_(0.1)
            layer.gain.mul_(1.5)

    def load_full(model):
        set_model_state_dict(model, {name: 2 * t for name, t in true.state_dict().items()}, options=full)

    for change in (
        load_full,
        lambda m: m.load_state_dict({k: 3 * t for k, t in m.state_dict().items()}),
        lambda m: m.load_state_dict({k: 0.5 * t for k, t in m.state_dict().items()}, assign=True),
        scale,
    ):
        with torch.no_grad():
            before = model(images)
            if change is load_full:
                model.reshard()  # torch looks the parameters up before it reshards
            change(model)
            found = model(images)
            true.load_state_dict(get_model_state_dict(model, options=full))
            torch.testing.assert_close(found, true(images), rtol=1e-9, atol=1e-12)
            assert not torch.allclose(before, found)
        model.zero_grad()
        true.zero_grad()
        check_gradients(model, rank, count, true_gradients(true))


def distributed_checkpoint(rank, count, mesh):
    """Resumed from torch.distributed.checkpoint, training goes on bit for bit."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def steps(model, optimizer, seeds):
        for seed in seeds:
            optimizer.zero_grad()
            loss_of(model, seed, rank, count).backward()
            optimizer.step()

    folder = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder, group=mesh.get_group())
    runs = []
    for seeds in ([0, 1], []):
        model = shard(network(), mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        steps(model, optimizer, seeds)
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        arguments = {"checkpoint_id": folder[0], "process_group": mesh.get_group()}
        if seeds:
            dcp.save(states, **arguments)
        else:
            dcp.load(states, **arguments)
            set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
        steps(model, optimizer, [2, 3])
        runs.append({name: whole(t) for name, t in model.state_dict().items()})
    assert_same(*runs, rtol=0)
    if rank == 0:
        shutil.rmtree(folder[0])


def compiled(rank, count, mesh):
    model = shard(network(), mesh)
    step = torch.compile(model, backend="aot_eager")
    images, labels = batch(0, rank, count)
    nn.functional.cross_entropy(step(images), labels).backward()
    assert_same(gradients(model), true_gradients())
    model = network()
    shard(model, mesh)
    model[3].compile(backend="aot_eager")
    check_gradients(model, rank, count)


def _step(optimizer, _):
    optimizer.step()
    optimizer.zero_grad()


def step_in_backward(rank, count, mesh):
    """A hook on each parameter steps it as soon as its gradient is there."""
    model, true = shard(network(), mesh), network()
    for each in (model, true):
        optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in each.parameters()}
        for p, optimizer in optimizers.items():
            p.register_post_accumulate_grad_hook(functools.partial(_step, optimizer))
    for seed in range(3):
        loss_of(model, seed, rank, count).backward()
        loss_of(true, seed).backward()
    assert_same({name: whole(p) for name, p in model.named_parameters()}, dict(true.named_parameters()))


def on_the_cpu(rank, count, mesh):
    from torch.distributed.fsdp import CPUOffloadPolicy

    check_gradients(shard(network(), mesh, offload_policy=CPUOffloadPolicy(pin_memory=False)), rank, count)


def inside_frozen(rank, count, mesh):
    model, true, images = shard(network(), mesh), network(), batch(0)[0]
    expected = true(images)
    with torch.no_grad(), wa.frozen(model.eval()), CountOps() as ops:
        torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-12)
        assert ops.calls["align_forward"] == 2
        assert {row.aligned for row in wa.explain(model)} == {"by frozen"}
    with wa.frozen(model), torch.inference_mode():
        torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-12)
    inputs = images.clone().requires_grad_(), images.clone().requires_grad_()
    with wa.frozen(model):
        for each, x in zip((model, true), inputs, strict=True):
            each(x).square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-9, atol=1e-12)
    assert all(layer.weight.grad is None for layer in aligned_layers(model.modules()))
    with wa.frozen(model.train()), pytest.raises(RuntimeError, match=r"wa\.frozen is for inference"):
        loss_of(model, 0, rank, count).backward()


def explained(rank, count, mesh):
    model = shard(network(), mesh)
    assert [row.aligned for row in wa.explain(model)] == ["by fully_shard"] * 6
    assert {row.why for row in wa.explain(model)} == {"where it is sharded, with 2 others, then gathered"}
    assert [row.filters for row in wa.explain(model)] == [row.filters for row in wa.explain(network())]
    assert repr(model).count("aligned by fully_shard") == 6
    gains = wa.gain_parameters(model)
    assert [whole(g).tolist() for g in gains] == [g.tolist() for g in wa.gain_parameters(network())]
    assert all(any(g is p for p in model.parameters()) for g in gains)


JOBS = (
    non_reentrant_checkpoint,
    reentrant_checkpoint,
    prefetch_and_unshard,
    one_layer_and_a_list,
    used_twice,
    unused_layer,
    shared_weights,
    frozen_parameters,
    without_gain,
    meta_initialisation,
    dtypes_before_the_first_forward,
    states,
    distributed_checkpoint,
    compiled,
    step_in_backward,
    on_the_cpu,
    inside_frozen,
    explained,
)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.__name__)
def test_as_fsdp2(in_four_processes, job, count):
    in_four_processes(with_mesh, count, job)
