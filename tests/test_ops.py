"""The registered ops: opcheck, fake kernels, torch.compile, autocast, the meta device."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from truth import BF16, F16, F32, F64, assert_right, check_align, dense, formula, name, normal
from varied import numbers

import weightalign_cuda as wa
from weightalign_cuda.ops import native as ops
from weightalign_cuda.ops import reference

PRESERVE, CONTIGUOUS, LAST = torch.preserve_format, torch.contiguous_format, torch.channels_last


def image_weights(device, dtype):
    """Dense in several orders, sliced, long, tiny; also rank 2 and 5."""
    w = [normal(*s, seed=i, device=device, dtype=dtype) for i, s in enumerate([(4, 3, 3, 3), (6, 5), (2, 4, 2, 3, 2)])]
    return [
        *w,
        dense(w[0], (0, 2, 3, 1)),
        dense(w[0], (1, 0, 3, 2)),
        dense(w[1], (1, 0)),
        normal(4, 6, 3, 3, device=device, dtype=dtype)[:, 1:4],
        normal(1, 3, 3, 3, device=device, dtype=dtype).expand(4, -1, -1, -1),
        normal(3, 1, device=device, dtype=dtype),
        normal(0, 4, device=device, dtype=dtype),
        normal(3, 0, device=device, dtype=dtype),
    ]


def forward_args(weights, gains, dtype, memory_format=PRESERVE):
    return weights, gains, *numbers(len(weights)).values(), dtype, memory_format


def some_gains(weights, dtype):
    """A gain for each weight, except None for every third."""
    return [normal(w.shape[0], seed=i, device=w.device, dtype=dtype) if i % 3 else None for i, w in enumerate(weights)]


@pytest.mark.parametrize(
    ("dtype", "result_dtype", "gain_dtype", "memory_format", "requires_grad"),
    [
        (F32, F32, F32, PRESERVE, False),
        (F32, BF16, BF16, LAST, True),
        (F16, F16, F32, CONTIGUOUS, False),
        (BF16, F32, F64, torch.channels_last_3d, True),
        (F64, F64, F16, PRESERVE, False),
    ],
    ids=name,
)
def test_opcheck_forward(ops, device, dtype, result_dtype, gain_dtype, memory_format, requires_grad):
    weights = [w.requires_grad_(requires_grad) for w in image_weights(device, dtype)[:7]]
    gains = [g if g is None else g.requires_grad_(requires_grad) for g in some_gains(weights, gain_dtype)]
    torch.library.opcheck(ops.align_forward, forward_args(weights, gains, result_dtype, memory_format))


@pytest.mark.parametrize("requires", ["the weight", "the gain", "nothing"])
def test_opcheck_forward_of_one(ops, device, requires):
    weight = normal(4, 9, device=device).requires_grad_(requires == "the weight")
    gain = normal(4, device=device).requires_grad_() if requires == "the gain" else None
    torch.library.opcheck(ops.align_forward, forward_args([weight], [gain], F32))


@pytest.mark.parametrize(("dtype", "grad_dtype"), [(F32, F32), (F32, BF16), (F16, F16), (F64, F64)], ids=name)
def test_opcheck_backward(ops, device, dtype, grad_dtype):
    weights = image_weights(device, dtype)[:7]
    gains = some_gains(weights, F32)
    args = forward_args(weights, gains, grad_dtype)
    aligned, statistics = ops.align_forward(*args)
    grads = [dense(a, range(a.dim() - 1, -1, -1)) for a in aligned]
    torch.library.opcheck(ops.align_backward, (grads, weights, gains, statistics, args[3]))


def described(results):
    tensors, table = results
    return [(t.shape, t.dtype, t.stride(), t.device) for t in (*tensors, table)]


@pytest.mark.parametrize("memory_format", [PRESERVE, CONTIGUOUS, LAST, torch.channels_last_3d], ids=name)
@pytest.mark.parametrize(("dtype", "result_dtype"), [(F32, F32), (F32, BF16), (BF16, F16), (F64, F64)], ids=name)
def test_fake_kernels_agree_with_the_real_ones(device, dtype, result_dtype, memory_format):
    weights = image_weights(device, dtype)
    args = forward_args(weights, some_gains(weights, F32), result_dtype, memory_format)
    aligned, statistics = real = ops.align_forward(*args)
    backward = aligned, weights, args[1], statistics, args[3]
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(w) for w in weights]
        fake_gains = [g if g is None else mode.from_tensor(g) for g in args[1]]
        fake_aligned, fake_statistics = fake = ops.align_forward(fakes, fake_gains, *args[2:])
        fake_backward = ops.align_backward(fake_aligned, fakes, fake_gains, fake_statistics, args[3])
    assert described(fake) == described(real)
    assert described(fake_backward) == described(ops.align_backward(*backward))


@pytest.mark.parametrize("implementation", [ops, reference], ids=["registered", "reference"])
@pytest.mark.parametrize(("dtype", "result_dtype"), [(F32, F32), (F32, BF16), (BF16, BF16), (F64, F64)], ids=name)
def test_values_of_forward_and_backward(device, implementation, dtype, result_dtype):
    """The reference's own backward is used only without the native library; otherwise autograd is."""
    weights = [w for w in image_weights(device, dtype) if w.numel()]
    weights += [normal(3, 50, mean=1e4, std=1e-3, device=device, dtype=dtype), torch.full_like(weights[0], 0.1)]
    gains = some_gains(weights, F32)
    args = forward_args(weights, gains, result_dtype)
    aligned, statistics = implementation.align_forward(*args)
    grads = [normal(*w.shape, seed=50 + i, device=device, dtype=result_dtype) for i, w in enumerate(weights)]
    grad_weights, grad_gains = implementation.align_backward(grads, weights, gains, statistics, args[3])
    assert statistics.dtype == grad_gains.dtype == (F64 if dtype == F64 else F32)
    rows = grad_gains.split([w.shape[0] for w in weights])
    for i, (weight, gain, row) in enumerate(zip(weights, gains, rows, strict=True)):
        options = {"eps": args[2][i], "scale": args[3][i]}
        gain = gain if gain is None else gain.to(row.dtype)
        assert_right(weight, gain, grads[i], aligned[i], grad_weights[i], row, **options)
        assert grad_weights[i].stride() == weight.stride() or not torch.ops.aten.is_non_overlapping_and_dense(weight)


