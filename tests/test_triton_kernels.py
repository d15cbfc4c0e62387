"""The ops with Triton's kernels, called directly; interpreted on the CPU if there is no GPU."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from test_layout import FORMATS, GRADS, ORDERS, SIZES, SLICES, contiguous_strides
from test_prepare import MODES, bound, padded
from truth import ACTIVATIONS, BF16, DTYPES, EPS, F16, F32, F64, PAIRS, assert_near, assert_right, dense, name, normal

from weightalign_cuda.ops.layout import memory_order
from weightalign_cuda.ops.triton import kernels, ops
from weightalign_cuda.ops.triton.launch import InputWork, Launch, _cached
from weightalign_cuda.ops.triton.prepare_kernels import TILE

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
KEPT = torch.preserve_format
SHAPES = {
    "a tile of filters": (16, 64),
    "tiles, the last one not full": (35, 1, 3, 3),
    "n=75": (3, 3, 5, 5),
    "n=256": (9, 16, 4, 4),
    "n=576": (5, 64, 3, 3),
    "n=1024": (3, 1024),
    "n=512": (9, 512),
    "n=1025": (3, 1025),
    "n=4096": (2, 4096),
    "n=4097": (2, 4097),
    "n=8192": (2, 8192),
    "n=8193, in parts": (2, 8193),
    "n=9216, in parts": (2, 1024, 3, 3),
    "one filter": (1, 5, 7),
    "n=1": (5, 1, 1, 1),
}


def align(weights, gains, grads, eps, scales, dtype, memory_format=KEPT):
    """Forward and backward of a list: aligned weights, their gradients, a gain gradient for each."""
    aligned, statistics = ops.align_forward(weights, gains, eps, scales, dtype, memory_format)
    grad_weights, grad_gains = ops.align_backward(grads, weights, gains, statistics, scales)
    return aligned, grad_weights, grad_gains.split([w.shape[0] for w in weights])


def check(weight, gain=None, grad=None, *, eps=EPS, scale=1.0, dtype=None, memory_format=KEPT):
    """Checks one weight; returns its aligned weight, its gradient and the gain's."""
    dtype = dtype or weight.dtype
    if grad is None:
        grad = normal(*weight.shape, seed=7, device=weight.device).to(dtype)
    results = align([weight], [gain], [grad], [eps], [scale], dtype, memory_format)
    (aligned,), (grad_weight,), (grad_gain,) = results
    assert aligned.dtype == dtype
    of_gain = None if gain is None else grad_gain.to(gain.dtype)
    assert_right(weight, gain, grad, aligned, grad_weight, of_gain, eps=eps, scale=scale)
    return aligned, grad_weight, grad_gain


@pytest.mark.parametrize(("dtype", "result_dtype"), [(F32, BF16), (F64, F64)], ids=name)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(device, shape, dtype, result_dtype):
    shape = SHAPES[shape]
    std = (2 / math.prod(shape[1:])) ** 0.5
    gain = normal(shape[0], mean=1, std=0.3, seed=1, device=device)
    check(normal(*shape, std=std, device=device, dtype=dtype), gain, dtype=result_dtype)


@pytest.mark.parametrize(("dtype", "result_dtype"), PAIRS, ids=name)
@pytest.mark.parametrize("shape", ["n=75", "n=8193, in parts"])
def test_dtypes(device, shape, dtype, result_dtype):
    test_values_and_gradients(device, shape, dtype, result_dtype)


