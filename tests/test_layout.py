"""Strides of results and gradients, and correct values in every layout of weight and incoming gradient."""

import pytest
import torch
from truth import BF16, F32, F64, PAIRS, check_align, dense, name, normal, true_results

import weightalign_cuda as wa

# Orders of the dimensions in memory, outermost first.
ORDERS = [
    *[(0, 1), (1, 0)],
    *[(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 0, 1)],
    *[(0, 1, 2, 3), (0, 2, 3, 1), (0, 3, 1, 2), (0, 2, 1, 3), (0, 3, 2, 1), (1, 0, 2, 3), (2, 3, 1, 0), (3, 2, 1, 0)],
    *[(0, 1, 2, 3, 4), (0, 2, 3, 4, 1), (0, 4, 3, 2, 1), (2, 3, 4, 0, 1)],
]
SIZES = (6, 5, 3, 4, 2)
SLICES = {
    "channels": lambda device, dtype: normal(6, 9, 3, 3, device=device, dtype=dtype)[:, 2:7],
    "filters": lambda device, dtype: normal(12, 5, 3, 3, device=device, dtype=dtype)[1::2],
    "columns": lambda device, dtype: normal(6, 40, device=device, dtype=dtype)[:, 3:24],
    "every third value": lambda device, dtype: normal(6, 60, device=device, dtype=dtype)[:, ::3],
    "channels_last": lambda device, dtype: dense(normal(6, 9, 3, 3, device=device, dtype=dtype), (0, 2, 3, 1))[:, 1:6],
    "expanded filters": lambda device, dtype: normal(1, 5, 3, 3, device=device, dtype=dtype).expand(6, -1, -1, -1),
    "expanded values": lambda device, dtype: normal(6, 5, 1, 1, device=device, dtype=dtype).expand(-1, -1, 3, 3),
}


def contiguous_strides(shape):
    return torch.empty(shape, device="meta").stride()


@pytest.mark.parametrize(("dtype", "result_dtype"), [(F32, F32), (F32, BF16), (F64, F64)], ids=name)
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_dense_weights_keep_their_strides(native, device, order, dtype, result_dtype):
    weight = dense(normal(*SIZES[: len(order)], device=device, dtype=dtype), order)
    gain = normal(6, seed=1, device=device)
    aligned, grad_weight, _ = check_align(weight, gain, dtype=result_dtype)
    assert aligned.stride() == weight.stride()
    assert grad_weight.stride() == weight.stride()


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_accumulated_gradients_have_the_strides_of_the_parameter(backend, device, order):
    weight = dense(normal(*SIZES[: len(order)], device=device), order).requires_grad_()
    grad = normal(*weight.shape, seed=2, device=device)
    aligned = wa.align(weight)
    aligned.backward(grad)
    assert aligned.stride() == weight.grad.stride() == weight.stride()
    torch.testing.assert_close(weight.grad.double(), true_results(weight, None, grad)[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("sliced", SLICES)
@pytest.mark.parametrize(("dtype", "result_dtype"), [(F32, F32), (BF16, BF16), (F64, F64)], ids=name)
def test_sliced_and_expanded_weights_give_contiguous_results(native, device, sliced, dtype, result_dtype):
    weight = SLICES[sliced](device, dtype)
    aligned, grad_weight = check_align(weight, dtype=result_dtype)
    assert aligned.is_contiguous()
    assert grad_weight.is_contiguous()


@pytest.mark.parametrize("sliced", SLICES)
def test_gradients_reach_the_tensor_that_was_sliced(backend, device, sliced):
    whole = SLICES[sliced](device, F64)
    whole = (whole if whole._base is None else whole._base).detach().requires_grad_()
    weight = torch.as_strided(whole, (v := SLICES[sliced](device, F64)).shape, v.stride(), v.storage_offset())
    grad = normal(*weight.shape, seed=2, dtype=F64, device=device)
    (found,) = torch.autograd.grad(wa.align(weight), whole, grad)
    (true,) = torch.autograd.grad(weight, whole, true_results(weight, None, grad)[1])
    torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("offset", range(1, 9))
@pytest.mark.parametrize(("dtype", "result_dtype"), PAIRS, ids=name)
def test_any_offset_in_memory(backend, device, offset, dtype, result_dtype):
    """Unaligned 16-byte vectors; with n = 49 every filter starts at another alignment."""
    weight = normal(8 * 49 + offset, device=device, dtype=dtype)[offset:].view(8, 1, 7, 7)
    gain = normal(8 + offset, seed=1, device=device, dtype=dtype)[offset:]
    grad = normal(8 * 49 + 9 - offset, seed=2, device=device, dtype=result_dtype)[9 - offset :].view(8, 1, 7, 7)
    check_align(weight, gain, grad, dtype=result_dtype)


FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.mark.parametrize(("dtype", "result_dtype"), [(F32, F32), (F32, BF16), (BF16, F32), (F64, F64)], ids=name)
@pytest.mark.parametrize("order", [o for o in ORDERS if len(o) in FORMATS], ids=str)
@pytest.mark.parametrize("to_channels_last", [True, False], ids=["channels_last", "contiguous"])
def test_memory_format_overrides(backend, device, order, dtype, result_dtype, to_channels_last):
    weight = dense(normal(*SIZES[: len(order)], device=device, dtype=dtype), order)
    memory_format = FORMATS[len(order)] if to_channels_last else torch.contiguous_format
    aligned, *_ = check_align(weight, normal(6, device=device), dtype=result_dtype, memory_format=memory_format)
    assert aligned.stride() == torch.empty(weight.shape, memory_format=memory_format).stride()


@pytest.mark.parametrize("sliced", ["channels", "channels_last"])
def test_memory_format_of_a_sliced_weight(backend, device, sliced):
    weight = SLICES[sliced](device, F32)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        aligned, *_ = check_align(weight, memory_format=memory_format)
        assert aligned.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.channels_last_3d], ids=name)
