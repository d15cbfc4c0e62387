"""A small network sharded by wa.fully_shard over gloo processes, and the truth of one process."""

import torch
from torch import nn
from truth import F64, normal
from varied import converted

import weightalign_cuda as wa


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


def part(count):
    """The first processes. All have to call it."""
    from torch.distributed.tensor import DeviceMesh

    return DeviceMesh("cpu", list(range(count)))


def with_mesh(rank, count, job):
    mesh = part(count)
    if rank < count:
        job(rank, count, mesh)
