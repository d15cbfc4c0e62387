"""wa.conv1d/2d/3d: torch's convolution of the prepared input and weight, every form of padding, torch.compile."""

import pytest
import torch
import torch.nn.functional as F
from truth import BF16, F32, F64, formula, normal

import weightalign_cuda as wa

CONV = {
    1: (wa.conv1d, F.conv1d, torch.nn.Conv1d),
    2: (wa.conv2d, F.conv2d, torch.nn.Conv2d),
    3: (wa.conv3d, F.conv3d, torch.nn.Conv3d),
}


def tensors(spatial, device="cpu", groups=1, kernel=3, dtype=F64):
    x = normal(2, 4, *[9, 7, 6][:spatial], device=device, dtype=dtype)
    w = normal(6, 4 // groups, *[kernel] * spatial, seed=1, device=device, dtype=dtype)
    g, b = normal(6, seed=2, device=device, dtype=dtype), normal(6, seed=3, device=device, dtype=dtype)
    return [t.requires_grad_() for t in (x, w, g, b)]


def assert_same(ours, theirs, inputs, is_scaled=False):
    """Results and all gradients, in float64; is_scaled: compared with their own largest value where that is over 1."""
    grad = normal(*ours.shape, seed=4, dtype=F64, device=ours.device)
    ours, theirs = ((result, *torch.autograd.grad(result, inputs, grad)) for result in (ours, theirs))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9 * (max(1.0, b.abs().max().item()) if is_scaled else 1))


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("batched", [True, False])
def test_matches_the_layers_of_torch(backend, device, spatial, mode, batched):
    ours, _, layer = CONV[spatial]
    inputs = x, w, g, b = tensors(spatial, device, groups=2)
    x = x if batched else x[0]
    theirs = layer(4, 6, 3, stride=2, padding=2, dilation=2, groups=2, padding_mode=mode, device=device, dtype=F64)
    values = {"weight": formula(w, g, 1e-3, 1.5), "bias": b}
    expected = torch.func.functional_call(theirs, values, (F.silu(x),))
    options = {"gain": g, "padding_mode": mode, "activation": "silu", "eps": 1e-3, "scale": 1.5}
    assert_same(ours(x, w, b, 2, 2, 2, 2, **options), expected, inputs)


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("kernel", [2, 3, 4])
def test_same_padding_of_torch(backend, device, spatial, kernel):
    ours, theirs, _ = CONV[spatial]
    inputs = x, w, g, b = tensors(spatial, device, kernel=kernel)
    result = ours(x, w, b, 1, "same", 2, gain=g)
    assert_same(result, theirs(x, formula(w, g), b, 1, "same", 2), inputs)
    assert result.shape[2:] == x.shape[2:]


@pytest.mark.parametrize("stride", [1, 2, 3, (2, 1)])
@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("dilation", [1, 2])
def test_same_padding_of_tensorflow_has_its_size(backend, device, stride, kernel, dilation):
    x, w, _, _ = tensors(2, device, kernel=kernel)
    strides = (stride, stride) if isinstance(stride, int) else stride
    result = wa.conv2d(x, w, None, stride, "same_tf", dilation)
    assert result.shape[2:] == tuple(-(-n // s) for n, s in zip(x.shape[2:], strides, strict=True))


def test_valid_and_asymmetric(backend, device):
    inputs = x, w, g, b = tensors(2, device)
    assert_same(wa.conv2d(x, w, b, padding="valid", gain=g), F.conv2d(x, formula(w, g), b), inputs)
    padded = F.pad(x, (3, 0, 1, 2))  # last dimension first
    assert_same(wa.conv2d(x, w, b, padding=((1, 2), (3, 0)), gain=g), F.conv2d(padded, formula(w, g), b), inputs)
    assert_same(wa.conv2d(x, w, b, padding=((1, 1), 2), gain=g), F.conv2d(x, formula(w, g), b, padding=(1, 2)), inputs)


def test_empty_batch(backend, device):
    _, w, g, b = tensors(2, device)
    x = torch.empty(0, 4, 9, 7, device=device, dtype=F64)
    assert wa.conv2d(x, w, b, 2, 1, gain=g, activation="gelu", padding_mode="reflect").shape == (0, 6, 5, 4)


def test_channels_last_is_kept(native, device):
    x, w, g, b = tensors(2, device, dtype=F32)
    result = wa.conv2d(x.to(memory_format=torch.channels_last), w, b, 1, 1, gain=g, padding_mode="circular")
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_autocast(backend, device):
    x, w, g, b = tensors(2, device, dtype=F32)
    with torch.autocast(device, dtype=BF16):
        result = wa.conv2d(x, w, b, gain=g, activation="relu")
    assert result.dtype == BF16
    expected = F.conv2d(F.relu(x.double()), formula(w.double(), g.double()), b.double())
    # 36 products of values rounded to 8 bits: relative to the sum of their magnitudes.
    size = F.conv2d(F.relu(x.double()), formula(w.double(), g.double()).abs(), b.double().abs())
    assert ((result.double() - expected).abs() <= 4 * 2.0**-8 * size).all()


class Layer(torch.nn.Module):
    def __init__(self, device, **options):
        super().__init__()
        _, self.weight, self.gain, self.bias = map(torch.nn.Parameter, tensors(2, device, dtype=F32))
        self.options = options

    def forward(self, x):
        return wa.conv2d(x, self.weight, self.bias, gain=self.gain, **self.options)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"padding": 1, "padding_mode": "reflect", "activation": "silu"},
        {"padding": "same_tf", "stride": 2},
    ],
    ids=str,
)
def test_compiled_for_any_batch_size(native, device, options):
    torch._dynamo.reset()
    layer = Layer(device, **options)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for batch in (2, 3, 5):
        x = normal(batch, 4, 9, 7, seed=batch, device=device).requires_grad_()
        torch._dynamo.mark_dynamic(x, 0)
        expected, result = layer(x), compiled(x)
        assert torch.allclose(result, expected, atol=1e-5)
        inputs, grad = [x, *layer.parameters()], torch.randn_like(result)
        gradients = torch.autograd.grad(result, inputs, grad), torch.autograd.grad(expected, inputs, grad)
        for a, b in zip(*gradients, strict=True):
            assert torch.allclose(a, b, atol=1e-4)
