"""wa.fully_shard on gloo processes: a step equals that of one process, in float64, whatever FSDP2 is asked to do."""

import contextlib
import functools
import gc
import logging
import re
import shutil
import tempfile
import weakref

import pytest
import torch
import torch.distributed as dist
from count_ops import CountOps
from processes import in_processes
from torch import nn
from torch.utils.checkpoint import checkpoint
from truth import BF16, F32, F64, formula, normal
from varied import converted, vary

import weightalign_cuda as wa
from weightalign_cuda.layers import aligned_layers

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")


@pytest.fixture(scope="module")
def run():
    with in_processes(4) as run:
        yield run


def network():
    """Filters: 5, 6, 4, 2, 1, 8, so that shards are uneven or empty; biases, groups, an activation, a padding."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1, bias=False),
        nn.ReLU(),
        wa.WAConv2d(5, 6, 3, stride=2, padding="same_tf", activation="relu"),
        nn.Sequential(
            nn.Conv2d(6, 4, 1, groups=2), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1), nn.Conv2d(2, 1, 3, padding=1)
        ),
        wa.WAConv2d(1, 8, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    return converted(model).double()


def shard(model, mesh, **options):
    wa.fully_shard(model[3], mesh=mesh, **options)
    return wa.fully_shard(model, mesh=mesh, **options)


def batch(seed, rank=0, count=1):
    """This process's share of 12 images and labels."""
    images, labels = normal(12, 3, 9, 8, seed=seed, dtype=F64), torch.arange(12) % 3
    return images.chunk(count)[rank], labels.chunk(count)[rank]


def loss_of(model, seed, rank=0, count=1):
    images, labels = batch(seed, rank, count)
    return nn.functional.cross_entropy(model(images), labels)


def whole(t):
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()


