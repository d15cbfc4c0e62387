"""wa.accumulate: the results of plain accumulation, from one launch forward and one backward."""

import contextlib
import copy
import gc
import sys
import threading
import types
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from count_ops import CountOps
from foreach_model import Model, checkpointed, image, layers
from torch import nn
from torch.nn.utils import parametrizations, prune
from truth import BF16, F64, formula, name, normal
from varied import converted, vary

import weightalign_cuda as wa

SEEDS = 1, 2, 3


@pytest.fixture(autouse=True)
def one_thread(restore_threads):
    """Many small models, on machines that may be busy."""
    torch.set_num_threads(1)


def micro_batches(model, seeds=SEEDS, dtype=torch.float32):
    for seed in seeds:
        model(image(next(model.parameters()).device, seed, dtype)).float().square().sum().backward()


def gradients(model):
    return [p.grad for p in model.parameters()]


def accumulated(model, run=micro_batches):
    model.zero_grad()
    with wa.accumulate(model) as given:
        assert given is model
        run(model)
    return gradients(model)


def plainly(model, run=micro_batches):
    model = wa.convert(copy.deepcopy(model))
    model.zero_grad()
    run(model)
    return gradients(model)


def assert_near(found, expected, rtol=1e-5):
    """Relative to each tensor's largest value: the same sums in another order."""
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype and one.stride() == other.stride()
            assert (one - other).abs().max() <= rtol * other.abs().max()


@pytest.mark.parametrize("foreach", [False, True, 3])
@pytest.mark.parametrize("block", [lambda block, x: block(x), checkpointed(False), checkpointed(True)])
def test_equals_plain_accumulation(backend, device, foreach, block):
    model = converted(Model(block), foreach=foreach).to(device)
    assert_near(accumulated(model), plainly(model))
    assert model.unused.weight.grad is None and model.unused.gain.grad is None
    before = [layer.aligned_by for layer in layers(model)]
    with wa.accumulate(model):
        micro_batches(model)  # adds to the existing gradients
    assert_near(gradients(model), plainly(model, lambda m: [micro_batches(m), micro_batches(m)]))
    assert [layer.aligned_by for layer in layers(model)] == before


@pytest.mark.parametrize("foreach", [False, True])
def test_one_launch_each_way(native, device, foreach):
    model = converted(Model(), foreach=foreach).to(device)
    with CountOps() as ops:
        accumulated(model)
    assert ops.calls["align_forward"] == ops.calls["align_backward"] == 1
    assert ops.calls["prepare_forward"] == 3  # of inputs, for relu and padding
    with CountOps() as ops, wa.accumulate(model), torch.no_grad():
        model(image(device))
    assert ops.calls["align_forward"] == 1 and not ops.calls["align_backward"]
    with CountOps() as ops, wa.accumulate(model):
        pass
    assert not ops.calls


def test_one_convolution_in_float64(backend, device):
    """One convolution in float64, against autograd of the formula."""
    layer = wa.WAConv2d(3, 4, 3, eps=0.3, scale=1.7, dtype=F64, device=device)
    with torch.no_grad():
        layer.gain.copy_(normal(4, seed=5))
    x = [normal(2, 3, 6, 5, seed=s, dtype=F64, device=device) for s in SEEDS]
    with wa.accumulate(layer):
        for each in x:
            layer(each).sin().sum().backward()
    aligned = formula(layer.weight, layer.gain, 0.3, 1.7)
    true = sum(nn.functional.conv2d(each, aligned, layer.bias).sin().sum() for each in x)
    expected = torch.autograd.grad(true, list(layer.parameters()))
    assert_near(gradients(layer), expected, 1e-12)


def test_sums_in_float32(device):
    """600 gradients of bfloat16 weights, each too small for a bfloat16 sum of the others; also under autocast."""
    for model in (
        wa.WALinear(8, 4, bias=False, dtype=BF16, device=device),
        wa.WALinear(8, 4, bias=False, device=device),
    ):
        vary(model)
        x, small = normal(8, 8, device=device, seed=3), 600
        expected = None
        for count in (1, small):
            model.zero_grad()
            with wa.accumulate(model), torch.autocast(device, dtype=BF16):
                for _ in range(count):
                    model(x).float().sum().backward()
            found = [p.grad.float() for p in model.parameters()]
            if count == 1:
                expected = [small * grad for grad in found]
            else:
                assert_near(found, expected, rtol=2**-7 if model.weight.dtype == BF16 else 1e-4)


def test_autocast_for_some_micro_batches(device):
    def run(model):
        for seed in SEEDS:
            with torch.autocast(device, dtype=BF16, enabled=seed != 2):
                result = model(image(device, seed))
            result.float().square().sum().backward()

    model = converted(Model(), foreach=True).to(device)
    with CountOps() as ops:
        found = accumulated(model, run)
    assert ops.calls["align_forward"] == ops.calls["align_backward"] == 2
    assert_near(found, plainly(model, run), rtol=2e-2)