@pytest.mark.parametrize("dtype", [F32, F64], ids=name)
def test_statistics_of_any_strides(ops, device, dtype):
    weights = image_weights(device, dtype)[:3]
    gains, scales = some_gains(weights, F32), [0.7, 1.3, 2.1]
    grads, statistics = ops.align_forward(weights, gains, [1e-3, 2.0, 0.1], scales, dtype, PRESERVE)
    grad_weights, grad_gains = ops.align_backward(grads, weights, gains, statistics, scales)
    for rows in (dense(statistics, (1, 0)), statistics.repeat_interleave(2, 0)[::2]):
        assert not rows.is_contiguous()
        others, other_gains = ops.align_backward(grads, weights, gains, rows, scales)
        assert torch.equal(other_gains, grad_gains)
        assert all(torch.equal(*pair) for pair in zip(others, grad_weights, strict=True))


def test_statistics(device):
    """Mean and 1 / sqrt(n/2 * var + eps), one row per filter of the whole list, float32 or float64."""
    weights = [normal(3, 50, mean=4, device=device), normal(2, 5, 3, 3, seed=1, device=device)]
    for dtype, table_dtype, rtol in ((F32, F32, 1e-6), (BF16, F32, 1e-6), (F64, F64, 1e-13)):
        rounded = [w.to(dtype) for w in weights]
        statistics = ops.align_forward(rounded, [None] * 2, [1e-3, 2.0], [5.0, 6.0], dtype, PRESERVE)[1]
        rows = [w.double().flatten(1) for w in rounded]
        rstd = [
            (r.shape[1] / 2 * r.var(1, correction=0) + eps).rsqrt() for r, eps in zip(rows, (1e-3, 2.0), strict=True)
        ]
        expected = torch.stack([torch.cat([r.mean(1) for r in rows]), torch.cat(rstd)], 1).to(table_dtype)
        torch.testing.assert_close(statistics, expected, rtol=rtol, atol=rtol)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def step(conv, gain, image, extra):
    aligned = wa.align_foreach([conv.weight, extra], [conv.gain, gain], **numbers(2), dtype=F32)
    return conv(image).square().mean() + sum(a.sin().sum() for a in aligned)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.usefixtures("fresh_compiler")