@pytest.mark.parametrize("gain_dtype", [*DTYPES, None], ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_gain_of_any_dtype(device, dtype, gain_dtype):
    gain = gain_dtype and normal(6, mean=1, std=0.3, seed=1, device=device, dtype=gain_dtype)
    check(normal(6, 8, 3, 3, device=device, dtype=dtype), gain)


def test_gain_of_any_stride_and_none(device):
    weight = normal(6, 9, device=device)
    check(weight, normal(12, seed=1, device=device)[::2])
    check(weight, normal(1, seed=1, device=device).expand(6))
    for plain, ones in zip(check(weight), check(weight, torch.ones(6, device=device)), strict=True):
        assert torch.equal(plain, ones)


@pytest.mark.parametrize("eps", [1e-12, 0.5, 100])
@pytest.mark.parametrize("scale", [0.3, -2, 0.0])
@pytest.mark.parametrize(("n", "dtype"), [(72, F32), (4100, F32), (72, F64)], ids=str)
def test_eps_and_scale(device, eps, scale, n, dtype):
    gain = torch.tensor([0.0, -1.0, 2.5], device=device)
    check(normal(3, n, device=device, dtype=dtype), gain, eps=eps, scale=scale)


@pytest.mark.parametrize("n", [9, 122, 4001, 8193])  # n * (1 / n) is not 1 in float32 for 122 and 4001
def test_constant_filter_gives_exactly_0(device, n):
    for dtype in DTYPES:
        weight = normal(6, n, device=device, dtype=dtype)
        weight[1:5] = torch.tensor([[0.0], [0.1], [1e4], [-3.3]], device=device)
        aligned, grad_weight, grad_gain = check(weight, torch.ones(6, device=device))
        assert bool((aligned[1:5] == 0).all())
        assert bool(grad_weight.isfinite().all() and grad_gain.isfinite().all())


@pytest.mark.parametrize("n", [9, 576, 4608, 20000])
@pytest.mark.parametrize(("mean", "std"), [(1e4, 1e-3), (-300.0, 1e-4), (1.0, 1e-6), (1e-20, 1e-25)], ids=str)
def test_mean_far_above_the_deviations(device, n, mean, std):
    check(normal(2, n, mean=mean, std=std, device=device), torch.ones(2, device=device), eps=1e-12)


@pytest.mark.parametrize("n", [288, 5000])
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=name)
def test_large_and_small_weights(device, n, dtype):
    for std in (1e-12, 1e-6, 1e6, 1e17 if n == 288 else 1e15):  # squares just fit float32
        check(normal(2, n, std=std, device=device, dtype=dtype), torch.ones(2, device=device))


@pytest.mark.parametrize("n", [1, 9, 4608])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["weight", "gain", "grad"])
def test_nan_and_inf_stay_in_their_filter(device, n, bad, where):
    tensors = {"weight": normal(3, n, device=device), "gain": normal(3, seed=1, device=device)}
    tensors["grad"] = normal(3, n, seed=2, device=device)

    def run():
        weight, gain, grad = tensors.values()
        return [each[0] for each in align([weight], [gain], [grad], [EPS], [1.0], F32)]

    clean = run()
    tensors[where][(1, n // 2)[: tensors[where].dim()]] = bad
    found = run()
    for before, after in zip(clean, found, strict=True):
        assert torch.equal(before[[0, 2]], after[[0, 2]])
    if where == "weight":
        assert bool(found[0][1].isnan().all())


@pytest.mark.parametrize("result_dtype", [BF16, F16], ids=name)
def test_rounding_is_to_nearest_even(device, result_dtype):
    weight = normal(16, 512, device=device)
    exact, rounded = (ops.align_forward([weight], [None], [EPS], [1e-5], d, KEPT)[0][0] for d in (F32, result_dtype))
    assert torch.equal(rounded, exact.to(result_dtype))


@pytest.mark.parametrize(("dtype", "result_dtype"), [(F32, BF16), (F64, F64)], ids=name)
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_dense_weights_keep_their_strides(device, order, dtype, result_dtype):
    weight = dense(normal(*SIZES[: len(order)], device=device, dtype=dtype), order)
    aligned, grad_weight, _ = check(weight, normal(6, seed=1, device=device), dtype=result_dtype)
    assert aligned.stride() == grad_weight.stride() == weight.stride()


@pytest.mark.parametrize("sliced", SLICES)
def test_sliced_and_expanded_weights_give_contiguous_results(device, sliced):
    aligned, grad_weight, _ = check(SLICES[sliced](device, F32), dtype=BF16)
    assert aligned.is_contiguous() and grad_weight.is_contiguous()


@pytest.mark.parametrize("order", [o for o in ORDERS if len(o) in FORMATS], ids=str)
@pytest.mark.parametrize("to_channels_last", [True, False], ids=["channels_last", "contiguous"])
def test_memory_format_overrides(device, order, to_channels_last):
    weight = dense(normal(*SIZES[: len(order)], device=device), order)
    memory_format = FORMATS[len(order)] if to_channels_last else torch.contiguous_format
    grad = normal(*weight.shape, seed=2, device=device).to(memory_format=memory_format)
    aligned, *_ = check(weight, normal(6, device=device), grad, memory_format=memory_format)
    assert aligned.stride() == torch.empty(weight.shape, memory_format=memory_format).stride()


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1)], ids=["contiguous", "channels_last"])
def test_long_filters_change_layout(device, order):
    weight = dense(normal(2, 7, 29, 23, device=device), order)
    grad = dense(normal(*weight.shape, seed=2, device=device), (0, 2, 3, 1) if order[1] == 1 else (0, 1, 2, 3))
    memory_format = torch.channels_last if order[1] == 1 else torch.contiguous_format
    aligned, *_ = check(weight, None, grad, memory_format=memory_format)
    assert aligned.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 2, 3)], ids=str)
