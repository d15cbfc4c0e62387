"""Integration with PyTorch: one small model that calls wa.align, wa.align_foreach and wa.conv2d, through everything
that PyTorch does to models. Compared with the same model of the formula in float64."""

import asyncio
import io
import multiprocessing
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from truth import BF16, F16, F32, F64, formula, name, normal

import weightalign_cuda as wa
from weightalign_cuda.ops import backend as ops_backend


class Model(nn.Module):
    """Two convolutions and a matrix; `true` is the same model of the formula."""

    def __init__(self, device, dtype=F32):
        super().__init__()
        shapes = {"first": (4, 3, 3, 3), "second": (5, 4, 1, 1), "matrix": (6, 5), "gain": (4,), "other": (5,)}
        for seed, (key, shape) in enumerate(shapes.items()):
            setattr(self, key, nn.Parameter(normal(*shape, seed=seed, dtype=dtype, device=device)))

    def forward(self, x):
        options = {"gain": self.gain, "activation": "silu", "eps": 2.0, "scale": 1.7}
        x = wa.conv2d(x, self.first, None, 2, "same_tf", **options)
        weights, gains = [self.second, self.matrix], [self.other, None]
        second, matrix = wa.align_foreach(weights, gains, eps=[0.7, 0.1], scale=[1.3, 0.8])
        x = F.conv2d(x, second).mean((2, 3)) @ matrix.T
        return x @ wa.align(self.matrix, eps=0.4, scale=0.5)

    def true(self, x):
        x = F.pad(F.silu(x), [0, 1, 0, 1])
        x = F.conv2d(x, formula(self.first, self.gain, 2.0, 1.7), None, 2)
        x = F.conv2d(x, formula(self.second, self.other, 0.7, 1.3)).mean((2, 3))
        return x @ formula(self.matrix, None, 0.1, 0.8).T @ formula(self.matrix, None, 0.4, 0.5)


def images(device, count=2, dtype=F32):
    return normal(count, 3, 8, 8, seed=9, dtype=dtype, device=device)


def with_gradients(model, forward, x):
    """The result and the gradients of all parameters of one step."""
    result = forward(x)
    return result.detach(), *torch.autograd.grad(result.float().square().sum(), list(model.parameters()))


def assert_true(found, model, x, rounded=F32):
    """`found`, computed in `rounded`, is close to the formula in float64. Some ten successive roundings, of sums of up
    to 27 products that cancel to a few hundredths of their magnitudes."""
    exact = Model(x.device, F64)
    exact.load_state_dict(model.state_dict())
    true = exact.true(x.double())
    truths = true.detach(), *torch.autograd.grad(true.square().sum(), list(exact.parameters()))
    for ours, truth in zip(found, truths, strict=True):
        assert (ours.double() - truth).abs().max() <= 30 * torch.finfo(rounded).eps * truth.abs().max()


@pytest.fixture
def model(device):
    return Model(device)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_batched_gradients(any_backend, device, model):
    """Several at once, by torch.autograd's older vmap."""
    exact, parameters = Model(device, F64), list(model.parameters())
    exact.load_state_dict(model.state_dict())
    x, true_x = images(device).requires_grad_(), images(device, dtype=F64).requires_grad_()
    result, true = model(x), exact.true(true_x)
    grads = normal(3, *result.shape, seed=4, device=device)
    found = torch.autograd.grad(result, [x, *parameters], grads, is_grads_batched=True)
    truths = [torch.autograd.grad(true, [true_x, *exact.parameters()], g.double(), retain_graph=True) for g in grads]
    for ours, truth in zip(found, map(torch.stack, zip(*truths, strict=True)), strict=True):
        assert (ours.double() - truth).abs().max() <= 30 * torch.finfo(F32).eps * truth.abs().max()


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_batched_gradients_of_every_padding(backend, device, mode):
    w = normal(4, 3, 3, 3, dtype=F64, device=device).requires_grad_()
    x = normal(1, 3, 4, 5, dtype=F64, device=device).requires_grad_()

    def prepared(x, w):
        options = {"padding": ((1, 2), 1), "padding_mode": mode, "eps": 0.3, "scale": 1.7}
        return wa.prepare(x, w, activation="silu", memory_format=torch.channels_last, **options)

    assert torch.autograd.gradcheck(prepared, (x, w), check_batched_grad=True)


def test_eager(any_backend, device, model):
    assert_true(with_gradients(model, model, images(device)), model, images(device))


def test_compile_with_any_batch(any_backend, device, model):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch in (2, 3, 5):
        x = images(device, batch)
        torch._dynamo.mark_dynamic(x, 0)
        assert_true(with_gradients(model, compiled, x), model, x)


