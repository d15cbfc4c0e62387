"""wa.prepare: values and gradients of the prepared input against PyTorch's own steps in float64, layouts, copies and
saved tensors."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from test_layout import GRADS
from truth import ACTIVATIONS, BF16, F16, F32, F64, assert_near, assert_right, dense, name, normal, roundoff

import weightalign_cuda as wa
from weightalign_cuda.ops import native as ops

MODES = ("zeros", "reflect", "replicate", "circular")
LAST, LAST_3D = torch.channels_last, torch.channels_last_3d
FORMATS = {4: LAST, 5: LAST_3D}


def padded(x, padding, mode):
    """F.pad with (before, after) of each spatial dimension."""
    flat = [n for pair in reversed(padding) for n in pair]
    return F.pad(x, flat, mode="constant" if mode == "zeros" else mode) if any(flat) else x


def pairs(padding, spatial):
    """A user's padding as (before, after) of each spatial dimension."""
    entries = [padding] * spatial if isinstance(padding, int) else padding
    return [(e, e) if isinstance(e, int) else e for e in entries]


def is_implicit(padding, mode):
    return mode == "zeros" and all(before == after for before, after in padding)


def bound(activation, places, size, truth, dtype, sums):
    """Activations other than relu: exp and erf to a few units in the last place of float32 (float64), and 6 operations;
    a gradient sums up to `places` terms. Then one rounding."""
    terms = (0 if activation in (None, "relu") else 16) + places
    computed = 2 * terms * roundoff(sums) * size
    return computed + (roundoff(dtype) * (truth.abs() + computed)).clamp(min=torch.finfo(dtype).smallest_normal)


def check_prepare(
    x, w, g=None, *, padding=0, padding_mode="zeros", activation=None, lay=lambda grad: grad, numbers=None, **kwargs
):
    """Runs and checks forward and backward; returns prepared, aligned, gradients of x, w, g. `lay` changes the layout
    of the contiguous incoming gradient; numbers: eps and scale."""
    numbers = numbers or {}
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    g = None if g is None else g.detach().requires_grad_()
    options = {"padding": padding, "padding_mode": padding_mode, "activation": activation}
    prepared, aligned = wa.prepare(x, w, g, **options, **numbers, **kwargs)
    each = pairs(padding, w.dim() - 2)
    explicit = [(0, 0)] * len(each) if is_implicit(each, padding_mode) else each
    leaf = x.detach().double().requires_grad_()
    batch = leaf if x.dim() == w.dim() else leaf.unsqueeze(0)
    truth = padded(ACTIVATIONS[activation](batch), explicit, padding_mode).view_as(prepared)
    sums = F64 if w.dtype == F64 else F32
    assert prepared.dtype == aligned.dtype
    assert_near("prepared", prepared, truth, bound(activation, 0, truth.abs() + 1, truth, prepared.dtype, sums))
    if prepared is x:
        return prepared, aligned
    grad = lay(normal(*prepared.shape, seed=3, device=x.device).to(prepared.dtype))
    grad_aligned = normal(*w.shape, seed=4, device=x.device).to(aligned.dtype)
    wanted = [x, w] if g is None else [x, w, g]
    grads = torch.autograd.grad([prepared, aligned], wanted, [grad, grad_aligned])
    (true,) = torch.autograd.grad(truth, leaf, grad.double())
    magnitudes = leaf.detach().clone().requires_grad_()
    spread = padded(magnitudes if x.dim() == w.dim() else magnitudes.unsqueeze(0), explicit, padding_mode)
    (size,) = torch.autograd.grad(spread.view_as(prepared), magnitudes, grad.double().abs())
    assert grads[0].dtype == x.dtype
    assert_near("gradient of input", grads[0], true, bound(activation, 27, 2 * size, true, x.dtype, sums))
    flat, grad_gain = (None, None) if g is None else (g.flatten(), grads[2].flatten())
    assert_right(w, flat, grad_aligned, aligned, grads[1], grad_gain, **numbers)
    return prepared, aligned, *grads


