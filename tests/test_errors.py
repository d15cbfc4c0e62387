"""Every message names the argument, what it got and what it expects, before anything runs."""

import math
import re

import pytest
import torch

import weightalign_cuda as wa

W, G = torch.ones(4, 9), torch.ones(4)
IMAGE = torch.ones(4, 2, 3, 3)
FLOATS = "expected float32, float16, bfloat16 or float64, got "

ALIGN = {
    "weight is no tensor": (([1.0],), {}, TypeError, "weight: expected a Tensor, got list"),
    "weight is None": ((None,), {}, TypeError, "weight: expected a Tensor, got NoneType"),
    "integer weight": ((W.long(),), {}, TypeError, f"weight: {FLOATS}torch.int64"),
    "complex weight": ((W.cfloat(),), {}, TypeError, f"weight: {FLOATS}torch.complex64"),
    "sparse weight": ((W.to_sparse(),), {}, TypeError, "weight: expected a strided tensor...torch.sparse_coo"),
    "weight of rank 1": (
        (G,), {}, ValueError, "weight: expected rank 2 or more...got shape (4,)"),
    "weight of rank 0": (
        (G[0],), {}, ValueError, "weight: expected rank 2 or more...got shape ()"),
    "gain is no tensor": ((W, 1.0), {}, TypeError, "gain: expected a Tensor or None, got float"),
    "integer gain": ((W, G.int()), {}, TypeError, f"gain: {FLOATS}torch.int32"),
    "sparse gain": ((W, G.to_sparse()), {}, TypeError, "gain: expected a strided tensor, got layout torch.sparse_coo"),
    "long gain": ((W, W[0]), {}, ValueError, "gain: expected shape (4,)...got (9,)"),
    "gain like the weight": ((W, W), {}, ValueError, "gain: expected shape (4,)...got (4, 9)"),
    "gain in a row": (
        (IMAGE, G.view(1, 4, 1, 1)), {}, ValueError, "gain: expected shape (4,)...got (1, 4, 1, 1)"),
    "gain elsewhere": ((W, G.to("meta")), {}, ValueError, "gain: expected the weight's device cpu, got meta"),
    "eps is no number": ((W,), {"eps": "1e-5"}, TypeError, "eps: expected a number, got str"),
    "eps is a tensor": ((W,), {"eps": torch.tensor(1e-5)}, TypeError, "eps: expected a number, got Tensor"),
    "eps is bool": ((W,), {"eps": True}, TypeError, "eps: expected a number, got bool"),
    "eps is 0": ((W,), {"eps": 0}, ValueError, "eps: expected a finite number greater than 0, got 0"),
    "eps that float32 cannot hold": ((W,), {"eps": 1e-39}, ValueError, "eps: expected at least 1.18e-38...got 1e-39"),
    "negative eps": ((W,), {"eps": -1e-5}, ValueError, "eps: expected a finite number greater than 0, got -1e-05"),
    "infinite eps": ((W,), {"eps": math.inf}, ValueError, "eps: expected a finite number greater than 0, got inf"),
    "eps beyond floats": (
        (W,), {"eps": 10**400}, ValueError, "eps: expected a finite number greater than 0, got 1...0"),
    "nested weight": (
        (torch.nested.nested_tensor([W, W]),), {}, TypeError, "weight: expected a strided tensor, got a nested one"),
    "eps is NaN": ((W,), {"eps": math.nan}, ValueError, "eps: expected a finite number greater than 0, got nan"),
    "scale is no number": ((W,), {"scale": None}, TypeError, "scale: expected a number, got NoneType"),
    "scale is NaN": ((W,), {"scale": math.nan}, ValueError, "scale: expected a finite number, got nan"),
    "integer result": ((W,), {"dtype": torch.int8}, TypeError, f"dtype: {FLOATS}torch.int8"),
    "name of a dtype": ((W,), {"dtype": "float32"}, TypeError, f"dtype: {FLOATS}float32"),
    "float64 from float32": (
        (W,), {"dtype": torch.float64}, ValueError,
        "dtype: float64...got torch.float64 for weight of torch.float32"),
    "float16 from float64": (
        (W.double(),), {"dtype": torch.float16}, ValueError,
        "dtype: float64...got torch.float16 for weight of torch.float64"),
    "memory_format is no format": (
        (IMAGE,), {"memory_format": "channels_last"}, TypeError,
        "memory_format: expected a torch.memory_format, got str"),
    "channels_last of rank 2": (
        (W,), {"memory_format": torch.channels_last}, ValueError,
        "memory_format: torch.channels_last is for rank 4, got a weight of rank 2"),
    "channels_last_3d of rank 4": (
        (IMAGE,), {"memory_format": torch.channels_last_3d}, ValueError,
        "memory_format: torch.channels_last_3d is for rank 5, got a weight of rank 4"),
}  # fmt: skip

