"""The layers: torch.nn's with an aligned weight. What all share is tested on WAConv2d."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from truth import ACTIVATIONS, BF16, F32, F64, formula, normal
from varied import vary

import weightalign_cuda as wa

ARGUMENTS = {
    "plain": (6, 8, 3),
    "stride": {"in_channels": 6, "out_channels": 8, "kernel_size": 3, "stride": 2},
    "padding": (6, 8, (3, 5), (1, 2), (1, 2)),
    "same": {"in_channels": 6, "out_channels": 8, "kernel_size": 3, "padding": "same"},
    "dilation": {"in_channels": 6, "out_channels": 8, "kernel_size": 3, "dilation": 2, "padding": 1},
    "groups": {"in_channels": 6, "out_channels": 8, "kernel_size": 3, "groups": 2},
    "depthwise": {"in_channels": 6, "out_channels": 6, "kernel_size": 3, "groups": 6},
    "no bias": {"in_channels": 6, "out_channels": 8, "kernel_size": 1, "bias": False},
    "reflect": {"in_channels": 6, "out_channels": 8, "kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    "circular": {"in_channels": 6, "out_channels": 8, "kernel_size": 3, "padding": 1, "padding_mode": "circular"},
}


def make(cls, arguments, **kwargs):
    return cls(**arguments, **kwargs) if isinstance(arguments, dict) else cls(*arguments, **kwargs)


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_output_and_gradients_of_the_aligned_weight(backend, device, arguments, eps):
    conv = make(wa.WAConv2d, arguments, eps=eps, scale=1.5, device=device, dtype=F64)
    plain = make(nn.Conv2d, arguments, device=device, dtype=F64)
    image = normal(2, 6, 11, 10, seed=1, dtype=F64, device=device).requires_grad_()
    with torch.no_grad():
        conv.gain.copy_(normal(conv.out_channels, seed=2))
    leaves = dict(conv.named_parameters())
    aligned = formula(leaves["weight"], leaves["gain"], eps, 1.5)
    true = torch.func.functional_call(plain, {"weight": aligned} | {k: leaves[k] for k in leaves if k == "bias"}, image)
    output = conv(image)
    torch.testing.assert_close(output, true, rtol=1e-11, atol=1e-11)
    wrt = [image, *leaves.values()]
    for ours, theirs in zip(*(torch.autograd.grad(y.sin().sum(), wrt) for y in (output, true)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_float32_output(backend, device):
    conv = wa.WAConv2d(6, 8, 3, padding=1, eps=0.3, scale=1.7).to(device)
    image = normal(2, 6, 9, 9, device=device)
    expected = F.conv2d(image.double(), formula(conv.weight.double(), None, 0.3, 1.7), conv.bias.double(), padding=1)
    torch.testing.assert_close(conv(image).double(), expected, rtol=1e-4, atol=1e-4)


def test_autocast(backend, device):
    conv = wa.WAConv2d(6, 8, 3).to(device)
    image = normal(2, 6, 9, 9, device=device)
    with torch.autocast(device, dtype=BF16):
        output = conv(image)
    assert output.dtype == BF16
    torch.testing.assert_close(output.float(), conv(image), rtol=0.05, atol=0.05)
    output.float().sum().backward()
    assert {p.grad.dtype for p in conv.parameters()} == {torch.float32}


def test_channels_last_is_kept(native, device):
    conv = wa.WAConv2d(6, 8, 3).to(device, memory_format=torch.channels_last)
    output = conv(normal(2, 6, 9, 9, device=device))
    output.sum().backward()
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert conv.weight.grad.stride() == conv.weight.stride()


def test_parameters():
    torch.manual_seed(0)
    conv = wa.WAConv2d(6, 8, 3, groups=2)
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 8, 3, groups=2)
    assert {k: tuple(v.shape) for k, v in conv.state_dict().items()} == {
        "weight": (8, 3, 3, 3),
        "bias": (8,),
        "gain": (8,),
    }
    assert list(wa.WAConv2d(6, 8, 3, bias=False).state_dict()) == ["weight", "gain"]
    assert torch.equal(conv.weight, plain.weight) and torch.equal(conv.bias, plain.bias)
    assert torch.equal(conv.gain, torch.ones(8)) and conv.gain.requires_grad
    assert isinstance(conv, nn.Conv2d) and (conv.eps, conv.scale) == (1e-5, 1.0)
    half = wa.WAConv2d(6, 8, 3, dtype=BF16, device="meta")
    assert {(p.dtype, p.device.type) for p in half.parameters()} == {(BF16, "meta")}


def test_reset_parameters():
    conv = wa.WAConv2d(6, 8, 3)
    before = copy.deepcopy(conv.state_dict())
    with torch.no_grad():
        conv.gain.fill_(3)
    conv.reset_parameters()
    assert torch.equal(conv.gain, torch.ones(8))
    assert not torch.equal(conv.weight, before["weight"])


def test_repr():
    assert repr(wa.WAConv2d(6, 8, 3)) == "WAConv2d(6, 8, kernel_size=(3, 3), stride=(1, 1), eps=1e-05)"
    assert repr(wa.WAConv2d(6, 8, 3, eps=0.5, scale=2, bias=False)).endswith("bias=False, eps=0.5, scale=2)")


def test_deepcopy_pickle_and_state_dict(device):
    conv = wa.WAConv2d(6, 8, 3, eps=1e-3, scale=1.25).to(device)
    with torch.no_grad():
        conv.gain.copy_(normal(8))
    image = normal(2, 6, 9, 9, device=device)
    conv(image).sum().backward()  # a copy must also work after a step
    loaded = wa.WAConv2d(6, 8, 3, eps=1e-3, scale=1.25).to(device)
    loaded.load_state_dict(conv.state_dict())
    buffer = io.BytesIO()
    torch.save(conv, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv)), loaded, saved):
        assert torch.equal(other(image), conv(image))
        assert other.weight is not conv.weight and other.gain is not conv.gain
        assert repr(other) == repr(conv)


def test_invariant_to_the_scale_of_the_weight(backend, device):
    conv = wa.WAConv2d(6, 8, 3, dtype=F64, device=device, eps=1e-30)
    image = normal(2, 6, 9, 9, dtype=F64, device=device)
    before = conv(image)
    with torch.no_grad():
        conv.weight.mul_(37).add_(2)
    torch.testing.assert_close(conv(image), before, rtol=1e-10, atol=1e-10)


def test_training_reduces_the_loss(backend, device):
    torch.manual_seed(0)
    model = nn.Sequential(wa.WAConv2d(3, 8, 3), nn.ReLU(), wa.WAConv2d(8, 4, 3, stride=2)).to(device)
    image, target = normal(4, 3, 9, 9, device=device), normal(4, 4, 3, 3, seed=1, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(model(image), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


LAYERS = {  # class, arguments, shape of the input
    "Conv1d": (wa.WAConv1d, (6, 8, 3, 2, 1, 2, 2), (6, 11)),
    "Conv2d": (wa.WAConv2d, (6, 8, (3, 5), 2, (1, 2)), (6, 11, 10)),
    "Conv3d": (wa.WAConv3d, (4, 6, 3, 1, 1, 1, 2, False), (4, 5, 6, 7)),
    "ConvTranspose1d": (wa.WAConvTranspose1d, (6, 8, 3, 2, 1, 1), (6, 9)),
    "ConvTranspose2d": (wa.WAConvTranspose2d, (6, 8, 3, 3, 1, 2, 2, True, 2), (6, 5, 6)),
    "ConvTranspose2d depthwise": (wa.WAConvTranspose2d, (6, 12, 3, 2, 1, 1, 6, False), (6, 5, 6)),
    "ConvTranspose3d": (wa.WAConvTranspose3d, (4, 6, (3, 2, 1), 2, 0, 1, 2), (4, 3, 4, 3)),
    "Linear": (wa.WALinear, (12, 5), (3, 12)),
}


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def case(request):
    return request.param


def plain_class(cls):
    return getattr(nn, cls.__name__.removeprefix("WA"))


def truth(layer, arguments, image, eps=1e-5, scale=1.0):
    """The output of torch's layer with the aligned weight; filters of transposed layers are indexed one by one."""
    plain = make(plain_class(type(layer)), arguments, dtype=F64, device=image.device)
    leaves, groups = dict(layer.named_parameters()), getattr(layer, "groups", 1)
    weight, gain = leaves["weight"], leaves.pop("gain")
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        ends = [weight.unflatten(0, (groups, -1))[g, :, o] for g in range(groups) for o in range(weight.shape[1])]
        filters = formula(torch.stack(ends), gain, eps, scale).unflatten(0, (groups, -1))
        leaves["weight"] = torch.cat([group.transpose(0, 1) for group in filters])
    else:
        leaves["weight"] = formula(weight, gain, eps, scale)
    return torch.func.functional_call(plain, leaves, image)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_layer_against_torch(backend, device, case, activation):
    cls, arguments, shape = case
    layer = cls(*arguments, eps=1e-3, scale=1.5, activation=activation, device=device, dtype=F64)
    with torch.no_grad():
        layer.gain.copy_(normal(len(layer.gain), seed=2))
    image = normal(2, *shape, seed=1, dtype=F64, device=device).requires_grad_()
    expected = truth(layer, arguments, image if activation is None else getattr(F, activation)(image), 1e-3, 1.5)
    output = layer(image)
    torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-11)
    wrt = [image, *layer.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad(y.sin().sum(), wrt) for y in (output, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_every_layer_is_initialised_as_in_torch(case):
    cls, arguments, _ = case
    torch.manual_seed(3)
    layer = cls(*arguments)
    torch.manual_seed(3)
    plain = plain_class(cls)(*arguments)
    assert isinstance(layer, plain_class(cls))
    ours, theirs = layer.state_dict(), plain.state_dict()
    gain = ours.pop("gain")
    assert list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert torch.equal(gain, torch.ones(arguments[1]))
    assert repr(layer) == f"WA{repr(plain)[:-1]}, eps=1e-05)"
    skipped = torch.nn.utils.skip_init(cls, *arguments, dtype=BF16)
    assert {p.dtype for p in skipped.parameters()} == {BF16}
    meta = cls(*arguments, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in meta.parameters()} == {("meta", torch.float16)}


def test_every_layer_on_meta_and_copied(case):
    cls, arguments, shape = case
    for activation in (None, "gelu"):
        layer = cls(*arguments, activation=activation)
        image = normal(2, *shape)
        output = layer(image)
        assert layer.to("meta")(image.to("meta")).shape == output.shape
        restored = cls(*arguments, activation=activation).to_empty(device="cpu")
        restored.reset_parameters()
        assert torch.equal(restored.gain, torch.ones_like(restored.gain))


def test_activation_is_shown_and_checked():
    assert repr(wa.WALinear(3, 2, activation="gelu")).endswith("bias=True, eps=1e-05, activation=gelu)")
    with pytest.raises(ValueError, match=r"activation: expected None, 'relu', .* or .*, got 'tanh'"):
        wa.WAConv1d(3, 2, 3, activation="tanh")
    with pytest.raises(ValueError, match="eps: expected a finite number greater than 0, got 0"):
        wa.WAConvTranspose1d(3, 2, 3, eps=0)
    with pytest.raises(TypeError, match="scale: expected a number, got str"):
        wa.WALinear(3, 2, scale="1")


def test_output_size_of_a_transposed_layer():
    layer = wa.WAConvTranspose2d(3, 4, 3, stride=2)
    assert layer(normal(1, 3, 5, 5), output_size=(12, 12)).shape == (1, 4, 12, 12)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_tensorflow_padding(backend, device, stride):
    """Equal to explicit zeros: with 10 rows, a kernel of 4 and stride 3, total (4 - 1) * 3 + 4 - 10 = 3, one before."""
    layer = wa.WAConv1d(3, 4, 4, stride, "same_tf", eps=0.3, scale=1.7, dtype=F64, device=device)
    image = normal(2, 3, 10, dtype=F64, device=device)
    total = {1: 3, 2: 2, 3: 3}[stride]
    padded = F.pad(image, (total // 2, total - total // 2))
    expected = F.conv1d(padded, formula(layer.weight, None, 0.3, 1.7), layer.bias, stride)
    torch.testing.assert_close(layer(image), expected, rtol=1e-12, atol=1e-12)
    assert layer(image).shape[-1] == -(-10 // stride) and "padding=same_tf" in repr(layer)


@pytest.mark.parametrize("cls", [wa.WAConv2d, wa.WALinear])
@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_autocast_gives_the_dtypes_of_torch(device, cls, dtype, activation):
    """For every pair of dtypes of input and layer that torch's layer accepts."""
    layer = cls(4, 6, *([3] if cls is wa.WAConv2d else []), activation=activation, dtype=dtype, device=device)
    plain = plain_class(cls)(4, 6, *([3] if cls is wa.WAConv2d else []), dtype=dtype, device=device)
    image = normal(2, 4, 7, 7, device=device) if cls is wa.WAConv2d else normal(2, 4, device=device)
    for given in (F32, BF16, F64) if dtype != F64 else (F64,):
        if (given == F64) != (dtype == F64):
            continue
        with torch.autocast(device, dtype=BF16):
            assert layer(image.to(given)).dtype == plain(image.to(given)).dtype


def test_gain_may_be_absent():
    """As in layers converted from ones without a gain; a checkpoint then has the plain layer's keys."""
    layer = wa.WAConv2d(3, 4, 3, eps=0.3, scale=2)
    layer.register_parameter("gain", None)
    plain = nn.Conv2d(3, 4, 3)
    layer.load_state_dict(plain.state_dict())
    assert list(layer.state_dict()) == list(plain.state_dict()) and wa.gain_parameters(layer) == []
    layer.reset_parameters()
    image = normal(2, 3, 5, 5)
    expected = F.conv2d(image, formula(layer.weight, eps=0.3, scale=2), layer.bias)
    torch.testing.assert_close(layer(image), expected, rtol=1e-4, atol=1e-5)


def test_old_checkpoints_load():
    model = nn.Sequential(wa.WAConv2d(3, 4, 3), nn.Sequential(wa.WAConvTranspose2d(4, 2, 3, dtype=F64)))
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ConvTranspose2d(4, 2, 3, dtype=F64))).state_dict()
    for gain in wa.gain_parameters(model):
        nn.init.constant_(gain, 3)
    keys = list(plain)
    assert str(model.load_state_dict(plain)) == "<All keys matched successfully>"
    assert list(plain) == keys  # the caller's is unchanged
    assert [g.tolist() for g in wa.gain_parameters(model)] == [[1] * 4, [1] * 2]
    assert torch.equal(model[0].weight, plain["0.weight"])
    with torch.device("meta"):
        empty = nn.Sequential(wa.WAConv2d(3, 4, 3), nn.Sequential(wa.WAConvTranspose2d(4, 2, 3, dtype=F64)))
    empty.load_state_dict(plain, assign=True)
    assert [(g.device.type, g.dtype, g.requires_grad) for g in wa.gain_parameters(empty)] == [
        ("cpu", F32, True),
        ("cpu", F64, True),
    ]
    assert torch.equal(empty[1][0].gain, torch.ones(2))


@pytest.mark.parametrize("ones", [1, 3, 4])
def test_gains_of_other_libraries_load(ones):
    layer, gain = wa.WAConv2d(3, 4, 3), normal(4)
    layer.load_state_dict(layer.state_dict() | {"gain": gain.view(-1, *[1] * ones)})
    assert torch.equal(layer.gain, gain) and layer.state_dict()["gain"].shape == (4,)
    with pytest.raises(RuntimeError, match="size mismatch for gain"):
        layer.load_state_dict(layer.state_dict() | {"gain": normal(2, 2)})


def test_partial_checkpoint_leaves_gain_unchanged():
    layer = wa.WAConv2d(3, 4, 3)
    nn.init.constant_(layer.gain, 3)
    missing, _ = layer.load_state_dict({"bias": torch.zeros(4)}, strict=False)
    assert missing == ["weight", "gain"] and layer.gain.tolist() == [3] * 4


@pytest.mark.parametrize("options", [{}, {"activation": "gelu"}, {"padding": "same_tf"}, {"padding_mode": "reflect"}])
def test_filters_aligned_elsewhere(backend, device, options):
    """A layer uses what its `aligned_by` returns until it is removed; copies do not have it."""
    cases = [(wa.WAConv2d, options | {"stride": 2})]
    if "padding" not in options and "padding_mode" not in options:
        cases += [(wa.WAConvTranspose2d, options | {"groups": 2}), (wa.WALinear, options)]
    for cls, arguments in cases:
        size = () if cls is wa.WALinear else (3,)
        layer = vary(cls(4, 6, *size, **arguments, dtype=F64, device=device))
        image = normal(2, 4, *[9] * 2 * len(size), dtype=F64, device=device).requires_grad_()
        own, elsewhere = layer(image), layer.aligned_filters()
        layer.aligned_by = lambda held=elsewhere: held
        layer.weight = nn.Parameter(torch.zeros_like(layer.weight))  # not used
        output = layer(image)
        assert torch.equal(output, own)
        (ours,), (theirs,) = (torch.autograd.grad(y.square().sum(), [image], retain_graph=True) for y in (output, own))
        assert torch.equal(ours, theirs)
        assert torch.autograd.grad(output.square().sum(), elsewhere)[0].abs().max() > 0
        copies = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
        assert all("aligned_by" not in c.__dict__ and c.aligned_by is None for c in copies)
        assert list(layer.state_dict()) == ["weight", "bias", "gain"] and len(list(layer.buffers())) == 0
        del layer.aligned_by
        assert not torch.equal(layer(image), own)


def test_plain_padding_is_done_by_the_convolution(monkeypatch):
    """Symmetric zeros and no activation: align and torch's convolution, without prepare."""
    monkeypatch.setattr(wa.nn.layers, "convolve", None)
    for arguments in ({}, {"padding": 1}, {"padding": (2, 1), "stride": 2}):
        wa.WAConv2d(3, 4, 3, **arguments)(normal(1, 3, 6, 6))
    with pytest.raises(TypeError):
        wa.WAConv2d(3, 4, 3, padding=1, padding_mode="reflect")(normal(1, 3, 6, 6))


def test_compiled(device):
    for cls, options in ((wa.WAConv2d, {"padding": "same_tf"}), (wa.WAConvTranspose2d, {"activation": "relu"})):
        layer = cls(3, 4, 3, eps=0.3, scale=1.7, **options).to(device)
        image = normal(2, 3, 7, 7, device=device)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(image), layer(image))
        held = layer.aligned_filters().detach()
        layer.aligned_by = lambda held=held: held
        torch.testing.assert_close(compiled(image), layer(image))