def gradients(model):
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, rtol=1e-9):
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        torch.testing.assert_close(found[name], t, rtol=rtol, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def true_gradients(model=None, seed=0):
    model = model or network()
    loss_of(model, seed).backward()
    return gradients(model)


def check_gradients(model, rank, count, expected=None):
    loss_of(model, 0, rank, count).backward()
    assert_same(gradients(model), true_gradients() if expected is None else expected)


def train(model, rank, count, micro_batches=1, sync_each=True, clip=None, scaled=False):
    """Losses and clipping norms of three steps, and the parameters afterwards."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
    losses, norms = [], []
    for step in range(3):
        optimizer.zero_grad()
        for i in range(micro_batches):
            if count > 1 and not sync_each:
                model.set_requires_gradient_sync(i == micro_batches - 1)
            loss = loss_of(model, 10 * step + i, rank, count) / micro_batches
            scaler.scale(loss).backward()
            losses.append(loss.detach())
        scaler.unscale_(optimizer)
        if clip:
            norms.append(whole(nn.utils.clip_grad_norm_(model.parameters(), clip)))
        scaler.step(optimizer)
        scaler.update()
    return losses, norms, {name: whole(p) for name, p in model.named_parameters()}


def train_sharded(rank, grid, options, training):
    from torch.distributed.device_mesh import init_device_mesh

    count = torch.Size(grid).numel()
    mesh = (
        init_device_mesh("cpu", grid, mesh_dim_names=("replicate", "shard")[-len(grid) :])
        if count == 4
        else part(count)
    )
    if rank >= count:
        return
    losses, norms, parameters = train(shard(network(), mesh, **options), rank, count, **training)
    losses = torch.stack(losses)
    dist.all_reduce(losses, group=mesh.get_group() if count < 4 else None)
    true_losses, true_norms, true_parameters = train(network(), 0, 1, **training)
    torch.testing.assert_close(losses / count, torch.stack(true_losses), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(norms, true_norms, rtol=1e-9, atol=1e-12)
    assert_same(parameters, true_parameters)


def part(count):
    """The first processes. All have to call it."""
    from torch.distributed.tensor import DeviceMesh

    return DeviceMesh("cpu", list(range(count)))


TRAINING = {
    "2": ((2,), {}, {}),
    "3": ((3,), {}, {}),
    "2 x 2": ((2, 2), {}, {"micro_batches": 2}),
    "2 x 2, one sum": ((2, 2), {}, {"micro_batches": 2, "sync_each": False}),
    "kept": ((3,), {"reshard_after_forward": False}, {}),
    "resharded": ((2,), {"reshard_after_forward": True}, {}),
    "micro-batches": ((2,), {}, {"micro_batches": 3}),
    "one sum": ((3,), {}, {"micro_batches": 3, "sync_each": False}),
    "clipped": ((3,), {}, {"clip": 0.1}),
    "scaled": ((2,), {}, {"scaled": True, "clip": 0.5}),
}


@pytest.mark.parametrize("case", TRAINING.values(), ids=TRAINING)
def test_training_equals_one_process(run, case):
    run(train_sharded, *case)


def with_mesh(rank, count, job):
    mesh = part(count)
    if rank < count:
        job(rank, count, mesh)


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
def test_as_fsdp2(run, job, count):
    run(with_mesh, count, job)


def freed(rank, count, mesh):
    """With the model goes everything that belongs to it."""
    model = shard(network(), mesh)
    loss_of(model, 0, rank, count).backward()
    left = [weakref.ref(x) for x in (model, model[0], model[0].aligned_by.member, model[0].weight)]
    del model
    gc.collect()
    assert [x() for x in left] == [None] * 4


def counted(rank, count, mesh):
    """One launch for each gather of a group, and one for its gradients."""
    model = shard(network(), mesh)
    with CountOps() as ops:
        loss_of(model, 0, rank, count).backward()
    assert ops.calls["align_forward"] == 3 and ops.calls["align_backward"] == 2  # the inner group is gathered twice
    model.set_requires_gradient_sync(False)
    with CountOps() as ops:
        loss_of(model, 0, rank, count).backward()
    assert ops.calls["align_forward"] == 3 and ops.calls["align_backward"] == 0


@contextlib.contextmanager
def warned():
    """What the package's logger warns of."""
    warnings = []
    with pytest.MonkeyPatch.context() as patch:
        logger = logging.getLogger("weightalign_cuda")
        patch.setattr(logger, "warning", lambda text, *args: warnings.append(text % args))
        yield warnings


def left_to_torch(rank, count, mesh):
    """Layers that torch's way is taken for are named, and right; those that the user has excluded are not."""
    from torch.distributed.tensor import Shard

    def model():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.ConvTranspose2d(4, 4, 2),
            nn.Conv2d(4, 4, 1),
            nn.Conv2d(4, 4, 1),
            nn.Conv2d(4, 4, 1),
            nn.Conv2d(4, 6, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 3),
        )
        model = converted(model).double()
        torch.nn.utils.parametrize.register_parametrization(model[2], "weight", nn.Identity())
        model[4].weight, model[4].gain = model[3].weight, model[3].gain
        model[8].bound = model[4].weight  # where torch's function sees it
        return model

    found = model()
    placed = {found[0].gain: Shard(0), found[5].weight: Shard(1) if count == 2 else Shard(0)}
    with warned() as warnings:
        # It is asked for the model's parameters alone: an error for any other.
        of = dict.fromkeys(found.parameters()) | placed
        wa.fully_shard(found, mesh=mesh, shard_placement_fn=of.__getitem__)
    assert len(warnings) == (4 if count == 2 else 3)
    assert "weights of 1, as torch's own: filters of transposed" in warnings[0]
    assert "weights of 2, as torch's own: weight or gain is made at each use" in warnings[1]
    assert re.search(r"weights of 3, 4, as torch's own: .* shared with a module of another kind", warnings[2])
    assert count != 2 or re.search(r"weights of 5, as .*: shard_placement_fn places", warnings[3])
    names = ["by fully_shard", *["alone"] * 4, "alone" if count == 2 else "by fully_shard"]
    assert [row.aligned for row in wa.explain(found)] == names
    check_gradients(found, rank, count, true_gradients(model()))

    found = network()
    ignored = {found[2].weight, found[2].gain, found[4].gain}
    with warned() as warnings:
        wa.fully_shard(found, mesh=mesh, ignored_params=ignored)
    assert [type(found[i].weight).__name__ for i in (0, 2, 4)] == ["DTensor", "Parameter", "DTensor"]
    assert len(warnings) == 1 and "weights of 4, as torch's own: only one of weight and gain is in" in warnings[0]
    torch.testing.assert_close(found(batch(0)[0]), network()(batch(0)[0]), rtol=1e-9, atol=1e-12)