@pytest.mark.parametrize("other", [F64, BF16], ids=name)
def test_one_launch_for_each_dtype(native, device, other):
    """Of weights, even if autocast aligns them to the same dtype."""

    def run(m):
        with torch.autocast(device, dtype=BF16, enabled=other == BF16):
            micro_batches(m)

    model = converted(Model(lambda block, x: block(x.to(other)).float())).to(device)
    model.middle.to(other)
    with CountOps() as ops:
        found = accumulated(model, run)
    assert ops.calls["align_forward"] == ops.calls["align_backward"] == 2
    assert_near(found, plainly(model, run), 1e-5 if other == F64 else 5e-2)


def test_layers_shared_and_frozen(device):
    model = converted(Model()).to(device, F64)
    model.first.requires_grad_(False)
    model.last.gain.requires_grad_(False)
    model.unused.weight = model.last.weight
    model.add_module("again", model.last)
    model.register_forward_hook(lambda m, _, out: out + m.unused(normal(1, 6, 3, 3, dtype=F64, device=device)).mean())

    def run(m):
        micro_batches(m, dtype=F64)
        assert [layer.aligned_filters().requires_grad for layer in (m.first, m.last)] == [False, True]

    assert_near(accumulated(model, run), plainly(model, run), 1e-6)  # losses are float32
    assert model.first.weight.grad is None and model.last.gain.grad is None


def test_hooks_of_parameters_run_once(device):
    model, calls = converted(Model()).to(device), []
    model.first.weight.register_hook(lambda grad: calls.append("gradient"))
    model.first.gain.register_post_accumulate_grad_hook(lambda _: calls.append("gain"))
    model.middle[2].weight.register_post_accumulate_grad_hook(lambda _: calls.append("transposed"))
    accumulated(model)
    assert sorted(calls) == ["gain", "gradient", "transposed"]


def test_exception(device):
    model = converted(Model(), foreach=True).to(device)
    with pytest.raises(OSError), wa.accumulate(model):
        micro_batches(model)
        raise OSError
    assert all(p.grad is None for layer in layers(model) for p in (layer.weight, layer.gain))
    assert_near(accumulated(model), plainly(model))


def test_optimizer_step_inside(device):
    model, other = (converted(Model()).to(device) for _ in range(2))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other)]
    with wa.accumulate(model):
        micro_batches(model)
        micro_batches(other)
        optimizers[1].step()  # another model's
        with pytest.raises(RuntimeError, match=r"optimizer step inside wa\.accumulate.*step after it"):
            optimizers[0].step()
    optimizers[0].step()


CHANGES = {
    "weight": lambda layer: layer.weight.mul_(2),
    "load_state_dict": lambda layer: layer.load_state_dict(layer.state_dict()),
    "another gain": lambda layer: setattr(layer, "gain", nn.Parameter(torch.ones_like(layer.gain))),
    "frozen": lambda layer: layer.weight.requires_grad_(False),
    "eps": lambda layer: setattr(layer, "eps", 3.0),
    "scale": lambda layer: setattr(layer, "scale", 3.0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_layers_that_change_inside(device, change):
    """Detected at their next use, and at the end."""

    def refused():
        return pytest.raises(RuntimeError, match=r"wa\.accumulate: parameters changed inside")

    model = converted(Model()).to(device)
    with refused(), wa.accumulate(model):
        micro_batches(model)
        with torch.no_grad():
            change(model.middle[0])
        with refused():
            model(image(device))
    assert model.last.weight.grad is None


def test_changed_parameters_are_named(device):
    model = converted(Model()).to(device)
    for change, names in (
        (lambda: model.first.bias.add_(1), r"got first\.bias"),
        (lambda: (model.last.weight.mul_(2), model.first.gain.mul_(2)), r"got first\.gain, last\.weight"),
        (lambda: setattr(model.first, "gain", nn.Parameter(torch.ones_like(model.first.gain))), "replaced or frozen"),
    ):
        with pytest.raises(RuntimeError, match=f"wa\\.accumulate: .*{names}"), wa.accumulate(model), torch.no_grad():
            change()


def test_parametrized_and_pruned_weights(device):
    model = converted(Model()).to(device)
    parametrizations.weight_norm(model.first)
    prune.l1_unstructured(model.last, "weight", 0.5)
    found = accumulated(model)
    model.zero_grad()
    micro_batches(model)
    assert_near(found, gradients(model))


def test_memory_is_released(device):
    model, leaves = converted(Model()).to(device), []
    model.first.register_forward_pre_hook(lambda layer, _: leaves.append(weakref.ref(layer.aligned_filters())))
    accumulated(model)
    gc.collect()
    assert len({id(leaf()) for leaf in leaves}) == 1 and leaves[0]() is None
    assert all(layer.aligned_by is None for layer in layers(model))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_validation_before_the_first_micro_batch(device, context):
    model = converted(Model()).to(device)

    def run(m):
        with context():
            m(image(device))
        micro_batches(m)

    assert_near(accumulated(model, run), plainly(model))


def test_parameters_created_under_inference_mode(device):
    with torch.inference_mode():
        model = converted(Model()).to(device)
        expected = model(image(device))
        with wa.accumulate(model):
            assert torch.equal(model(image(device)), expected)


def test_backward_uses_the_backend_of_the_forward(device):
    layer, calls = vary(wa.WALinear(5, 4, device=device)), []
    for inside, outside in ((device, "reference"), ("reference", device)):
        with CountOps() as ops, wa.use_backend(outside), wa.accumulate(layer), wa.use_backend(inside):
            layer(normal(2, 5, device=device)).sum().backward()
        calls.append(ops.calls["align_backward"])
    assert calls == [1, 0]


def test_functions_of_the_parameters(device):
    """Their gradients are returned, not accumulated."""
    model, x = converted(Model()).to(device, F64), image(device, dtype=F64)

    def function(parameters):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    def run(m):
        micro_batches(m, dtype=F64)
        inside.append(torch.func.grad(function)(dict(model.named_parameters())))

    inside = []
    assert_near(accumulated(model, run), plainly(model, run), 1e-6)
    assert_near(inside[0].values(), inside[1].values(), 1e-12)


def test_gradient_penalty(device):
    def run(m):
        for seed in SEEDS:
            x = image(device, seed, F64).requires_grad_()
            loss = m(x).square().sum()
            (grad,) = torch.autograd.grad(loss, x, create_graph=True)
            (loss + grad.square().sum()).backward()

    model = converted(Model()).to(device, F64)
    assert_near(accumulated(model, run), plainly(model, run), 1e-10)


def test_nested_frozen_copied(device):
    model = converted(Model(), foreach=True).to(device)
    expected = plainly(model)
    with wa.accumulate(model):
        micro_batches(model, SEEDS[:1])
        with wa.accumulate(model):
            micro_batches(model, SEEDS[1:2])
        with torch.inference_mode(), wa.frozen(model.eval()):
            model(image(device))
        other = copy.deepcopy(model)
        micro_batches(model.train(), SEEDS[2:])
    assert_near(gradients(model), expected)
    assert_near(accumulated(other), expected)


def test_threads(device):
    model = converted(Model()).to(device, F64)

    def run(m):
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda seed: micro_batches(m, [seed], F64), range(8)))

    found = accumulated(model, run)
    model.zero_grad()
    for _ in [0]:
        micro_batches(model, range(8), F64)
    assert_near(found[3:], gradients(model)[3:], 1e-5)