def test_gradients_of_any_layout(device, grad, order):
    weight = dense(normal(8, 5, 3, 4, device=device), order)
    incoming = GRADS[grad](normal(8, 5, 3, 4, seed=2, device=device, dtype=BF16))
    _, grad_weight, _ = check(weight, torch.ones(8, device=device), incoming, dtype=BF16)
    assert grad_weight.stride() == weight.stride()


@pytest.mark.parametrize("offset", [1, 8])
@pytest.mark.parametrize("n", [48, 49])
@pytest.mark.parametrize(("dtype", "result_dtype"), PAIRS, ids=name)
def test_any_offset_in_memory(device, offset, n, dtype, result_dtype):
    weight = normal(4 * n + offset, device=device, dtype=dtype)[offset:].view(4, n)
    gain = normal(4 + offset, seed=1, device=device, dtype=dtype)[offset:]
    grad = normal(4 * n + 9 - offset, seed=2, device=device, dtype=result_dtype)[9 - offset :].view(4, n)
    check(weight, gain, grad, dtype=result_dtype)


def network(device, dtypes):
    """Weights of all shapes, layouts and dtypes; gains, some of them None; eps; scales."""
    shapes = [*SHAPES.values(), (0, 3), (3, 0), (0, 0)]
    weights = [normal(*s, seed=i, device=device, dtype=dtypes[i % len(dtypes)]) for i, s in enumerate(shapes)]
    weights = [w if i % 3 else dense(w, (0, *range(2, w.dim()), 1)) for i, w in enumerate(weights)]
    gains = [normal(s[0], seed=50 + i, device=device) if i % 4 else None for i, s in enumerate(shapes)]
    eps = [1e-5 * (1 + i % 3) for i in range(len(shapes))]
    return weights, gains, eps, [1 + 0.5 * (i % 2) for i in range(len(shapes))]


@pytest.mark.parametrize(("dtypes", "result_dtype", "launches"), [([F32], BF16, 1), ([F32, BF16, F16], F32, 3)])
def test_list_equals_single_calls(device, monkeypatch, dtypes, result_dtype, launches):
    weights, gains, eps, scales = network(device, dtypes)
    grads = [normal(*w.shape, seed=90 + i, device=device, dtype=result_dtype) for i, w in enumerate(weights)]
    grids = []
    monkeypatch.setattr(Launch, "_launch", lambda *a, launch=Launch._launch: grids.append(a) or launch(*a))
    together = align(weights, gains, grads, eps, scales, result_dtype)
    assert len(grids) == 2 * launches
    for i, each in enumerate(zip(weights, gains, grads, eps, scales, strict=True)):
        alone = align(*([x] for x in each), result_dtype)
        for one, (other,) in zip(together, alone, strict=True):
            assert torch.equal(one[i], other) and one[i].stride() == other.stride()
    for i in range(len(SHAPES)):
        gain = gains[i]
        right = weights[i], gain, grads[i], together[0][i], together[1][i], None if gain is None else together[2][i]
        assert_right(*right, eps=eps[i], scale=scales[i])