FOREACH = {
    "integer weights": (([W.long()],), {}, TypeError, f"weights[0]: {FLOATS}torch.int64"),
    "complex weights": (([W.cfloat(), W.cfloat()],), {}, TypeError, f"weights[0]: {FLOATS}torch.complex64"),
    "a tensor for a list": ((W,), {}, TypeError, "weights: expected a list or tuple, got Tensor"),
    "a generator for a list": ((iter([W]),), {}, TypeError, "weights: expected a list or tuple, got list_iterator"),
    "a bad weight": (([W, 1],), {}, TypeError, "weights[1]: expected a Tensor, got int"),
    "an integer weight": (([W, W.int()],), {}, TypeError, f"weights[1]: {FLOATS}torch.int32"),
    "a weight of rank 1": (
        ([W, W, G],), {}, ValueError, "weights[2]: expected rank 2 or more...got shape (4,)"),
    "a tensor for gains": (([W], G), {}, TypeError, "gains: expected a list or tuple, got Tensor"),
    "too few gains": (([W, W], [G]), {}, ValueError, "gains: expected one for each of the 2 weights, got 1"),
    "a bad gain": (([W, W], [None, 2]), {}, TypeError, "gains[1]: expected a Tensor or None, got int"),
    "a long gain": (
        ([W, W], [G, W[0]]), {}, ValueError, "gains[1]: expected shape (4,)...got (9,)"),
    "bad eps": (([W],), {"eps": "x"}, TypeError, "eps: expected a number, got str"),
    "eps is 0": (([W],), {"eps": 0.0}, ValueError, "eps: expected a finite number greater than 0, got 0.0"),
    "one eps is tiny": (
        ([W, W],), {"eps": [1.0, 1e-39]}, ValueError, "eps[1]: expected at least 1.18e-38...got 1e-39"),
    "one eps is 0": (
        ([W, W],), {"eps": [1, 0]}, ValueError, "eps[1]: expected a finite number greater than 0, got 0"),
    "one eps is None": (([W, W],), {"eps": (None, 1)}, TypeError, "eps[0]: expected a number, got NoneType"),
    "too many eps": (([W],), {"eps": [1, 2]}, ValueError, "eps: expected one for each of the 1 weights, got 2"),
    "no scales": (([W],), {"scale": []}, ValueError, "scale: expected one for each of the 1 weights, got 0"),
    "one scale is infinite": (
        ([W, W],), {"scale": [1, -math.inf]}, ValueError, "scale[1]: expected a finite number, got -inf"),
    "a bad dtype": (([W],), {"dtype": torch.bool}, TypeError, f"dtype: {FLOATS}torch.bool"),
    "float64 among others": (
        ([W, W.double()],), {"dtype": torch.float32}, ValueError,
        "dtype: float64...got torch.float32 for weights[1] of torch.float64"),
    "a bad memory_format": (
        ([W],), {"memory_format": 1}, TypeError, "memory_format: expected a torch.memory_format, got int"),
}  # fmt: skip


X, TINY = torch.ones(2, 2, 5, 4), torch.ones(1, 2, 2, 2)
NUMBERS = "padding: expected ints or (before, after) pairs of ints, got "

