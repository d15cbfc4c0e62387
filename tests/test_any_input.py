"""Any valid arguments of any function: values and gradients against the truth in float64, on each backend. `make fuzz`
draws thousands."""

import math

import pytest
import test_layers
import torch
import torch.nn.functional as F
from examples import clock, counted
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import convolutions, is_empty, layers, lists, members, memory_formats, preparations
from test_convolution import CONV, assert_same
from test_prepare import check_prepare, padded
from truth import ACTIVATIONS, BF16, F16, F32, F64, PAIRS, SUM, assert_near, formula, judged, normal

import weightalign_cuda as wa

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in Triton's interpreter


@pytest.fixture(autouse=True)
def examples(request, record_property):
    clock.start(sum(item.get_closest_marker("hypothesis") is not None for item in request.session.items))
    yield
    record_property("examples", clock.examples)


def check_member(member, weight, gain, grad, aligned, grad_weight, grad_gain):
    """grad_weight, grad_gain: None for what is frozen, unused, or not there."""
    assert (grad_weight is not None) == (member.is_trained and member.is_used)
    assert (grad_gain is not None) == (gain is not None and member.is_gain_trained and member.is_used)
    for found, like in (aligned, weight), (grad_weight, weight), (grad_gain, gain):
        assert found is None or found.shape == like.shape
    if is_empty(weight.shape):
        assert grad_gain is None or not grad_gain.any()
        return
    flat = None if gain is None else gain.flatten()
    results = aligned, grad_weight, None if grad_gain is None else grad_gain.flatten()
    # The tolerances take roundings to go up as often as down: 2 sqrt(128) roundoffs for 128 values. Equal ones, of an
    # expanded dimension, are rounded the same way each time, which comes to 128.
    repeats = any(t.expanded not in (None, 0) for t in (member.weight, member.grad))
    factor = 128 / SUM if repeats else 1
    judgements = judged(weight, flat, grad, aligned.dtype, eps=member.eps, scale=member.scale)
    for result, (name, truth, _, bound) in zip(results, judgements, strict=False):
        assert (
            result is None
            or result.dtype == {"gradient of weight": weight, "gradient of gain": gain}.get(name, aligned).dtype
        )
        if result is not None:
            assert_near(name, result, truth, factor * bound)


def check_list(align, each, device):
    """align(weights, gains, eps, scales) -> the aligned weights. Returns weights and results."""
    weights = [m.weight.tensor(device).requires_grad_(m.is_trained) for m in each]
    gains = [m.gain and m.gain.tensor(device).requires_grad_(m.is_gain_trained) for m in each]
    aligned = align(weights, gains, [m.eps for m in each], [m.scale for m in each])
    grads = [m.grad.tensor(device) for m in each]
    used = [i for i, m in enumerate(each) if m.is_used and aligned[i].requires_grad]
    leaves = [t for t in (*weights, *gains) if t is not None and t.requires_grad]
    found = {}
    if used:
        given = [aligned[i] for i in used], leaves, [grads[i] for i in used]
        found = dict(zip(map(id, leaves), torch.autograd.grad(*given, allow_unused=True), strict=True))
    for i, member in enumerate(each):
        of_these = found.get(id(weights[i])), found.get(id(gains[i]))
        check_member(member, weights[i], gains[i], grads[i], aligned[i].detach(), *of_these)
    return weights, aligned


def assert_strides(weight, aligned, memory_format):
    """Those of the memory format where it applies, else the weight's own if it is dense, else contiguous ones; without
    elements always contiguous ones."""
    is_dense = torch.ops.aten.is_non_overlapping_and_dense(weight)
    applies = {torch.channels_last: 4, torch.channels_last_3d: 5}.get(memory_format) == weight.dim()
    if weight.numel() and applies:
        assert aligned.is_contiguous(memory_format=memory_format)
    elif weight.numel() and is_dense and memory_format != torch.contiguous_format:
        assert aligned.stride() == weight.stride()
    else:
        assert aligned.is_contiguous()


@given(data=st.data())
@counted
def test_align(fuzzed, device, data):
    dtype, result_dtype = data.draw(st.sampled_from(PAIRS))
    member = data.draw(members(dtype, result_dtype))
    memory_format = data.draw(memory_formats(len(member.weight.shape)))
    options = {"dtype": result_dtype, "memory_format": memory_format}

    def align(weights, gains, eps, scales):
        return [wa.align(weights[0], gains[0], eps=eps[0], scale=scales[0], **options)]

    (weight,), (aligned,) = check_list(align, [member], device)
    assert aligned.dtype == result_dtype
    assert_strides(weight, aligned, memory_format)