def test_other_ranks_of_a_list_keep_their_layout(backend, device, memory_format):
    weights = [dense(normal(*SIZES[: len(order)], device=device), order) for order in ORDERS]
    for weight, aligned in zip(weights, wa.align_foreach(weights, memory_format=memory_format), strict=True):
        if weight.dim() == (4 if memory_format == torch.channels_last else 5):
            assert aligned.is_contiguous(memory_format=memory_format)
        else:
            assert aligned.stride() == weight.stride()


@pytest.mark.parametrize("shape", [(4, 256, 3, 3), (2, 4096, 3, 3), (1, 131073, 2, 2), (2, 7, 129, 65)], ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1)], ids=["contiguous", "channels_last"])
def test_long_filters_change_layout(backend, device, shape, order):
    """Transposed on chip, tile by tile or, beyond some length (here 4 MiB of float64), by a copy."""
    weight = dense(normal(*shape, dtype=F64, device=device), order)
    grad = dense(normal(*shape, seed=2, dtype=F64, device=device), (0, 2, 3, 1) if order[1] == 1 else (0, 1, 2, 3))
    memory_format = torch.channels_last if order[1] == 1 else torch.contiguous_format
    aligned, *_ = check_align(weight, None, grad, memory_format=memory_format)
    assert aligned.is_contiguous(memory_format=memory_format)


GRADS = {
    "one number": lambda g: g.flatten()[:1].view((1,) * g.dim()).expand(g.shape),
    "one number a filter": lambda g: g[:, :1, :1, :1].expand(g.shape),
    "one filter": lambda g: g[:1].expand(g.shape),
    "contiguous": lambda g: g,
    "channels_last": lambda g: dense(g, (0, 2, 3, 1)),
    "reversed": lambda g: dense(g, (3, 2, 1, 0)),
    "sliced": lambda g: torch.cat([g, g, g], 1)[:, g.shape[1] : 2 * g.shape[1]],
    "sliced channels_last": lambda g: dense(torch.cat([g, g], 1), (0, 2, 3, 1))[:, : g.shape[1]],
    "every second value": lambda g: torch.stack([g, g], -1)[..., 0],
}


@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 2, 3)], ids=str)
@pytest.mark.parametrize(("dtype", "result_dtype"), [(F32, F32), (F32, BF16), (BF16, BF16), (F64, F64)], ids=name)
def test_gradients_of_any_layout(native, device, grad, order, dtype, result_dtype):
    weight = dense(normal(8, 5, 3, 4, device=device, dtype=dtype), order)
    incoming = GRADS[grad](normal(8, 5, 3, 4, seed=2, device=device, dtype=result_dtype))
    _, grad_weight, _ = check_align(weight, torch.ones(8, device=device), incoming, dtype=result_dtype)
    assert grad_weight.stride() == weight.stride()