PREPARE = {
    "input is no tensor": (([1], IMAGE), {}, TypeError, "input: expected a Tensor, got list"),
    "integer input": ((X.int(), IMAGE), {}, TypeError, f"input: {FLOATS}torch.int32"),
    "input of another rank": (
        (X[0, 0], IMAGE), {}, ValueError, "input: expected rank 4, or 3 without a batch; got (5, 4)"),
    "input elsewhere": ((X.to("meta"), IMAGE), {}, ValueError, "input: expected the weight's device cpu, got meta"),
    "weight without kernel": ((X, W), {}, ValueError, "weight: expected 1 to 3 spatial dimensions, got shape (4, 9)"),
    "weight is no tensor": ((X, None), {}, TypeError, "weight: expected a Tensor, got NoneType"),
    "long gain": ((X, IMAGE, W[0]), {}, ValueError, "gain: expected shape (4,)...got (9,)"),
    "eps is 0": ((X, IMAGE), {"eps": 0}, ValueError, "eps: expected a finite number greater than 0, got 0"),
    "scale is NaN": ((X, IMAGE), {"scale": math.nan}, ValueError, "scale: expected a finite number, got nan"),
    "two dtypes": (
        (X.half(), IMAGE), {}, ValueError, "input: expected the weight's dtype torch.float32...got torch.float16"),
    "float64 and not": (
        (X.double(), IMAGE), {"dtype": torch.float32}, ValueError,
        "input: expected the weight's dtype torch.float32...got torch.float64"),
    "integer result": ((X, IMAGE), {"dtype": torch.int8}, TypeError, f"dtype: {FLOATS}torch.int8"),
    "no format": (
        (X, IMAGE), {"memory_format": 1}, TypeError, "memory_format: expected a torch.memory_format, got int"),
    "format of another rank": (
        (X, IMAGE), {"memory_format": torch.channels_last_3d}, ValueError,
        "memory_format: torch.channels_last_3d is for rank 5, got a weight of rank 4"),
    "activation": (
        (X, IMAGE), {"activation": "tanh"}, ValueError,
        "activation: expected None, 'relu', 'silu', 'gelu' or 'hardswish', got 'tanh'"),
    "mode": (
        (X, IMAGE), {"padding_mode": "constant"}, ValueError,
        "padding_mode: expected one of zeros, reflect, replicate, circular, got 'constant'"),
    "padding is a float": ((X, IMAGE), {"padding": 1.0}, TypeError, "padding: expected an int or a tuple, got float"),
    "too many paddings": (
        (X, IMAGE), {"padding": (1, 1, 1)}, ValueError,
        "padding: expected 2 entries, one for each spatial dimension, got 3"),
    "padding of three": ((X, IMAGE), {"padding": ((1, 2, 3), 1)}, TypeError, f"{NUMBERS}(1, 2, 3)"),
    "padding of a bool": ((X, IMAGE), {"padding": (True, 1)}, TypeError, f"{NUMBERS}True"),
    "negative padding": (
        (X, IMAGE), {"padding": (0, (1, -1))}, ValueError, "padding: expected numbers from 0 to 2^31 - 1, got (1, -1)"),
    "reflects too much": (
        (TINY, IMAGE), {"padding": 2, "padding_mode": "reflect"}, ValueError,
        "padding: reflect pads a dimension of 2 by at most 1, got (2, 2)"),
    "wraps too much": (
        (TINY, IMAGE), {"padding": (0, (0, 3)), "padding_mode": "circular"}, ValueError,
        "padding: circular pads a dimension of 2 by at most 2, got (0, 3)"),
    "repeats nothing": (
        (X[:, :, :0], IMAGE), {"padding": 1, "padding_mode": "replicate"}, ValueError,
        "padding: replicate pads a dimension of 0 by at most 0, got (1, 1)"),
}  # fmt: skip

CONV = {
    "weight of another rank": (
        (X, IMAGE[..., 0]), {}, ValueError, "weight: expected rank 4 for conv2d, got shape (4, 2, 3)"),
    "word for padding": (
        (X, IMAGE), {"padding": "full"}, ValueError,
        "padding: expected numbers, 'valid', 'same' or 'same_tf', got 'full'"),
    "same with a stride": (
        (X, IMAGE), {"padding": "same", "stride": (1, 2)}, ValueError,
        "padding: 'same' is for stride 1, got (1, 2); 'same_tf' is for any"),
    "stride of words": (
        (X, IMAGE), {"padding": "same_tf", "stride": 0}, ValueError,
        "stride: expected a positive int or 2 of them, got 0"),
    "no input": ((None, IMAGE), {"padding": "same"}, TypeError, "input: expected a Tensor, got NoneType"),
    "negative padding": (
        (X, IMAGE), {"padding": -1}, ValueError, "padding: expected numbers from 0 to 2^31 - 1, got -1"),
}  # fmt: skip


def pattern(message):
    """The whole message; `...` stands for anything."""
    return f"^{re.escape(message)}$".replace(re.escape("..."), ".*")


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), ALIGN.values(), ids=ALIGN)
def test_align(args, kwargs, error, message):
    with pytest.raises(error, match=pattern(message)):
        wa.align(*args, **kwargs)


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), FOREACH.values(), ids=FOREACH)
def test_align_foreach(args, kwargs, error, message):
    with pytest.raises(error, match=pattern(message)):
        wa.align_foreach(*args, **kwargs)


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), PREPARE.values(), ids=PREPARE)
def test_prepare(args, kwargs, error, message):
    with pytest.raises(error, match=pattern(message)):
        wa.prepare(*args, **kwargs)


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), CONV.values(), ids=CONV)
def test_conv(args, kwargs, error, message):
    with pytest.raises(error, match=pattern(message)):
        wa.conv2d(*args, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"eps": 0}, ValueError, "eps: expected a finite number greater than 0, got 0"),
        ({"eps": "small"}, TypeError, "eps: expected a number, got str"),
        ({"scale": math.nan}, ValueError, "scale: expected a finite number, got nan"),
        ({"scale": False}, TypeError, "scale: expected a number, got bool"),
        ({"groups": 2}, ValueError, "in_channels must be divisible by groups"),  # torch's own
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_layer(kwargs, error, message):
    with pytest.raises(error, match=pattern(message)):
        wa.WAConv2d(3, 4, 3, **kwargs)


@pytest.mark.parametrize("name", ["gpu", "", "CPU", None])
def test_unknown_backend(name):
    message = f"name: expected one of cuda, cpu, triton, reference, got {name!r}"
    with pytest.raises(ValueError, match=pattern(message)), wa.use_backend(name):
        raise AssertionError("not reached")
