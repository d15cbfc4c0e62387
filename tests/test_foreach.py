"""wa.convert(model, foreach=True): the results of layers that align themselves, from one launch forward and one
backward, whatever a program does to the model. (Other files compare models with one launch per layer to the
formula.)"""

import copy
import gc
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from count_ops import CountOps
from foreach_model import Model, alone, assert_same, checkpointed, image, layers, step
from torch import nn
from torch.utils.checkpoint import checkpoint
from truth import BF16, F64, name, normal
from varied import converted

import weightalign_cuda as wa


@pytest.fixture(autouse=True)
def one_thread(restore_threads):
    """Many small models, on machines that may be busy."""
    torch.set_num_threads(1)


@pytest.mark.parametrize("foreach", [True, 1, 2, 4, 50])
def test_same_results(backend, device, foreach):
    model = converted(Model(), foreach=foreach).to(device)
    for _ in range(2):
        found, *ops = step(model)
        assert_same(found, alone(device))
    assert model.unused.weight.grad is None and model.unused.gain.grad is None
    if backend != "reference":
        launches = [min(int(foreach), len(layers(model)))] * 2
        # A bucket that holds only unused layers has nothing to do in the backward.
        assert ops[0]["align_forward"] == launches[0] and 0 <= launches[1] - ops[1]["align_backward"] <= 1
        assert (ops[0]["prepare_forward"], ops[1]["prepare_backward"]) == (1, 1)


def test_one_launch_each_way(native, device):
    _, forward, backward = step(converted(Model(), foreach=True).to(device))
    assert forward == {"align_forward": 1, "prepare_forward": 1}
    assert backward == {"align_backward": 1, "prepare_backward": 1}


def test_buckets_run_during_the_backward(native, device):
    """In the backward's order, each before the convolutions of the next."""
    model = converted(nn.Sequential(*[nn.Conv2d(4, 4, 3, padding=1) for _ in range(6)]), foreach=3).to(device)
    events = []
    for i, layer in enumerate(model):
        layer.register_full_backward_hook(lambda *_, i=i: events.append(f"convolution {i}"))
        layer.weight.register_post_accumulate_grad_hook(lambda _, i=i: events.append(f"gradient {i}"))
    model(normal(1, 4, 5, 5, device=device).requires_grad_()).sum().backward()
    for i in range(2, 6):
        assert events.index(f"gradient {i}") < events.index(f"convolution {2 * (i // 2) - 2}")