def test_same_bits_and_one_table_every_time(device):
    weights, gains, eps, scales = network(device, [F32])
    (*_, statistics), grads = ops.align_forward(weights, gains, eps, scales, F32, KEPT), weights
    launch, outs = Launch(weights, gains, InputWork()), [torch.empty_like(w) for w in weights]
    for weight, gain, grad, out, scale in zip(weights, gains, grads, outs, scales, strict=True):
        launch.add(weight, grad, out, gain, 0.0, scale, 0)
    grad_gains, before = launch.per_filter(), _cached.cache_info()
    results = []
    for _ in range(3):
        launch.run(kernels.backward, statistics, grad_gains)
        results.append([t.clone() for t in (*outs, grad_gains)])
    after = _cached.cache_info()
    assert (after.misses - before.misses, after.hits - before.hits) == (1, 2)
    for first, *others in zip(*results, strict=True):
        assert all(torch.equal(first, other) for other in others)


def test_accesses_are_wide_only_where_every_address_allows(device):
    whole = normal(4 * 48 + 8, device=device)
    for n, offset, is_wide in [(48, 0, True), (48, 4, True), (48, 1, False), (44, 0, False)]:
        part = whole[offset : offset + 4 * n].view(4, n)
        for tensors in itertools.permutations(
            [part, torch.empty(4, n, device=device), torch.empty(4, n, device=device)]
        ):
            launch = Launch([part], [None], InputWork())
            launch.add(*tensors, None, EPS, 1.0, 0)
            ((task,),) = launch._rows.values()
            assert task.is_wide == is_wide


SIZE = {1: (2, 5, 7), 2: (2, 3, 6, 5), 3: (1, 3, 4, 3, 5)}
PADDING = ((1, 2), (0, 2), (2, 1))


def check_prepare(x, *, padding, mode="zeros", activation=None, dtype=None, weight_dtype=None, memory_format=KEPT):
    """Checks forward and backward together with one weight; returns the prepared input and its gradient."""
    weight = normal(3, 2, 5, seed=1, device=x.device, dtype=weight_dtype or x.dtype)
    gain, dtype = normal(3, seed=2, device=x.device), dtype or x.dtype
    preparation = [n for pair in padding for n in pair], MODES.index(mode), list(ACTIVATIONS).index(activation)
    lists = [weight], [gain], [EPS], [1.0]
    prepared, (aligned,), statistics = ops.prepare_forward(x, *lists, dtype, memory_format, *preparation)
    leaf = x.double().requires_grad_()
    truth, sums = padded(ACTIVATIONS[activation](leaf), padding, mode), F64 if x.dtype == F64 else F32
    assert (prepared.shape, prepared.dtype) == (truth.shape, dtype)
    assert_near("prepared", prepared, truth, bound(activation, 0, truth.abs() + 1, truth, dtype, sums))

    grad = normal(*prepared.shape, seed=3, device=x.device, dtype=dtype)
    grad_aligned = normal(*weight.shape, seed=4, device=x.device, dtype=dtype)
    saved = {None: None, "relu": prepared}.get(activation, x)
    grad_input, (grad_weight,), grad_gain = ops.prepare_backward(
        grad, saved, [grad_aligned], [weight], [gain], statistics, [1.0], x.dtype, memory_order(x), *preparation
    )
    (true,) = torch.autograd.grad(truth, leaf, grad.double())
    magnitudes = torch.ones_like(leaf).requires_grad_()
    (size,) = torch.autograd.grad(padded(magnitudes, padding, mode), magnitudes, grad.double().abs())
    assert grad_input.dtype == x.dtype
    assert_near("gradient of input", grad_input, true, bound(activation, 27, 2 * size, true, x.dtype, sums))
    assert_right(weight, gain, grad_aligned, aligned, grad_weight, grad_gain.to(gain.dtype))
    return prepared, grad_input


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("spatial", "activation"), [(1, "gelu"), *((2, activation) for activation in ACTIVATIONS), (3, "silu")]
)
def test_prepare_values(device, mode, activation, spatial):
    x = normal(*SIZE[spatial], device=device)
    check_prepare(x, padding=PADDING[:spatial], mode=mode, activation=activation)


CASTS = [(F32, F32, BF16), (F16, F32, F32), (BF16, BF16, F16), (F32, BF16, BF16), (F64, F64, F64)]