@pytest.fixture
def both_at_once(monkeypatch):
    """A function in which two threads wait for each other, to force concurrent execution; it gives up if a lock of
    accumulate excludes one of them."""
    both = threading.Barrier(2)

    class Lock:
        def __init__(self):
            self.lock = threading.Lock()

        def __enter__(self):
            if not self.lock.acquire(blocking=False):
                both.abort()
                self.lock.acquire()

        def __exit__(self, *_):
            self.lock.release()

    monkeypatch.setattr(sys.modules["weightalign_cuda.model.accumulate"], "threading", types.SimpleNamespace(Lock=Lock))

    def wait():
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(60)

    return wait


def test_threads_that_start_together(native, device, both_at_once):
    """The weight is aligned once."""
    layer = wa.WALinear(5, 4, device=device)
    layer.filters = lambda: both_at_once() or layer.weight

    def run(x):
        with wa.use_backend(native), CountOps() as ops:
            layer(x).sum().backward()
        return ops.calls["align_forward"]

    with wa.accumulate(layer), ThreadPoolExecutor(2) as pool:
        assert sum(pool.map(run, normal(2, 3, 5, device=device))) == 1


def test_threads_that_accumulate_together(device, both_at_once):
    class Waiting(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            both_at_once()
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))

    layer = vary(wa.WALinear(5, 4, dtype=F64, device=device))
    grads = [normal(4, 5, seed=seed, dtype=F64, device=device) for seed in (1, 2)]
    with wa.accumulate(layer):
        filters = layer.aligned_filters()
        with ThreadPoolExecutor(2) as pool:
            # On CUDA both backwards run in the device's thread, one after the other.
            waiting = [grad.as_subclass(Waiting) if device == "cpu" else grad for grad in grads]
            list(pool.map(filters.backward, waiting))
    true = formula(layer.weight, layer.gain, layer.eps, layer.scale)
    expected = torch.autograd.grad(true, (layer.weight, layer.gain), sum(grads))
    assert_near((layer.weight.grad, layer.gain.grad), expected, 1e-12)


def test_compiled(device):
    model = converted(Model(), foreach=True).to(device)
    expected = plainly(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with wa.accumulate(model):
        micro_batches(compiled)
    assert_near(gradients(model), expected)
    torch.compiler.reset()


class FSDPModule:
    """Stands in for torch's class, which fully_shard adds to a module's bases."""


class Sharded(FSDPModule, Model):
    pass


def test_errors():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got int"), wa.accumulate(3):
        pass
    for model, reason in ((Sharded(), "FSDP2 gathers"), (nn.DataParallel(Model()), "DataParallel runs copies")):
        with pytest.raises(RuntimeError, match=rf"wa\.accumulate: .*{reason}"), wa.accumulate(model):
            pass