def test_export_and_reload(any_backend, device, model):
    buffer = io.BytesIO()
    batch = torch.export.Dim("batch", min=2, max=64)
    torch.export.save(torch.export.export(model, (images(device, 3),), dynamic_shapes={"x": {0: batch}}), buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for x in (images(device), images(device, 7)):
        assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("low", [BF16, F16], ids=name)
def test_autocast(any_backend, device, model, low):
    with torch.autocast(device, dtype=low):
        result = model(images(device))
        found = result.detach(), *torch.autograd.grad(result.float().square().sum(), list(model.parameters()))
    assert result.dtype == low
    assert_true(found, model, images(device), rounded=low)


def test_autocast_of_float64_weights(any_backend, device):
    """They stay float64, which is never mixed with other dtypes."""
    model = Model(device, F64)
    with torch.autocast(device, dtype=BF16):
        first, second = wa.align_foreach([model.first, model.second], eps=[2.0, 0.7], scale=[1.7, 1.3])
        prepared, aligned = wa.prepare(images(device, dtype=F64), model.first)
    assert {t.dtype for t in (first, second, prepared, aligned)} == {F64}
    torch.testing.assert_close(first, formula(model.first, None, 2.0, 1.7), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(any_backend, device, model, reentrant):
    x = images(device).requires_grad_()
    plain = with_gradients(model, model, x)
    result = checkpoint(model, x, use_reentrant=reentrant)
    result.square().sum().backward()  # reentrant checkpointing rejects torch.autograd.grad
    for one, other in zip(plain[1:], model.parameters(), strict=True):
        assert torch.equal(one, other.grad)


def loss(model, x):
    return lambda parameters: torch.func.functional_call(model, parameters, (x,)).square().sum()


def test_func_grad(any_backend, device, model):
    parameters = dict(model.named_parameters())
    grads = torch.func.grad(loss(model, images(device)))(parameters)
    assert_true((model(images(device)).detach(), *grads.values()), model, images(device))


def test_func_grad_twice_and_forward_mode(any_backend, device):
    weight, gain, tangent = (normal(*s, seed=i, dtype=F64, device=device) for i, s in enumerate([(4, 6), (4,), (4, 6)]))
    functions = [lambda w, a=a: a(w, gain, eps=0.4, scale=1.7).sin().sum() for a in (wa.align, formula)]
    for transform in (
        lambda f: torch.func.jvp(f, (weight,), (tangent,))[1],
        lambda f: torch.func.jacfwd(f)(weight),
        lambda f: torch.func.hessian(f)(weight),
        lambda f: torch.func.grad(lambda w: torch.func.grad(f)(w).cos().sum())(weight),
    ):
        ours, true = map(transform, functions)
        torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-12)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(weight, tangent)
        ours, true = (torch.autograd.forward_ad.unpack_dual(f(dual)).tangent for f in functions)
    torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-12)


def test_vmap(any_backend, device):
    """Over images of one model, and over an ensemble of models."""
    model, x = Model(device, F64), images(device, 3, F64)
    each = torch.func.vmap(lambda image: model(image[None])[0])(x)
    torch.testing.assert_close(each, model(x), rtol=1e-10, atol=1e-12)
    models = [model, Model(device, F64)]
    with torch.no_grad():
        models[1].first.add_(normal(4, 3, 3, 3, seed=7, device=device))
    stacked, _ = torch.func.stack_module_state(models)
    together = torch.func.vmap(lambda p: torch.func.functional_call(model, p, (x,)))(stacked)
    torch.testing.assert_close(together, torch.stack([m.true(x) for m in models]), rtol=1e-9, atol=1e-11)


def test_inference_mode(any_backend, device, model):
    with torch.inference_mode():
        result, made_inside = model(images(device)), Model(device)
    assert result.is_inference()
    assert torch.equal(result, model(images(device)))
    with torch.no_grad():
        assert torch.equal(made_inside(images(device)), result)


def test_deterministic_algorithms(any_backend, device, model):
    usual = with_gradients(model, model, images(device))
    torch.use_deterministic_algorithms(True)
    try:
        strict = [with_gradients(model, model, images(device)) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    for runs in zip(usual, *strict, strict=True):
        assert all(torch.equal(runs[0], run) for run in runs)


def test_many_threads_at_once(any_backend, device, restore_threads):
    """Each thread has its own model; all get the same results."""
    count = 8 if any_backend == "triton" and device == "cpu" else 32  # the interpreter runs one at a time
    torch.set_num_threads(1)
    model = Model(device)
    expected = with_gradients(model, model, images(device))
    begin = threading.Barrier(count)

    def run(_):
        own = Model(device)
        begin.wait(60)
        with wa.use_backend(any_backend):  # the choice is per thread
            return [with_gradients(own, own, images(device)) for _ in range(2)]

    with ThreadPoolExecutor(count) as pool:
        for steps in pool.map(run, range(count)):
            assert all(torch.equal(*pair) for step in steps for pair in zip(step, expected, strict=True))


def test_choice_is_per_asyncio_task(device):
    async def run(name):
        with wa.use_backend(name):
            for _ in range(3):
                await asyncio.sleep(0)
                assert ops_backend.choose(device) == name

    async def both():
        await asyncio.gather(run(device), run("reference"))
        assert ops_backend.choose(device) == device

    asyncio.run(both())


class Aligned(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return wa.align(normal(4, 9, seed=index))


def test_workers_of_a_data_loader(restore_threads):
    """Processes forked after this one used the native library; torch runs each on one thread."""
    expected = torch.stack([Aligned()[i] for i in range(4)])
    loader = torch.utils.data.DataLoader(Aligned(), batch_size=4, num_workers=2, multiprocessing_context="fork")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about forking with threads, in later Pythons
        assert torch.equal(next(iter(loader)), expected)


def bits_of_an_aligned_weight():
    return wa.align(normal(64, 4000)).view(torch.int32).sum().item()


def _align_in_child(queue):
    torch.set_num_threads(1)
    queue.put(bits_of_an_aligned_weight())


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_child_process(method):
    """After this process used all its threads, which a forked one does not have."""
    here = bits_of_an_aligned_weight()
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_align_in_child, args=(queue,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child.start()
    assert queue.get(timeout=60) == here
    child.join(60)
    assert child.exitcode == 0