def test_layers_called_outside_the_model(device):
    model, plain = (converted(Model(), foreach=f).to(device) for f in (True, False))
    for m in (model, plain):
        with CountOps() as ops:
            m.last(m.first(image(device))).sum().backward()
            checkpoint(m.middle, m.first(image(device)), use_reentrant=False).sum().backward()
        assert ops.calls["align_forward"] > 1
    assert_same([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
    step(model)
    assert not torch.equal(model.first.aligned_filters(), model.first.weight)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.a(self.b(self.a(x)))


def test_layers_used_twice_and_shared_weights(device):
    found = [step(converted(Twice(), foreach=f).to(device, F64), x=image(device, dtype=F64))[0] for f in (True, False)]
    assert_same(*found, rtol=1e-12, atol=1e-12)


def test_frozen_layers(native, device):
    """They cost nothing in the backward: their filters, from the same launch, do not require grad."""
    wanted = []

    def run(block, x):
        wanted.append(model.first.aligned_filters().requires_grad)
        return block(x)

    model = converted(Model(run), foreach=True).to(device)
    expected = alone(device)
    for parameter in (*model.first.parameters(), model.last.weight):
        parameter.requires_grad_(False)
    found, forward, _ = step(model)
    assert wanted == [False] and forward["align_forward"] == 1
    is_trained = [True, *(p.requires_grad for p in model.parameters())]
    assert_same(found, [t if trained else None for t, trained in zip(expected, is_trained, strict=True)])
    model.requires_grad_(False)
    assert not model(image(device)).requires_grad


def test_without_gradients(device):
    model, plain = (converted(Model(), foreach=f).to(device).eval() for f in (True, False))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            with CountOps() as ops:
                found = model(image(device))
            assert torch.equal(found, plain(image(device)))
        assert ops.calls["align_forward"] == 1
        assert_same(step(model)[0], step(plain)[0])  # no state is left


def test_grad_mode_changes_in_the_forward(device):
    inside = []

    def run(block, x):
        with torch.set_grad_enabled(not torch.is_grad_enabled()):
            inside.append(block(x))
        return inside[-1]

    model, plain = (converted(Model(run), foreach=f).to(device) for f in (True, False))
    assert_same(step(model)[0], step(plain)[0])
    for m in (model, plain):
        m.zero_grad()
        with torch.no_grad():
            assert not m(image(device)).requires_grad
        inside[-1].sum().backward()
        assert m.middle[0].weight.grad is not None and m.first.weight.grad is None
    assert_same([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


@torch.inference_mode()
def inference_parameter(t):
    return nn.Parameter(t.clone(), requires_grad=False)


CHANGES = {
    "weight": lambda layer: layer.weight.neg_().add_(0.1 * layer.weight.square()),
    "its data": lambda layer: setattr(layer.weight, "data", layer.weight.data.flip(1)),
    "its strides": lambda layer: setattr(layer.weight, "data", layer.weight.data.transpose(2, 3)),
    "another weight": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.flip(1))),
    "a weight without versions": lambda layer: setattr(layer, "weight", inference_parameter(-layer.weight)),
    "gain": lambda layer: layer.gain.mul_(2),
    "its gain's strides": lambda layer: setattr(layer.gain, "data", layer.gain.data[:1].expand_as(layer.gain)),
    "no gain": lambda layer: setattr(layer, "gain", None),
    "eps": lambda layer: setattr(layer, "eps", 5.0),
    "scale": lambda layer: setattr(layer, "scale", 5.0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_layers_that_change_in_the_forward(device, change):
    def run(block, x):
        change(model.middle[0])
        return block(x)

    model = converted(Model(run), foreach=True).to(device)
    before = step(converted(Model()).to(device))[0][0]
    with torch.no_grad():
        found = model(image(device))
        assert not torch.allclose(found, before, rtol=1e-2)
        model.run = lambda block, x: block(x)
        assert torch.equal(model(image(device)), found)
        wa.convert(model)
        torch.testing.assert_close(model(image(device)), found, rtol=1e-6, atol=1e-6)


def test_weights_that_change_between_forwards(device):
    model, plain = (converted(Model(), foreach=f).to(device) for f in (2, False))
    for i in range(3):
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
        assert_same(step(model)[0], step(plain)[0])
        for optimizer in optimizers:
            optimizer.step()
        if i == 1:
            state = {k: v.flip(0) for k, v in plain.state_dict().items()}
            plain.load_state_dict(state), model.load_state_dict(state)
    assert_same([p.detach() for p in model.parameters()], [p.detach() for p in plain.parameters()])


def test_exceptions(device):
    def run(block, x):
        block(x)
        raise OSError

    model = converted(Model(run), foreach=True).to(device)
    for _ in range(2):
        with pytest.raises(OSError):
            model(image(device))
    with torch.no_grad():
        model.first.weight.mul_(-1)
        changed = model.first.aligned_filters()
        model.first.weight.mul_(-1)
        assert torch.equal(model.first.aligned_filters(), -changed)
    with pytest.raises(TypeError):
        model(None)
    model.run = lambda block, x: block(x)
    assert_same(step(model)[0], alone(device))


def test_nested_models_and_recursion(native, device):
    inner = converted(Model(), foreach=True).to(device)

    def run(block, x):
        return block(x) + inner(image(device)).sum()

    outer = converted(Model(run)).to(device)
    outer.inner = inner
    found, forward, _ = step(wa.convert(outer, foreach=True))
    assert forward["align_forward"] == 1
    expected, *_ = step(wa.convert(outer))
    assert_same(found, expected)
    assert_same(step(inner)[0], alone(device))
    depth = []

    def again(block, x):
        depth.append(1)
        return block(x) + (model(image(device)).sum() if len(depth) % 2 else 0)

    model = converted(Model(again), foreach=True).to(device)
    found, *_ = step(model)
    assert_same(found, step(wa.convert(model))[0], rtol=1e-4, atol=1e-5)


def test_two_models_interleaved(device):
    models = [converted(Model(), foreach=True).to(device) for _ in range(2)]
    with torch.no_grad():
        models[1].first.gain.mul_(3)
    together = sum(m(image(device)).square().sum() for m in models)
    together.backward()
    found = [[p.grad for p in m.parameters()] for m in models]
    for m, grads in zip(models, found, strict=True):
        assert_same(grads, step(wa.convert(m))[0][1:])


@pytest.mark.parametrize("kind", ["train", "infer"])
def test_threads_with_one_model(backend, device, kind):
    begin, model = threading.Barrier(8), converted(Model(checkpointed(False)), foreach=True).to(device)
    parameters, expected = list(model.parameters()), alone(device)

    def run(_):
        begin.wait(60)
        with wa.use_backend(backend), torch.set_grad_enabled(kind == "train"):
            for _ in range(5):
                result = model(image(device))
                assert torch.equal(result, expected[0])
                if kind == "train":
                    loss = result.square().sum()
                    assert_same(
                        torch.autograd.grad(loss, parameters, allow_unused=True), expected[1:], rtol=1e-4, atol=1e-5
                    )

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(run, range(8)))


@pytest.mark.parametrize("low", [BF16, torch.float16], ids=name)
def test_autocast(device, low):
    def run(block, x):
        with torch.autocast(device, dtype=low, enabled=not torch.is_autocast_enabled(device)):
            return block(x.float()).float()

    for given in ({}, {"run": run}):
        model, plain = (converted(Model(**given), foreach=f).to(device) for f in (True, False))
        for m in (model, plain):
            m.forward_in = torch.autocast(device, dtype=low)(m)
        assert_same(step(model, model.forward_in)[0], step(plain, plain.forward_in)[0])
        assert_same(step(model)[0], step(plain)[0])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(native, device, copied):
    """Copies align their own layers together."""
    model = converted(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), foreach=True).to(device)
    for other in (copied(model), copied(model.eval())):
        with torch.no_grad():
            other[0].gain.mul_(2)
        found, forward, backward = step(other)
        assert forward["align_forward"] == backward["align_backward"] == 1
        assert all(p.grad is None for p in model.parameters())
        assert_same(found, step(wa.convert(other))[0])  # foreach is off here, but still on in the original
        assert not other._forward_pre_hooks and not other._forward_hooks
        assert step(model)[1]["align_forward"] == 1
        model.zero_grad()


def test_turned_on_and_off(native, device):
    model = converted(Model()).to(device)
    for foreach, launches in ((True, 1), (True, 1), (3, 3), (False, 4), (False, 4), (2, 2)):
        modules = list(model.modules())
        assert wa.convert(model, foreach=foreach) is model and list(model.modules()) == modules
        _, forward, _ = step(model)
        assert forward["align_forward"] == launches
        assert len(model._forward_pre_hooks) == len(model._forward_hooks) == bool(foreach)


def test_frozen_and_fold(native, device):
    model = converted(Model(), foreach=True).to(device).eval()
    expected = model(image(device)).detach()
    with torch.no_grad(), wa.frozen(model):
        for _ in range(2):
            assert torch.equal(model(image(device)), expected)
        with CountOps() as ops:
            model(image(device))
        assert not ops.calls["align_forward"]
    assert step(model)[1]["align_forward"] == 1
    for inplace in (False, True):
        folded = wa.fold(model, inplace=inplace)
        torch.testing.assert_close(folded(image(device)), expected)
        assert not folded._forward_pre_hooks and not folded._forward_hooks


def test_functions_of_the_parameters(device):
    model, plain = (converted(Model(), foreach=f).to(device, F64) for f in (True, False))
    x = image(device, dtype=F64)
    other = {k: (v.detach() + 0.1 * v.detach().square()).requires_grad_() for k, v in model.named_parameters()}
    grads = []
    for m in (model, plain):
        loss = torch.func.functional_call(m, other, (x,)).square().sum()
        grads.append(torch.autograd.grad(loss, list(other.values()), allow_unused=True))
        torch.testing.assert_close(torch.func.functional_call(m, other, (x,)).square().sum(), loss)
    assert_same(*grads, rtol=1e-12, atol=1e-12)
    of = [
        torch.func.grad(lambda p, m=m: torch.func.functional_call(m, p, (x,)).square().sum())(other)
        for m in (model, plain)
    ]
    assert_same(of[0].values(), of[1].values(), rtol=1e-12, atol=1e-12)


def test_twice_differentiable(device):
    found = []
    for foreach in (True, False):
        model = converted(Model(), foreach=foreach).to(device, F64)
        x = image(device, dtype=F64).requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert_same(*found, rtol=1e-10, atol=1e-12)


def test_memory_is_released(device):
    model = converted(Model(), foreach=True).to(device)
    filters = []
    model.first.register_forward_pre_hook(lambda layer, _: filters.append(layer.aligned_filters()))
    result = model(image(device))
    result.sum().backward()
    assert len(filters) == 1
    filters[0] = torch.utils.weak.WeakTensorKeyDictionary({filters[0]: 1})
    del result
    gc.collect()
    assert len(filters[0]) == 0


class FSDPModule:
    """Stands in for torch's class, which fully_shard adds to a module's bases."""


class Sharded(FSDPModule, Model):
    pass


def test_models_without_all_weights_at_once(device):
    for model, reason in ((Sharded(), "FSDP2 gathers"), (nn.DataParallel(Model()), "DataParallel runs copies")):
        modules = list(model.modules())
        with pytest.raises(RuntimeError, match=f"foreach: all layers cannot be aligned .*{reason}.*foreach=False"):
            wa.convert(model, foreach=True)
        assert list(model.modules()) == modules
        wa.convert(model)
    later = converted(Model(), foreach=True).to(device)
    replica = later._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="DataParallel runs copies"):
        replica(image(device))
    later.middle = nn.DataParallel(later.middle)
    with pytest.raises(RuntimeError, match="DataParallel runs copies"):
        later(image(device))