@pytest.mark.parametrize(("dtype", "weight_dtype", "out"), CASTS, ids=name)
@pytest.mark.parametrize("activation", ["relu", "gelu"])  # one saves its output, one its input
def test_prepare_dtypes(device, dtype, weight_dtype, out, activation):
    x = normal(2, 5, 4, 3, device=device, dtype=dtype)
    check_prepare(
        x, padding=((1, 0), (2, 2)), mode="reflect", activation=activation, dtype=out, weight_dtype=weight_dtype
    )


@pytest.mark.parametrize("spatial", [2, 3])
@pytest.mark.parametrize(("input_last", "result_last"), list(itertools.product([False, True], repeat=2)))
def test_prepare_layouts(device, spatial, input_last, result_last):
    """Several tiles of channels and of positions."""
    last, size = FORMATS[spatial + 2], (1, 35, 9, 7) if spatial == 2 else (1, 33, 3, 5, 3)
    activation = "relu" if result_last else "gelu"
    x = normal(*size, device=device).to(memory_format=last if input_last else torch.contiguous_format)
    wanted = last if result_last else torch.contiguous_format
    padding = PADDING[:spatial]
    prepared, grad = check_prepare(x, padding=padding, mode="circular", activation=activation, memory_format=wanted)
    assert prepared.is_contiguous(memory_format=wanted)
    assert grad.stride() == x.stride()


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("order", [(3, 1, 0, 2), None], ids=["permuted", "not dense"])
def test_prepare_inputs_of_any_strides(device, activation, order):
    whole = normal(3, 5, 6, 5, device=device)
    inputs = [whole[1:, 1:4, 1:, :4], whole[:, :3, ::2, ::2], whole[:1, :3].expand(2, -1, -1, -1)]
    for x in inputs if order is None else [dense(whole, order)]:
        _, grad = check_prepare(x, padding=((0, 1), (1, 1)), mode="replicate", activation=activation)
        assert grad.stride() == (contiguous_strides(x.shape) if order is None else x.stride())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spatial", [1, 3])
def test_tiles_at_the_edge_of_the_padding(device, mode, spatial):
    """4 tiles of positions along the first dimension, padded so far that the repeated values end with the first of the
    second tile, or begin with the last of the third."""
    inner = {1: (), 3: (8, 8)}[spatial]
    tile = TILE // 32 // math.prod(inner)  # of 32 channels
    most = {"reflect": tile, "circular": tile + 1}.get(mode, 2)
    for ends in [(most, 0), (0, most)]:
        x = normal(1, 5, 4 * tile, *inner, device=device)
        check_prepare(x, padding=[ends, *[(0, 0)] * (spatial - 1)], mode=mode)


BORDERS = [
    ((2, 3), ((1, 1), (1, 2)), "reflect"),
    ((3, 2), ((2, 2), (1, 1)), "reflect"),
    ((2, 3), ((2, 2), (3, 3)), "circular"),
    ((1, 2), ((5, 5), (0, 7)), "replicate"),
    ((1, 1), ((0, 2), (0, 0)), "zeros"),
]


@pytest.mark.parametrize(("size", "padding", "mode"), BORDERS)
def test_borders_that_overlap(device, size, padding, mode):
    check_prepare(normal(2, 3, *size, device=device), padding=padding, mode=mode)


@pytest.mark.parametrize("activation", list(ACTIVATIONS)[1:])
def test_nan_and_infinity_propagate_as_in_float64(device, activation):
    x = torch.tensor([0.5, math.nan, math.inf, -math.inf, 100.0, -100.0], device=device).view(1, 1, 6)
    lists, number = ([normal(2, 9, device=device)], [None], [EPS], [1.0]), list(ACTIVATIONS).index(activation)
    prepared, _, statistics = ops.prepare_forward(x, *lists, F32, KEPT, [1, 0], 0, number)
    expected = F.pad(ACTIVATIONS[activation](x.double()), (1, 0))
    assert torch.allclose(prepared.double(), expected, rtol=1e-6, atol=1e-5, equal_nan=True)
    grad = torch.full_like(prepared, math.inf)
    saved, rest = prepared if activation == "relu" else x, (F32, [0, 1, 2], [1, 0], 0, number)
    found = ops.prepare_backward(grad, saved, [], [], [], statistics[:0], [], *rest)[0].flatten()
    assert found[5] == 0  # infinity times a derivative of 0