WEIGHT = {s: (4, 3, *[3, 2, 1][:s]) for s in (1, 2, 3)}
SIZE = {s: (2, 3, *[6, 5, 4][:s]) for s in (1, 2, 3)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("batched", [True, False])
def test_values(backend, device, mode, activation, spatial, batched):
    x = normal(*SIZE[spatial], device=device)
    w, g = normal(*WEIGHT[spatial], seed=1, device=device), 1 + normal(4, seed=2, device=device, std=0.1)
    check_prepare(
        x if batched else x[0],
        w,
        g,
        padding=((1, 2), (0, 3), (2, 1))[:spatial],
        padding_mode=mode,
        activation=activation,
    )


PAIRS = [(F32, F32, BF16), (F32, F32, F16), (F16, F32, F32), (BF16, BF16, F16), (F32, BF16, BF16), (F64, F64, F64)]


@pytest.mark.parametrize(("dtype", "weight_dtype", "out"), PAIRS, ids=name)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dtypes(backend, device, dtype, weight_dtype, out, activation):
    x, w = normal(2, 5, 7, 6, device=device, dtype=dtype), normal(4, 5, 3, 3, device=device, dtype=weight_dtype)
    prepared, *_ = check_prepare(
        x, w, padding=((1, 0), (2, 2)), padding_mode="reflect", activation=activation, dtype=out
    )
    assert prepared.dtype == out


@pytest.mark.parametrize("spatial", [2, 3])
@pytest.mark.parametrize(("input_last", "weight_last"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("padding", [0, 1])
def test_channels_last_if_either_is(backend, device, spatial, input_last, weight_last, padding):
    last = FORMATS[spatial + 2]
    x, w = normal(*SIZE[spatial], device=device), normal(*WEIGHT[spatial], device=device)
    x = x.to(memory_format=last) if input_last else x
    w = w.to(memory_format=last) if weight_last else w
    expected = last if input_last or weight_last else torch.contiguous_format
    prepared, aligned, *_ = check_prepare(x, w, padding=padding, padding_mode="circular", activation="relu")
    assert prepared.is_contiguous(memory_format=expected)
    assert aligned.is_contiguous(memory_format=expected)


ORDERS = [
    *[(0, 1, 2, 3), (0, 2, 1, 3), (0, 2, 3, 1), (0, 1, 3, 2), (3, 1, 0, 2)],
    *[(0, 2, 1, 3, 4), (0, 3, 1, 2, 4), (0, 1, 3, 2, 4), (0, 1, 2, 4, 3)],
]


@pytest.mark.parametrize("is_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("padding", [(0, 0, 0), ((1, 0), 1, 0)], ids=["unpadded", "padded"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_formats_and_gradients_in_the_input_strides(native, device, is_last, order, padding, activation):
    """Unpadded rows that are contiguous on both sides are merged; the orders cover one side and both."""
    spatial = len(order) - 2
    memory_format = FORMATS[len(order)] if is_last else torch.contiguous_format
    x = dense(normal(2, 5, *[4, 3, 2][:spatial], device=device), order)
    w = normal(4, 5, *[3, 2, 1][:spatial], device=device)
    prepared, aligned, grad, *_ = check_prepare(
        x, w, activation=activation, padding=padding[:spatial], memory_format=memory_format
    )
    assert prepared.is_contiguous(memory_format=memory_format)
    assert aligned.is_contiguous(memory_format=memory_format)
    assert grad.stride() == x.stride()


@pytest.mark.parametrize("lay", GRADS.values(), ids=GRADS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_any_layout(native, device, lay, activation):
    x, w = normal(2, 5, 4, 3, device=device), normal(4, 5, 3, 3, device=device)
    check_prepare(x, w, activation=activation, lay=lay, dtype=BF16)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_inputs_that_are_not_dense(backend, device, activation):
    w = normal(4, 3, 3, 3, device=device)
    whole = normal(3, 5, 9, 8, device=device)
    for x in (whole[1:, 1:4, 1:, :7], whole[:, :3, ::2, ::2], whole[:1, :3].expand(2, -1, -1, -1), whole[:, :3, :, :1]):
        check_prepare(x, w, padding=((0, 1), 0), padding_mode="replicate", activation=activation)


@pytest.mark.parametrize(
    ("size", "padding", "mode"),
    [
        ((2, 3), (1, (1, 2)), "reflect"),
        ((3, 2), (2, 1), "reflect"),
        ((2, 3), (2, 3), "circular"),
        ((1, 2), (5, (0, 7)), "replicate"),
        ((1, 1), ((0, 2), 0), "zeros"),
    ],
)
def test_borders_that_overlap(backend, device, size, padding, mode):
    check_prepare(
        normal(2, 3, *size, device=device), normal(4, 3, 1, 1, device=device), padding=padding, padding_mode=mode
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "out"), [(F32, F32), (F32, BF16), (F64, F64)], ids=name)
@pytest.mark.parametrize(
    ("shape", "padding", "is_last"),
    [
        ((1, 2, 9000), [(4500, 2)], False),
        ((2, 3, 4, 4300), [(1, 2), (3, 0)], False),
        ((1, 300, 5, 30), [(2, 1), (0, 16)], True),
        ((1, 5000, 3, 4), [(1, 1), (2, 1)], True),
    ],
    ids=str,
)
def test_rows_of_many_tiles(native, device, mode, dtype, out, shape, padding, is_last):
    """Longer than the CPU kernels' tiles of 4096 values."""
    x = normal(*shape, dtype=dtype, device=device)
    x = x.contiguous(memory_format=LAST) if is_last else x
    weight = normal(2, shape[1], *[1] * len(padding), dtype=dtype, device=device)
    check_prepare(x, weight, padding=padding, padding_mode=mode, activation="silu", dtype=out)


def test_empty_inputs(backend, device):
    w = normal(4, 3, 3, 3, device=device)
    for shape in [(0, 3, 5, 5), (2, 3, 0, 4)]:
        x = torch.empty(shape, device=device, requires_grad=True)
        prepared, _ = wa.prepare(x, w, padding=((1, 0), 0), activation="relu")
        assert prepared.shape == (shape[0], 3, shape[2] + 1, shape[3])
        assert not prepared.any()
        prepared.sum().backward()
        assert x.grad.shape == shape


@pytest.mark.parametrize("activation", list(ACTIVATIONS)[1:])
def test_nan_and_infinity_propagate_as_in_float64(native, device, activation):
    """And where the derivative is 0 so is the gradient, even if the incoming one is infinite or NaN. (The reference is
    PyTorch's own, whose float32 gelu makes infinity NaN.)"""
    x = torch.tensor([0.5, math.nan, math.inf, -math.inf, 100.0, -100.0], device=device).tile(2, 3, 3).requires_grad_()
    prepared, _ = wa.prepare(x, normal(2, 3, 1, device=device), activation=activation, padding=((1, 0),))
    expected = F.pad(ACTIVATIONS[activation](x.double()), (1, 0))
    torch.testing.assert_close(prepared.double(), expected, rtol=1e-6, atol=1e-5, equal_nan=True)
    (slope,) = torch.autograd.grad(ACTIVATIONS[activation](x).sum(), x)
    assert (slope == 0).any()
    if activation == "hardswish":  # at NaN PyTorch's depends on vectorisation: NaN or 1
        slope = slope.masked_fill(x.isnan(), math.nan)
    if activation == "gelu":  # x e^(-x^2/2): infinity times 0; PyTorch's is infinite on aarch64
        slope = slope.masked_fill(x.isinf(), math.nan)
    for value in (math.inf, math.nan):
        (grad,) = torch.autograd.grad(prepared, x, torch.full_like(prepared, value), retain_graph=True)
        torch.testing.assert_close(grad, torch.where(slope == 0, 0, value * slope), rtol=0, atol=0, equal_nan=True)


def test_input_is_returned_if_nothing_changes(backend, device):
    w, g = normal(4, 3, 3, 3, device=device), normal(4, device=device)
    x = normal(2, 3, 5, 5, device=device)
    for each, kwargs in [
        (x, {}),
        (x, {"padding": (1, 2)}),
        (x[0], {"padding": 1}),
        (x, {"padding_mode": "reflect"}),
        (x, {"dtype": F32, "memory_format": torch.contiguous_format}),
        (x.to(memory_format=LAST), {}),
    ]:
        prepared, aligned = wa.prepare(each, w, g, **kwargs)
        assert prepared is each
        assert torch.equal(aligned, wa.align(w, g))
    for kwargs in [{"padding": ((1, 0), 0)}, {"activation": "relu"}, {"dtype": BF16}, {"memory_format": LAST}]:
        assert wa.prepare(x, w, g, **kwargs)[0] is not x


def test_padding_done_by_the_convolution_is_skipped(backend, device):
    x, w = normal(2, 3, 5, 5, device=device), normal(4, 3, 3, 3, device=device)
    assert wa.prepare(x, w, padding=(1, 2), activation="relu")[0].shape == x.shape
    assert wa.prepare(x, w, padding=((1, 1), (2, 3)), activation="relu")[0].shape == (2, 3, 7, 10)
    assert wa.prepare(x, w, padding=1, padding_mode="reflect")[0].shape == (2, 3, 7, 7)


@pytest.mark.parametrize(("activation", "kept"), [(None, None), ("relu", "prepared"), ("silu", "input")])
def test_saves_only_what_the_convolution_saves(native, device, activation, kept):
    x, w = normal(2, 3, 6, 6, device=device).requires_grad_(), normal(4, 3, 3, 3, device=device).requires_grad_()
    saved = []

    def pack(t):  # keeps no tensor: a result that its own node keeps is never released
        saved.append((t.shape, t.data_ptr()))
        return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        prepared, _ = wa.prepare(x, w, padding=((1, 0), 0), activation=activation)
    images = [address for shape, address in saved if len(shape) == 4 and shape[0] == 2]
    expected = {None: [], "prepared": [prepared], "input": [x]}[kept]
    assert images == [t.data_ptr() for t in expected]


@pytest.mark.parametrize("frozen", ["input", "weight", "gain"])
@pytest.mark.parametrize("used", ["both", "prepared", "aligned"])
def test_no_gradients_where_none_are_required(backend, device, frozen, used):
    tensors = {"input": normal(2, 3, 6, 6, device=device), "weight": normal(4, 3, 3, 3, device=device)}
    tensors["gain"] = normal(4, device=device)
    for key, t in tensors.items():
        t.requires_grad_(key != frozen)
    prepared, aligned = wa.prepare(*tensors.values(), activation="relu", padding=((1, 0), 0))
    total = (prepared.square().sum() if used != "aligned" else 0) + (
        aligned.square().sum() if used != "prepared" else 0
    )
    if not (total.requires_grad):
        return
    total.backward()
    for key, t in tensors.items():
        asked = key != frozen and (used == "both" or (used == "prepared") == (key == "input"))
        assert (t.grad is not None and bool(t.grad.abs().sum() > 0)) == asked, key


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mode", MODES)
def test_twice_differentiable(backend, device, activation, mode):
    x, w = normal(1, 2, 3, 4, device=device, dtype=F64), normal(2, 2, 2, 2, device=device, dtype=F64)
    inputs = [t.requires_grad_() for t in (x, w, normal(2, device=device, dtype=F64))]

    def run(x, w, g):
        return wa.prepare(x, w, g, activation=activation, padding=((1, 2), (0, 1)), padding_mode=mode)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_same_bits_on_any_number_of_threads(native, device, restore_threads):
    x, w = normal(4, 33, 30, 29, device=device), normal(64, 33, 3, 3, device=device)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(check_prepare(x, w, padding=((1, 2), 1), padding_mode="reflect", activation="gelu", dtype=BF16))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_autocast(backend, device):
    x, w = normal(2, 3, 6, 6, device=device), normal(4, 3, 3, 3, device=device)
    with torch.autocast(device, dtype=BF16):
        assert [t.dtype for t in wa.prepare(x, w)] == [BF16, BF16]
        assert [t.dtype for t in wa.prepare(x.to(BF16), w)] == [BF16, BF16]
        assert [t.dtype for t in wa.prepare(x, w.to(BF16))] == [BF16, BF16]
        assert [t.dtype for t in wa.prepare(x.double(), w.double())] == [F64, F64]


def prepare_arguments(x, w, g, activation):
    return x, [w], [g], [1e-5], [1.0], F32, LAST, [1, 2, 0, 1], 1, activation


@pytest.mark.parametrize(
    ("activation", "gain"),
    [(3, True), *(pytest.param(*few, marks=pytest.mark.slow) for few in [(0, True), (1, False)])],
)
def test_opcheck(ops, device, activation, gain):
    x, w = normal(2, 3, 4, 5, device=device).requires_grad_(), normal(4, 3, 3, 3, device=device).requires_grad_()
    g = normal(4, device=device).requires_grad_() if gain else None
    arguments = prepare_arguments(x, w, g, activation)
    torch.library.opcheck(ops.prepare_forward, arguments)
    with torch.no_grad():
        prepared, aligned, statistics = ops.prepare_forward(*arguments)
    saved = [None, prepared, x, x, x][activation]
    lists = [[torch.randn_like(a) for a in aligned], [w], [g], statistics, [1.0]]
    rest = F32, [0, 1, 2, 3], [1, 2, 0, 1], 1, activation
    with torch.no_grad():
        torch.library.opcheck(ops.prepare_backward, (torch.randn_like(prepared), saved, *lists, *rest))


@pytest.mark.parametrize(
    "wrong",
    [
        {7: [1, 2]}, {7: [1, -1, 0, 0]}, {7: [4, 0, 0, 0]}, {8: 4}, {8: -1}, {9: len(ACTIVATIONS)},
        {9: -1}, {5: F64}, {4: []}, {3: []},
    ],
    ids=str,
)  # fmt: skip
def test_ops_reject_invalid_arguments(ops, device, wrong):
    """Direct callers of the ops get an error, not a crash."""
    arguments = list(prepare_arguments(normal(2, 3, 4, 5, device=device), normal(4, 3, 3, 3, device=device), None, 1))
    for place, value in wrong.items():
        arguments[place] = value
    with pytest.raises(RuntimeError):
        ops.prepare_forward(*arguments)


def test_ops_reject_mixed_accumulation_types(native, device):
    x, w = normal(2, 3, 4, 5, device=device), normal(4, 3, 3, 3, device=device, dtype=F64)
    lists = [w], [w], [None], torch.empty(4, 2, device=device, dtype=F64), [1.0]
    with pytest.raises(RuntimeError, match="float64 exactly if they are"):
        ops.prepare_backward(x, None, *lists, F32, [0, 1, 2, 3], [0] * 4, 0, 0)