def test_compile_without_graph_breaks(native, device, compiler):
    """aot_eager compiles a whole training step; inductor, which checks strides as well, only the function, which does
    not need a C++ compiler."""
    conv = wa.WAConv2d(3, 8, 3, padding=1, eps=0.3, scale=1.5).to(device, memory_format=LAST)
    gain = normal(4, device=device).requires_grad_() if compiler == "inductor" else None
    extra = dense(normal(4, 2, 3, 3, seed=1, device=device), (1, 0, 2, 3)).requires_grad_()
    leaves = [extra, conv.weight, conv.gain, *([conv.bias] if gain is None else [gain])]

    def function():
        if compiler == "aot_eager":
            return (step(conv, gain, image, extra),)
        options = numbers(2) | {"dtype": BF16, "memory_format": CONTIGUOUS}
        return tuple(wa.align_foreach([extra, conv.weight], [gain, conv.gain], **options))

    image = normal(2, 3, 8, 8, seed=3, device=device)
    results = [run() for run in (function, torch.compile(function, fullgraph=True, backend=compiler))]
    grads = [torch.autograd.grad(r, leaves, [torch.full_like(t, 0.3) + t.detach() for t in r]) for r in results]
    for eager, compiled in zip(results[0] + grads[0], results[1] + grads[1], strict=True):
        assert eager.stride() == compiled.stride() and eager.dtype == compiled.dtype
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_with_dynamic_sizes(native, device):
    compiled = torch.compile(wa.align, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((4, 9), (6, 9), (6, 12)):
        weight = normal(*shape, device=device).requires_grad_()
        result = compiled(weight)
        assert torch.equal(result, wa.align(weight))
        assert torch.autograd.grad(result.sum(), weight)[0].shape == shape


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_for_different_layers(native, device):
    """From the second value on, torch.compile makes eps and scale symbols instead of constants."""
    compiled = torch.compile(lambda conv, image: conv(image), fullgraph=True, backend="aot_eager")
    image = normal(2, 3, 8, 8, device=device)
    for eps, scale in ((1e-5, 1.0), (0.1, 1.5), (0.3, 2.5)):
        conv = wa.WAConv2d(3, 4, 3, eps=eps, scale=scale).to(device)
        torch.testing.assert_close(compiled(conv, image), conv(image))


@pytest.mark.parametrize("low", [BF16, F16], ids=name)
def test_autocast_decides_the_dtype(backend, device, low):
    weights = [normal(4, 9, seed=1, device=device, dtype=d).requires_grad_() for d in (F32, BF16, F16, F64)]
    with torch.autocast(device, dtype=low):
        together = wa.align_foreach(weights, **numbers(4))
        assert [a.dtype for a in together] == [low, low, low, F64]
        assert wa.align(weights[0], dtype=F32).dtype == F32
        with torch.autocast(device, enabled=False):
            assert wa.align(weights[0]).dtype == F32
    with torch.autocast("cpu" if device == "cuda" else "cuda", dtype=BF16, enabled=device == "cuda"):
        assert wa.align(weights[0]).dtype == F32  # autocast of another device
    for weight, aligned, eps, scale in zip(weights, together, *numbers(4).values(), strict=True):
        assert torch.equal(aligned, wa.align(weight, eps=eps, scale=scale, dtype=aligned.dtype))
        assert torch.autograd.grad(aligned.sum(), weight)[0].dtype == weight.dtype


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=name)
def test_meta_device(dtype):
    real = dense(normal(4, 3, 3, 3, dtype=dtype), (0, 2, 3, 1))
    weight, gain = real.to("meta").requires_grad_(), torch.ones(4, device="meta", requires_grad=True)
    for memory_format in (PRESERVE, CONTIGUOUS):
        aligned = wa.align(weight, gain, memory_format=memory_format)
        grads = torch.autograd.grad(aligned.sum(), (weight, gain))
        assert (aligned.device.type, aligned.shape, aligned.dtype) == ("meta", weight.shape, weight.dtype)
        assert [(g.shape, g.dtype) for g in grads] == [(t.shape, t.dtype) for t in (weight, gain)]
        assert aligned.stride() == wa.align(real, memory_format=memory_format).stride()