def tensor_parallel(rank, count, mesh):
    """Layers whose weight is a DTensor before."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    grid = init_device_mesh("cpu", (count, 1), mesh_dim_names=("dp", "tp"))
    model = network()
    for name in ("weight", "gain", "bias"):
        whole = getattr(model[4], name)
        setattr(model[4], name, nn.Parameter(distribute_tensor(whole, grid["tp"], [Replicate()])))
    with warned() as warnings:
        wa.fully_shard(model, mesh=grid["dp"])
    assert "weights of 4, as torch's own: weight or gain is a DTensor, as under tensor parallelism" in warnings[0]


def change_gain(model, _):
    with torch.no_grad():
        model[4].gain.add_(1)


def refused(rank, count, mesh):
    from torch.distributed.fsdp import CPUOffloadPolicy

    images = batch(0)[0]
    with pytest.raises(RuntimeError, match=r"aligned by foreach.*foreach=False\) before"):
        wa.fully_shard(wa.convert(network(), foreach=True), mesh=mesh)
    model = network()
    with pytest.raises(RuntimeError, match=r"aligned by frozen.*outside of frozen"), wa.frozen(model):
        wa.fully_shard(model, mesh=mesh)
    with pytest.raises(RuntimeError, match="aligned by accumulate"), wa.accumulate(model):
        wa.fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match="reshard_after_forward"):  # torch's own, after ours has hidden the weights
        wa.fully_shard(model, mesh=mesh, reshard_after_forward=5)
    torch.testing.assert_close(model(images), network()(images), rtol=0, atol=0)
    assert type(model[0].weight) is nn.Parameter and "_member" not in repr(model)
    model = network()

    class Mesh:  # no more is looked at
        device_type, shape = "cuda", (8,)

    for number in (2, 4):
        with pytest.raises(
            NotImplementedError, match=f"reshard_after_forward: expected .* got {number} of 8 processes"
        ):
            wa.fully_shard(model, mesh=Mesh, reshard_after_forward=number)
    with pytest.raises(
        NotImplementedError, match="offload_policy: expected OffloadPolicy, got CPUOffloadPolicy on cuda"
    ):
        wa.fully_shard(model, mesh=Mesh, offload_policy=CPUOffloadPolicy())

    shard(model, mesh)
    with pytest.raises(RuntimeError, match="filters are not gathered; call the module that was sharded"):
        model[0](images)
    with pytest.raises(RuntimeError, match="FSDP2 gathers"):
        wa.convert(model, foreach=True)
    with pytest.raises(RuntimeError, match=r"FSDP2 gathers.*set_requires_gradient_sync"), wa.accumulate(model):
        pass
    loss = loss_of(model, 0, rank, count)
    with torch.no_grad():
        model[4].weight.mul_(2)
    with pytest.raises(RuntimeError, match="weights or gains changed between the gather of their filters and the"):
        loss.backward()

    model = shard(network(), mesh)
    model.register_forward_pre_hook(change_gain)
    with pytest.raises(RuntimeError, match="changed since their filters were gathered, in this forward"):
        model(images)

    model = shard(network(), mesh)
    model[0]._parameters["weight"] = network()[0].weight
    with pytest.raises(RuntimeError, match="expected weights and gains that stay DTensors, got a Parameter"):
        model(images)


def relative_error(t, truth):
    return ((t.double() - truth).norm() / truth.norm()).item()


def precise(rank, count, mesh):
    """bfloat16 costs one rounding of the filters and of their gradient, wherever the weights' mean is."""
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.fsdp import fully_shard as of_torch

    policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=F32)
    measured = {}
    for mean in (0, 30, 300):
        for function in (wa.fully_shard, of_torch):
            layer = wa.WAConv2d(16, 12, 3, eps=1e-3, scale=1.3, bias=False)
            with torch.no_grad():
                layer.weight.copy_(normal(12, 16, 3, 3, mean=mean, seed=1))
                layer.gain.copy_(torch.linspace(0.5, 1.5, 12))
            weight = layer.weight.detach().double().requires_grad_()
            aligned = formula(weight, layer.gain.detach().double(), 1e-3, 1.3)
            model = function(nn.Sequential(layer), mesh=mesh, mp_policy=policy)
            inputs = normal(1, 16, 3, 3, seed=2).to(BF16)  # each output is one product with a filter
            model(inputs).backward(outside := normal(1, 12, 1, 1, seed=3).to(BF16))
            (true,) = torch.autograd.grad(aligned, weight, outside.double().view(12, 1, 1, 1) * inputs.double())
            gradient = whole(layer.weight.grad)
            model.unshard()
            measured[function, mean] = [
                relative_error(layer.aligned_filters(), aligned),
                relative_error(gradient, true),
            ]
    assert all(max(measured[wa.fully_shard, mean]) < 0.003 for mean in (0, 30, 300)), measured
    # What the documentation warns of.
    assert measured[of_torch, 30][0] > 0.03 and min(measured[of_torch, 300]) > 0.1, measured


def gathered_in_other_dtypes(rank, count, mesh):
    """float64 is aligned to float64 alone."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    for own, message in ((F64, F32), (F32, F64)):
        model = shard(network().to(own), mesh, mp_policy=MixedPrecisionPolicy(message, message))
        images, labels = batch(0, rank, count)
        nn.functional.cross_entropy(model(images.to(own)), labels).backward()
        assert {p.grad.dtype for p in model.parameters()} == {own}
        for name, grad in true_gradients().items():
            error = (gradients(model)[name] - grad).abs().max() / grad.abs().max().clamp(min=1e-3)
            assert error < 1e-3, name


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(
    "job", [gathered_in_other_dtypes, freed, counted, left_to_torch, refused, precise], ids=lambda job: job.__name__
)
def test_beside_fsdp2(run, job, count):
    run(with_mesh, count, job)


def test_tensor_parallel_layers_are_left_to_torch(run):
    run(with_mesh, 4, tensor_parallel)
