"""Training with wa.fully_shard: losses, norms and parameters are those of one process, in float64."""

import pytest
import torch
import torch.distributed as dist
from sharded import assert_same, loss_of, network, part, shard, whole
from torch import nn

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")


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
def test_training_equals_one_process(in_four_processes, case):
    in_four_processes(train_sharded, *case)