def test_activation_checkpointing(backend, device):
    weight, gain = (
        normal(4, 9, dtype=F64, device=device).requires_grad_(),
        torch.ones(4, device=device).requires_grad_(),
    )
    grads = []
    for align in (wa.align, lambda *a: torch.utils.checkpoint.checkpoint(wa.align, *a, use_reentrant=False)):
        grads.append(torch.autograd.grad(align(weight, gain).sin().sum(), (weight, gain)))
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_computed_weight(backend, device):
    """Not a leaf: the gradient continues to its inputs."""
    raw, gain = normal(4, 9, dtype=F64, device=device).requires_grad_(), normal(1, dtype=F64, device=device)
    gain.requires_grad_()
    found, true = (
        torch.autograd.grad(align(raw.exp(), gain.expand(4) * 2, eps=0.4, scale=1.7).sin().sum(), (raw, gain))
        for align in (wa.align, formula)
    )
    torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-12)


def test_weight_changed_in_place_before_backward_is_an_error(native, device):
    weight = normal(4, 9, device=device).requires_grad_()
    aligned = wa.align(weight)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        aligned.sum().backward()


def test_unused_weight_of_a_list_changed_in_place(native, device):
    """It takes no part in the backward, so it is no error. (torch's own check of saved tensors is all or none.)"""
    weights = [normal(4, 9, seed=i, device=device).requires_grad_() for i in range(2)]
    first, second = wa.align_foreach(weights, scale=[1.5, 0.5])
    expected = torch.autograd.grad(first.sin().sum(), weights[0], retain_graph=True)[0]
    with torch.no_grad():
        weights[1].mul_(2)
    assert torch.equal(torch.autograd.grad(first.sin().sum(), weights[0], retain_graph=True)[0], expected)
    with pytest.raises(RuntimeError, match=r"inplace operation: weights\[1\] is at version 1; expected version 0"):
        second.sum().backward()


WRONG = {  # invalid replacements for arguments of align_backward
    "short statistics": {3: lambda s: s[:3]},
    "statistics of one number": {3: lambda s: s[:, :1]},
    "flat statistics": {3: torch.flatten},
    "statistics of another dtype": {3: lambda s: s.double()},
    "gradient of another shape": {0: lambda grads: [grads[0].view(9, 4)]},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_backward_with_mismatched_arguments(ops, device, wrong):
    """For direct callers of the op: nothing outside a tensor is ever read."""
    weights = [normal(4, 9, device=device)]
    aligned, statistics = ops.align_forward(weights, [None], [0.1], [1.5], F32, PRESERVE)
    arguments = [aligned, weights, [None], statistics, [1.5]]
    for place, replace in wrong.items():
        arguments[place] = replace(arguments[place])
    with pytest.raises(RuntimeError, match=r"grads: want|statistics: want"):
        ops.align_backward(*arguments)


def test_backward_twice_through_one_graph(backend, device):
    weight = normal(4, 9, device=device).requires_grad_()
    aligned = wa.align(weight)
    grads = [torch.autograd.grad(aligned, weight, torch.ones_like(aligned), retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*grads)
    check_align(weight)
