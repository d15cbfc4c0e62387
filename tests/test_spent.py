"""The gradient of a weight is written over the incoming one if nobody else can see that."""

import pytest
import torch
from direct_calls import backward_arguments
from test_direct import needs_torch_2_14
from truth import assert_right, normal

import weightalign_cuda as wa
from weightalign_cuda.ops import autograd, direct, spent

pytestmark = needs_torch_2_14
SHAPE = 64, 64, 3, 3  # more than MIN_VALUES
GRAD = normal(*SHAPE, seed=3)
OPTIONS = {"eps": 0.03, "scale": 1.7}


def aligned_of(own=torch.float32, order=torch.contiguous_format, seed=0, **kwargs):
    weight = normal(*SHAPE, std=0.1, seed=10 * seed).to(own, memory_format=order).requires_grad_()
    gain = normal(SHAPE[0], mean=1, seed=10 * seed + 1).to(torch.promote_types(own, torch.float32)).requires_grad_()
    return weight, gain, wa.align(weight, gain, **OPTIONS, **kwargs)


def incoming(aligned):
    """Where the gradient that arrives lies, without a reference to it."""
    addresses = []
    aligned.register_hook(lambda grad: addresses.append(grad.data_ptr()))
    return addresses


def check(weight, gain, aligned, grad=GRAD):
    grad = grad.to(aligned.dtype)
    assert_right(weight, gain, grad, aligned, weight.grad, gain.grad, **OPTIONS)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_written_over(dtype, order):
    weight, gain, aligned = aligned_of(dtype, order)
    grad = GRAD.to(dtype, memory_format=order)
    addresses = incoming(aligned)
    (aligned * grad).backward(torch.ones_like(aligned))
    assert weight.grad.data_ptr() == addresses[0]
    assert weight.grad.stride() == weight.stride()
    check(weight, gain, aligned)


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.device("meta"), torch.no_grad])
def test_first_backward_of_a_process_anywhere(context):
    weight, gain, aligned = aligned_of()
    addresses = incoming(aligned)
    loss, one = (aligned * GRAD).sum(), torch.ones(())
    spent.holders_of_spent.cache_clear()
    with context():
        grad, gain.grad = torch.autograd.grad(loss, (weight, gain), one)
    assert grad.data_ptr() == addresses[0]
    weight.grad = grad.clone()
    check(weight, gain, aligned)


def test_list():
    lists = [aligned_of(seed=i)[:2] for i in range(3)]
    weights, gains = zip(*lists, strict=True)
    together = wa.align_foreach(weights, gains, **OPTIONS)
    addresses = [incoming(aligned) for aligned in together]
    sum((aligned * (i + 1) * GRAD).sum() for i, aligned in enumerate(together)).backward()
    for i, (weight, gain, aligned) in enumerate(zip(weights, gains, together, strict=True)):
        assert weight.grad.data_ptr() == addresses[i][0]
        check(weight, gain, aligned, (i + 1) * GRAD)


def test_layer():
    layer = wa.WAConv2d(64, 64, 3)
    aligned = layer.align_filters()
    layer.aligned_by = lambda: aligned
    addresses = incoming(aligned)
    layer(normal(2, 64, 6, 6)).sum().backward()
    assert layer.weight.grad.data_ptr() == addresses[0]


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=lambda d: f"{d[0]} to {d[1]}"
)
def test_not_over_another_dtype(dtypes):
    own, result = dtypes
    weight, gain, aligned = aligned_of(own, dtype=result)
    (aligned * GRAD.to(result)).sum().backward()
    check(weight, gain, aligned)


def test_not_over_another_layout():
    weight, gain, aligned = aligned_of()
    aligned.to(memory_format=torch.channels_last).backward(GRAD.to(memory_format=torch.channels_last))
    assert weight.grad.stride() == weight.stride()
    check(weight, gain, aligned)
    weight, gain, aligned = aligned_of(memory_format=torch.channels_last)
    addresses = incoming(aligned)
    (aligned * GRAD).backward(torch.ones_like(aligned))
    assert weight.grad.data_ptr() != addresses[0]
    check(weight, gain, aligned)


def by_caller(aligned):
    grad = GRAD.clone()
    aligned.backward(grad)
    return [grad]


def by_view(aligned):
    grad = GRAD.clone()
    aligned.backward(grad.view(SHAPE))
    return [grad]


def by_hook(aligned):
    held = []
    aligned.register_hook(held.append)
    (aligned * GRAD).sum().backward()
    return held


def by_memory_in_hook(aligned):
    held = []
    aligned.register_hook(lambda grad: held.append(grad.detach()))
    (aligned * GRAD).sum().backward()
    return held


def by_storage_in_hook(aligned):
    held = []
    aligned.register_hook(lambda grad: held.append(grad.untyped_storage()))
    (aligned * GRAD).sum().backward()
    return [torch.empty(0).set_(held[0], 0, SHAPE)]


def by_prehook_of_node(aligned):
    held = []
    aligned.grad_fn.register_prehook(lambda grads: held.extend(grads))
    (aligned * GRAD).sum().backward()
    return held


def by_hook_of_node(aligned):
    held = []
    aligned.grad_fn.register_hook(lambda inputs, outputs: held.extend(outputs))
    (aligned * GRAD).sum().backward()
    return held


def by_retain_grad(aligned):
    aligned.retain_grad()
    (aligned * GRAD).sum().backward()
    return [aligned.grad]


def by_another_result(aligned):
    other = torch.zeros(SHAPE, requires_grad=True)
    (aligned + other).backward(GRAD.clone())
    return [other.grad]