def test_empty_tensors(device):
    dense = [torch.zeros(shape, device=device) for shape in [(0, 4), (0, 3, 3, 3), (3, 0), (3, 0, 3, 3), (0, 0, 3)]]
    for weight in (*dense, torch.zeros(0, 2, device=device)[:, ::2]):
        gain = torch.ones(len(weight), device=device)
        (aligned,), (grad,), (grad_gain,) = align([weight], [gain], [weight], [EPS], [1.0], F32)
        assert aligned.shape == grad.shape == weight.shape
        assert torch.equal(grad_gain, torch.zeros_like(gain))
    lists = [normal(2, 9, device=device)], [None], [EPS], [1.0]
    for size in [(0, 3, 5), (2, 3, 0), (2, 0, 5)]:
        x = torch.empty(size, device=device)
        prepared, (aligned,), statistics = ops.prepare_forward(x, *lists, F32, KEPT, [1, 0], 0, 1)
        assert prepared.shape == (*size[:2], size[2] + 1) and not prepared.any()
        assert aligned.any()
        nothing, rest = ([], [], [], statistics[:0], []), (F32, [0, 1, 2], [1, 0], 0, 1)
        assert ops.prepare_backward(prepared, prepared, *nothing, *rest)[0].shape == size


X, W = (2, 3, 4, 5), (4, 3, 3, 3)
WRONG = {
    "padding of one dimension": {7: [1, 2]},
    "padding below 0": {7: [1, -1, 0, 0]},
    "too much to reflect": {7: [4, 0, 0, 0]},
    "mode 4": {8: 4},
    "mode -1": {8: -1},
    "activation": {9: len(ACTIVATIONS)},
    "float64": {5: F64},
    "integers": {5: torch.int32},
    "no scales": {4: []},
    "no eps": {3: []},
    "no gains": {2: []},
    "gain of 3": {2: [torch.ones(3)]},
    "weight of rank 1": {1: [torch.ones(3)]},
    "float64 weight": {1: [torch.ones(W, dtype=F64)]},
    "input of rank 2": {0: torch.ones(2, 3)},
    "meta input": {0: torch.empty(X, device="meta")},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_ops_reject_invalid_arguments(device, wrong):
    arguments = [normal(*X, device=device), [normal(*W, device=device)], [None], [EPS], [1.0], F32, KEPT]
    arguments += [[1, 2, 0, 1], 1, 1]
    for place, value in wrong.items():
        arguments[place] = value
    with pytest.raises(RuntimeError):
        ops.prepare_forward(*arguments)


def test_backward_rejects_invalid_arguments(device):
    w, x, statistics = normal(*W, device=device), normal(*X, device=device), torch.zeros(4, 2, device=device)
    for grad, rows, scales in [(w[:2], statistics, [1.0]), (w, statistics[:3], [1.0]), (w, statistics, []),
                               (w, statistics.double(), [1.0]), (w.double(), statistics, [1.0])]:  # fmt: skip
        with pytest.raises(RuntimeError):
            ops.align_backward([grad], [w], [None], rows, scales)
    lists = [w], [w], [None], statistics, [1.0]
    for saved, order, padding, activation in [
        (None, [0, 1, 2, 3], [0] * 4, 1), (x, [0, 1, 2, 3], [0] * 4, 0), (x, [0, 1, 2, 2], [0] * 4, 1),
        (x, [0, 1, 2, 3], [3, 3, 0, 0], 1), (x[:1], [0, 1, 2, 3], [0] * 4, 2), (x, [0, 1, 2, 3], [0] * 3, 1),
    ]:  # fmt: skip
        with pytest.raises(RuntimeError):
            ops.prepare_backward(x, saved, *lists, F32, order, padding, 0, activation)


def test_package_does_not_need_triton():
    code = "import sys; sys.modules['triton'] = None; import weightalign_cuda"
    subprocess.run([sys.executable, "-c", code], check=True)
