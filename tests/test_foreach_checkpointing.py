"""wa.convert(model, foreach=True) and activation checkpointing: layers that are recomputed in the backward."""

import gc

import pytest
import torch
from foreach_model import Model, alone, assert_same, checkpointed, image, kept, step
from torch.utils.checkpoint import checkpoint
from varied import converted


@pytest.fixture(autouse=True)
def one_thread(restore_threads):
    """Many small models, on machines that may be busy."""
    torch.set_num_threads(1)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("foreach", [True, 3])
def test_checkpointed_block(backend, device, reentrant, foreach):
    model = converted(Model(checkpointed(reentrant)), foreach=foreach).to(device)
    for _ in range(2):
        found, forward, backward = step(model)
        assert_same(found, alone(device))
        assert kept(model) == 0
    if backend != "reference":
        assert forward["align_forward"] == int(foreach)
        # Reentrant checkpointing trains the recomputation, in which the block's layers align themselves.
        assert (backward["align_forward"] > 0) == reentrant
        assert reentrant or backward["align_backward"] == int(foreach)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_model(backend, device, reentrant):
    for block in (Model, lambda: Model(checkpointed(False))):
        model = converted(block(), foreach=True).to(device)
        x = image(device).requires_grad_()
        found, *_ = step(model, lambda x, m=model: checkpoint(m, x, use_reentrant=reentrant), x)
        assert_same(found, alone(device))
        assert kept(model) == 0


def test_checkpoints_of_several_forwards(device):
    """Backward in either order, twice, or never."""
    model = converted(Model(checkpointed(False)), foreach=True).to(device)
    plain = converted(Model()).to(device)
    for order in ((0, 1), (1, 0)):
        found = []
        for m in (model, plain):
            m.zero_grad()
            results = [m(image(device, seed)) for seed in (1, 2)]
            for i in order:
                results[i].sum().backward(retain_graph=True)
                results[i].sum().backward()
            found.append([p.grad for p in m.parameters()])
        assert_same(*found)
        assert kept(model) == 0
    result = model(image(device))
    assert kept(model) == 3
    del result
    gc.collect()
    assert kept(model) == 0


def test_nested_kinds_of_checkpointing(device):
    """A block that is recomputed both as part of the model and in a reentrant recomputation, where it aligns itself."""

    def nested(block, x):
        return checkpoint(lambda x: checkpoint(block, x, use_reentrant=False), x, use_reentrant=True)

    def both(block, x):
        return nested(block, x) + checkpoint(block, x, use_reentrant=False)

    for run in (nested, both):
        assert_same(*(step(converted(Model(run), foreach=f).to(device))[0] for f in (True, False)))


def test_weight_changed_before_recomputation(device):
    """torch's error for any weight that the backward needs; never a silently wrong gradient."""
    model = converted(Model(checkpointed(False)), foreach=True).to(device)
    result = model(image(device)).sum()
    with torch.no_grad():
        model.middle[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation: weights"):
        result.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_backward_inside_the_forward(device, reentrant):
    """What it recomputes does not belong to the enclosing forward."""

    def run(block, x):
        (grad,) = torch.autograd.grad(checkpointed(False)(block, x).sum(), x, create_graph=True)
        inner = checkpoint(model.last, x, use_reentrant=reentrant).sum()
        inner.backward(retain_graph=True)  # one node gives all gradients
        return block(x) + grad.mean()

    found = []
    for foreach in (True, False):
        model = converted(Model(run), foreach=foreach).to(device)
        with torch.no_grad():
            model.last.weight.mul_(0.5)
        model.first.requires_grad_(False)
        result = model(image(device).requires_grad_())
        result.square().sum().backward(inputs=[p for n, p in model.named_parameters() if n.startswith("middle")])
        found.append([p.grad for p in model.parameters()])
    assert_same(*found, rtol=1e-5, atol=1e-5)