@given(case=lists())
@counted
def test_align_foreach(fuzzed, device, case):
    each, dtype, memory_format = case

    def align(weights, gains, eps, scales):
        return wa.align_foreach(weights, gains, eps=eps, scale=scales, dtype=dtype, memory_format=memory_format)

    for weight, aligned in zip(*check_list(align, each, device), strict=True):
        assert aligned.dtype == (dtype or weight.dtype)
        assert_strides(weight, aligned, memory_format)


CASTS = [(F32, F32, F32), (F32, F32, BF16), (F32, F32, F16), (F16, F16, F32), (BF16, F32, F16), (F64, F64, F64)]


@given(data=st.data())
@counted
def test_prepare(fuzzed, device, data):
    spatial, (dtype, weight_dtype, out) = data.draw(st.integers(1, 3)), data.draw(st.sampled_from(CASTS))
    channels = data.draw(st.one_of(st.integers(1, 6), st.integers(1, 70)))
    # Of a 3D corner, 125 values would go to one: minutes in Triton's interpreter.
    widest = 2 if fuzzed == "triton" and device == "cpu" and spatial == 3 else 6
    preparation = data.draw(preparations(dtype, channels, spatial, widest))
    kernel = [data.draw(st.integers(1, 3)) for _ in range(spatial)]
    member = data.draw(members(weight_dtype, out, (data.draw(st.integers(1, 4)), channels, *kernel)))
    gain = member.gain and member.gain.tensor(device)
    check_prepare(
        preparation.input.tensor(device),
        member.weight.tensor(device),
        gain,
        padding=preparation.padding,
        padding_mode=preparation.padding_mode,
        activation=preparation.activation,
        numbers={"eps": member.eps, "scale": member.scale},
        dtype=out,
        memory_format=data.draw(memory_formats(spatial + 2)),
    )


def explicit(padding, pairs, size, kernel, stride, dilation):
    """(before, after) of each dimension, of a word for padding or of `pairs`."""
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    total = {
        "valid": [0] * len(size),
        "same": reach,
        "same_tf": [max(0, (-(-n // s) - 1) * s + r + 1 - n) for n, s, r in zip(size, stride, reach, strict=True)],
    }
    return pairs if padding == "pairs" else [(n // 2, n - n // 2) for n in total[padding]]


@given(case=convolutions())
@counted
def test_convolution(fuzzed, device, case):
    """In float64, where all sums are exact enough to tell any mistake."""
    member, preparation, padding, stride, dilation, groups, has_bias = case
    kernel, mode, activation = member.weight.shape[2:], preparation.padding_mode, preparation.activation
    strides, dilations = ((n,) * len(kernel) if isinstance(n, int) else n for n in (stride, dilation))
    size = preparation.input.shape[-len(kernel) :]
    pairs = explicit(padding, preparation.padding, size, kernel, strides, dilations)
    most = {"reflect": -1, "circular": 0}.get(mode, math.inf)
    for n, pair, k, d in zip(size, pairs, kernel, dilations, strict=True):
        assume(n + sum(pair) > d * (k - 1) and max(pair) <= n + most)
    x, w = (t.tensor(device).requires_grad_() for t in (preparation.input, member.weight))
    gain = member.gain and member.gain.tensor(device).requires_grad_()
    bias = normal(len(w), seed=9, dtype=F64, device=device).requires_grad_() if has_bias else None
    ours, theirs, _ = CONV[len(kernel)]
    options = {"gain": gain, "padding_mode": mode, "activation": activation, "eps": member.eps, "scale": member.scale}
    result = ours(x, w, bias, stride, pairs if padding == "pairs" else padding, dilation, groups, **options)
    batch = ACTIVATIONS[activation](x if x.dim() == w.dim() else x.unsqueeze(0))
    aligned = formula(w, None if gain is None else gain.flatten(), member.eps, member.scale)
    expected = theirs(padded(batch, pairs, mode), aligned, bias, stride, 0, dilation, groups)
    assert_same(result, expected.view_as(result), [t for t in (x, w, gain, bias) if t is not None], is_scaled=True)


@given(case=layers())
@counted
def test_layer(fuzzed, device, case):
    name, arguments, shape, eps, scale, activation = case
    layer = getattr(wa, name)(**arguments, eps=eps, scale=scale, activation=activation, device=device, dtype=F64)
    with torch.no_grad():
        layer.gain.copy_(normal(len(layer.gain), seed=2, mean=1))
        layer.weight.copy_(normal(*layer.weight.shape, seed=3))
    image = normal(*shape, seed=1, dtype=F64, device=device).requires_grad_()
    activated = image if activation is None else getattr(F, activation)(image)
    assert_same(
        layer(image),
        test_layers.truth(layer, arguments, activated, eps, scale),
        [image, *layer.parameters()],
        is_scaled=True,
    )