class Given(torch.autograd.Function):
    """Its gradient is what a function returns."""

    @staticmethod
    def forward(ctx, x, function):
        ctx.function = function
        return x.sum()

    @staticmethod
    def backward(ctx, _):
        return ctx.function(), None


def by_numpy(aligned):
    held = GRAD.numpy().copy()
    Given.apply(aligned, lambda: torch.from_numpy(held)).backward()
    return [torch.from_numpy(held)]


def by_dlpack(aligned):
    held = GRAD.clone()
    Given.apply(aligned, lambda: torch.from_dlpack(held)).backward()
    return [held]


def by_another_process(aligned):
    mapped = []

    def shared():
        grad = GRAD.clone().share_memory_()
        mapped.append(torch.UntypedStorage._new_shared_filename_cpu(*grad.untyped_storage()._share_filename_cpu_()))
        return grad

    Given.apply(aligned, shared).backward()
    return [torch.empty(0).set_(mapped[0], 0, SHAPE)]


HOLDERS = [
    *(by_caller, by_view, by_hook, by_memory_in_hook, by_storage_in_hook, by_prehook_of_node, by_hook_of_node),
    *(by_retain_grad, by_another_result, by_numpy, by_dlpack, by_another_process),
]


@pytest.mark.parametrize("holder", HOLDERS)
def test_held_gradients_stay(holder):
    weight, gain, aligned = aligned_of()
    held = holder(aligned)
    assert held
    for grad in held:
        assert torch.equal(grad, GRAD)
    check(weight, gain, aligned)


def test_captured_gradients_stay():
    weight, gain, aligned = aligned_of()
    grad, weight.grad, gain.grad = torch.autograd.grad((aligned * GRAD).sum(), (aligned, weight, gain))
    assert torch.equal(grad, GRAD)
    check(weight, gain, aligned)


def test_not_over_a_part_of_memory():
    weight, gain, aligned = aligned_of()
    part = lambda: torch.empty(0).set_(torch.stack([GRAD, GRAD]).untyped_storage(), GRAD.numel(), SHAPE)  # noqa: E731
    Given.apply(aligned, part).backward()
    assert weight.grad.untyped_storage().nbytes() == weight.nbytes
    check(weight, gain, aligned)


def test_batched_and_odd_gradients():
    weight, _, aligned = aligned_of()
    grads = torch.stack([GRAD, -2 * GRAD])
    batched = torch.autograd.grad(aligned, weight, grads, is_grads_batched=True, retain_graph=True)[0]
    true = [torch.autograd.grad(aligned, weight, grad, retain_graph=True)[0] for grad in grads]
    torch.testing.assert_close(batched, torch.stack(true), rtol=1e-4, atol=1e-5)
    for change in (lambda: torch._neg_view(GRAD.clone()), lambda: torch._lazy_clone(GRAD)):
        weight, gain, aligned = aligned_of()
        grad = change()
        Given.apply(aligned, change).backward()
        check(weight, gain, aligned, torch.clone(grad).resolve_neg())
    weight, _, aligned = aligned_of()
    Given.apply(aligned, lambda: torch._efficientzerotensor(SHAPE)).backward()
    assert weight.grad.count_nonzero() == 0
    with pytest.raises(NotImplementedError, match="SparseCPU"):  # as with small weights
        Given.apply(aligned_of()[2], lambda: GRAD.to_sparse()).backward()


def test_one_gradient_of_two_weights():
    first, second = aligned_of(), aligned_of(seed=1)
    (first[2] + second[2]).backward(GRAD.clone())
    check(*first), check(*second)
    together = wa.align_foreach((first[0], second[0]), (first[1], second[1]), **OPTIONS)
    for t in (*first[:2], *second[:2]):
        t.grad = None
    ((together[0] + together[1]) * GRAD).sum().backward()
    check(*first[:2], together[0]), check(*second[:2], together[1])


def test_retained_graph_twice():
    weight, gain, aligned = aligned_of()
    loss = (aligned * GRAD).sum()
    for _ in range(2):
        weight.grad = gain.grad = None
        loss.backward(retain_graph=True)
        check(weight, gain, aligned)


@pytest.fixture
def asked(monkeypatch):
    """Replaces the function that tells the holders of a gradient that is spent."""
    return lambda answer: monkeypatch.setattr(autograd, "holders_of_spent", answer)


def test_small_gradients_are_not_asked_about(asked):
    asked(None)  # not callable
    weight = normal(8, 8, 3, 3).requires_grad_()
    (wa.align(weight) * 2).sum().backward()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_of_the_question_is_raised(error, asked):
    def fail():
        raise error("of the question")

    weight, _, aligned = aligned_of()
    asked(fail)
    with pytest.raises(error, match="of the question"):
        (aligned * GRAD).sum().backward()
    assert weight.grad is None


def test_wrong_numbers_are_declined():
    weight, gain, _ = aligned_of()
    tensors = [weight.detach()], [gain.detach()]
    _, statistics, _ = direct.forward(*tensors, [0.03], [1.7], 6, 1, None)
    *call, _, _ = backward_arguments([GRAD.clone()], *tensors, statistics, [1.7])
    with torch.no_grad():
        assert direct.backward(*call, lambda: (0,), GRAD.numel()) is not None
        for wrong in ((), None, 1):
            assert direct.backward(*call, lambda wrong=wrong: wrong, GRAD.numel()) is None
            assert direct.backward(*call, lambda wrong=wrong: wrong, GRAD.numel() + 1) is not None
        for wrong in (None, "1", 2**70):
            assert direct.backward(*call, lambda: (0,), wrong) is None
