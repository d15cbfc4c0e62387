"""wa.fully_shard beside FSDP2: launches, precision, what is left to torch's own way, and what is refused."""

import contextlib
import gc
import logging
import re
import weakref

import pytest
import torch
import torch.distributed as dist
from count_ops import CountOps
from sharded import batch, check_gradients, gradients, loss_of, network, shard, true_gradients, whole, with_mesh
from torch import nn
from truth import BF16, F32, F64, formula, normal
from varied import converted

import weightalign_cuda as wa

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")


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
def test_beside_fsdp2(in_four_processes, job, count):
    in_four_processes(with_mesh, count, job)


def test_tensor_parallel_layers_are_left_to_torch(in_four_processes):
    in_four_processes(with_mesh, 4, tensor_parallel)
