"""wa.convert: an existing model with aligned weights. Models of timm and torchvision are in test_timm_models.py."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from truth import BF16, F64, formula, normal
from varied import names_of_aligned, network

import weightalign_cuda as wa

PLAIN = {
    "Conv1d": (nn.Conv1d, (4, 6, 3, 2, 1, 2, 2), (4, 9)),
    "Conv2d": (nn.Conv2d, (4, 6, (3, 1), 2, (1, 0)), (4, 9, 8)),
    "Conv2d same": (nn.Conv2d, (4, 6, 4, 1, "same"), (4, 9, 8)),
    "Conv3d": (nn.Conv3d, (4, 6, 3, 1, 1, 1, 1, False, "circular"), (4, 3, 4, 5)),
    "ConvTranspose1d": (nn.ConvTranspose1d, (4, 6, 3, 2, 1, 1, 2), (4, 9)),
    "ConvTranspose2d": (nn.ConvTranspose2d, (4, 6, 3, 2), (4, 5, 4)),
    "ConvTranspose3d": (nn.ConvTranspose3d, (4, 6, 2), (4, 2, 3, 3)),
}


def less_mean(conv):
    """A convolution's weight minus the mean of each filter."""
    if not conv.transposed:
        return conv.weight - conv.weight.flatten(1).mean(1).view(-1, *[1] * (conv.weight.dim() - 1))
    groups = conv.weight.unflatten(0, (conv.groups, -1))  # (groups, C_in / groups, C_out / groups, kernel...)
    return (groups - groups.mean((1, *range(3, groups.dim())), keepdim=True)).flatten(0, 1)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("cls", "arguments", "shape"), PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("gain", ["ones", "preserve"])
def test_every_convolution(backend, device, cls, arguments, shape, gain):
    """With gain="preserve", the plain layer on weights minus their mean."""
    plain = cls(*arguments, dtype=F64, device=device)
    layer = wa.convert(plain, gain=gain)
    assert type(layer).__name__ == f"WA{cls.__name__}" and type(plain) is cls and "gain" not in plain._parameters
    assert layer.weight is plain.weight and layer.bias is plain.bias
    made = getattr(wa, f"WA{cls.__name__}")(*arguments, dtype=F64, device=device)
    made.load_state_dict(layer.state_dict())
    assert layer.__dict__.keys() == made.__dict__.keys() and repr(layer) == repr(made)
    image = normal(2, *shape, dtype=F64, device=device)
    output = layer(image)
    assert torch.equal(output, made(image))
    if gain == "preserve":
        expected = torch.func.functional_call(plain, {"weight": less_mean(plain)}, image)
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    else:
        assert torch.equal(layer.gain, torch.ones(6, dtype=F64, device=device))


def test_model(device, log):
    model = network().to(device)
    before = dict(model.named_parameters())
    random = torch.get_rng_state()
    assert wa.convert(model) is model
    assert torch.equal(torch.get_rng_state(), random)
    assert names_of_aligned(model) == ["0", "3.0", "3.1"] and not log.records
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] for name in before)
    assert set(after) - set(before) == {"0.gain", "3.0.gain", "3.1.gain"}
    image = normal(2, 3, 8, 8, device=device)
    plain = network().to(device)
    for name in ("0", "3.0"):
        plain.get_submodule(name).weight.data = formula(plain.get_submodule(name).weight.data)
    filters = plain[3][1].weight.data.transpose(0, 1)
    plain[3][1].weight.data = formula(filters.contiguous()).transpose(0, 1).contiguous()
    torch.testing.assert_close(model(image), plain(image), rtol=1e-4, atol=1e-5)
    assert [
        p is q for p, q in zip(wa.gain_parameters(model), (model[0].gain, *(m.gain for m in model[3])), strict=True)
    ]


def test_converting_twice_changes_nothing():
    model = wa.convert(network())
    modules = list(model.modules())
    assert wa.convert(model) is model
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    layer = wa.convert(nn.Conv2d(3, 4, 3))
    assert wa.convert(layer) is layer


def test_plain_checkpoints_load():
    model, plain = wa.convert(network(), gain="preserve"), network()
    assert str(model.load_state_dict(plain.state_dict())) == "<All keys matched successfully>"
    assert all(torch.equal(g, torch.ones_like(g)) for g in wa.gain_parameters(model))
    again = wa.convert(network())
    again.load_state_dict(model.state_dict())


@pytest.mark.parametrize("gain", ["ones", "preserve"])
def test_attributes_are_kept(device, gain):
    """dtype, memory layout, requires_grad, mode, gradients."""
    model = network().to(device, BF16, memory_format=torch.channels_last).eval()
    model[0].requires_grad_(False)
    model[3][0].weight.grad = torch.ones_like(model[3][0].weight)
    strides = [p.stride() for p in model.parameters()]
    wa.convert(model, gain=gain)
    gains = wa.gain_parameters(model)
    assert {(g.dtype, g.device.type) for g in gains} == {(BF16, device)} and not any(
        m.training for m in model.modules()
    )
    assert [g.requires_grad for g in gains] == [False, True, True]
    assert [p.stride() for n, p in model.named_parameters() if not n.endswith("gain")] == strides
    assert model[3][0].weight.grad is not None


def test_hooks():
    """They run with the new module, are removed by their handles, and if bound to a module are bound to the new one."""
    conv, calls = nn.Conv2d(3, 4, 3), []
    handles = [
        conv.register_forward_pre_hook(lambda module, args: calls.append(("pre", module))),
        conv.register_forward_hook(lambda module, args, out: calls.append(("forward", module))),
        conv.register_full_backward_hook(lambda module, *grads: calls.append(("backward", module))),
        conv.register_state_dict_post_hook(lambda module, *args: calls.append(("state", module))),
        conv._register_load_state_dict_pre_hook(lambda module, *args: calls.append(("load", module)), True),
    ]
    model = wa.convert(nn.Sequential(conv))
    layer = model[0]
    del conv
    model(normal(1, 3, 5, 5).requires_grad_()).sum().backward()
    model.load_state_dict(model.state_dict())
    assert [name for name, _ in calls] == ["pre", "forward", "backward", "state", "load"]
    assert all(module is layer for _, module in calls)
    for handle in handles:
        handle.remove()
    model.load_state_dict(model.state_dict())
    model(normal(1, 3, 5, 5)).sum().backward()
    assert len(calls) == 5


def test_sharing_is_kept(device):
    conv, first, second, other = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
    first.weight = second.weight
    turned, grouped = (nn.ConvTranspose2d(4, 4 * groups, 3, padding=1, groups=groups) for groups in (1, 2))
    turned.weight = grouped.weight = second.weight
    model = wa.convert(nn.Sequential(conv, nn.Sequential(conv), first, second, turned, other, grouped)).to(device)
    assert model[0] is model[1][0] and model[2] is not model[3]
    assert model[2].weight is model[3].weight is model[4].weight is model[6].weight
    assert model[2].gain is model[3].gain and len(wa.gain_parameters(model)) == 5
    model(normal(1, 4, 5, 5, device=device)).sum().backward()


class Listed(nn.Module):
    """Its forward uses layers held in lists, tuples and dicts, not by submodule name."""

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(3, 3, 3, padding=1) for _ in range(5)]
        for i, layer in enumerate(layers):
            self.add_module(f"layer{i}", layer)
        self.pairs, self.by_name, self.direct = [[layers[0]], (layers[1], layers[2])], {"a": layers[3]}, None
        self.__dict__["direct"] = layers[4]

    def forward(self, x):
        for layer in (*self.pairs[0], *self.pairs[1], self.by_name["a"], self.direct):
            x = layer(x)
        return x


def test_layers_in_containers_are_replaced(device):
    model = Listed().to(device, F64)
    image = normal(1, 3, 6, 6, dtype=F64, device=device)
    expected = image
    for layer in model.children():
        expected = F.conv2d(expected, formula(layer.weight), layer.bias, padding=1)
    torch.testing.assert_close(wa.convert(model)(image), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(wa.fold(model)(image), expected, rtol=1e-11, atol=1e-11)


class Wrapped(nn.Module):
    """Needed because torch.compile, before 2.14, found nothing to compile in torch's own modules."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, x):
        return self.inside(x)


def test_compiled_model_notices(device):
    model = Wrapped(network()).to(device).eval()
    model.compile(backend="aot_eager", fullgraph=True)
    image = normal(2, 3, 8, 8, device=device)
    before = model(image)
    after = wa.convert(model)(image)
    torch.testing.assert_close(after, model.forward(image))
    assert not torch.allclose(after, before, rtol=1e-2)
    torch.testing.assert_close(wa.fold(model, inplace=True)(image), after, rtol=1e-4, atol=1e-5)


REFUSED = {
    "weight_norm": (parametrizations.weight_norm, "parametrized by torch.nn.utils.parametrize"),
    "spectral_norm": (parametrizations.spectral_norm, "parametrized by torch.nn.utils.parametrize"),
    "old weight_norm": (nn.utils.weight_norm, "WeightNorm"),
    "old spectral_norm": (nn.utils.spectral_norm, "SpectralNorm"),
    "pruning": (lambda conv: prune.l1_unstructured(conv, "weight", 0.5), "L1Unstructured"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_computed_weights_are_rejected(make, message):
    model = network()
    make(model[3][0])
    modules = list(model.modules())
    with pytest.raises(ValueError, match=f"model: expected the weight of '3.0' to be a plain.*{message}"):
        wa.convert(model)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))  # nothing was replaced
    assert names_of_aligned(wa.convert(model, exclude="3.0")) == ["0", "3.1"]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_other_rejected_models():
    with pytest.raises(
        TypeError, match=r"model: expected floating-point layers, got torch.ao.nn.quantized.*Conv2d at '0'"
    ):
        wa.convert(nn.Sequential(torch.ao.nn.quantized.Conv2d(3, 4, 3)))
    with pytest.raises(TypeError, match=r"model: expected floating-point layers, got torch.ao.nn.qat.*Conv2d"):
        qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
        wa.convert(torch.ao.nn.qat.Conv2d(3, 4, 3, qconfig=qconfig))
    for model in (torch.jit.script(nn.Conv2d(3, 4, 3)), torch.compile(nn.Conv2d(3, 4, 3))):
        with pytest.raises(TypeError, match="model: expected the model itself, not yet scripted, wrapped or compiled"):
            wa.convert(model)
    compiled = nn.Conv2d(3, 4, 3)
    compiled.compile()
    with pytest.raises(ValueError, match="model: expected layers that are not compiled, got '0'"):
        wa.convert(nn.Sequential(compiled))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 3}, TypeError, "model: expected a torch.nn.Module, got int"),
        ({"gain": "one"}, ValueError, "gain: expected 'ones' or 'preserve', got 'one'"),
        ({"include": 3}, TypeError, "include: expected a name pattern, a list of them or a function"),
        ({"exclude": [nn.Conv2d]}, TypeError, "exclude: expected a name pattern"),
        ({"include": ["0", "layer1"]}, ValueError, "include: 'layer1' matches none of the layers 0, 3.0, 3.1, 6"),
        ({"foreach": 0}, ValueError, "foreach: expected True, False or a number of launches from 1 on, got 0"),
        ({"foreach": "yes"}, ValueError, "foreach: expected True, False or a number .* got 'yes'"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        wa.convert(**{"model": network()} | arguments)


def test_preserve_in_bfloat16_and_with_a_constant_filter(device):
    conv = nn.Conv2d(8, 4, 3, dtype=BF16, device=device)
    with torch.no_grad():
        conv.weight[1] = 0.25
    layer = wa.convert(conv, gain="preserve")
    weight = layer.weight.double()
    expected = weight - weight.mean((1, 2, 3), keepdim=True)
    difference = (layer.aligned_filters().double() - expected).abs()
    assert (difference <= 2**-7 * expected.abs() + 1e-9).all() and layer.gain.isfinite().all()
    assert layer.aligned_filters()[1].abs().max() == 0


def test_converted_model_trains(device):
    """As a copy, without the original."""
    model = wa.convert(network()).to(device)
    model = copy.deepcopy(model)
    images, labels = normal(8, 3, 8, 8, device=device), torch.arange(8, device=device) % 5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


class Constants(dict):
    """Like configurations that are immutable."""

    def _refuse(self, *_):
        raise TypeError("constant")

    __setitem__ = update = _refuse


def test_containers_without_layers_are_not_touched():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    model.config, model.itself = Constants(depth=2), {"again": {}}
    model.itself["again"]["once more"] = model.itself
    wa.convert(model)
    assert all(isinstance(layer, wa.WAConv2d) for layer in model)


def test_layers_in_a_tuple_of_a_converted_layer():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    model[0].peers = (model[1], "and a name")
    wa.convert(model)
    assert model[0].peers == (model[1], "and a name")


def test_rejected_model_is_unchanged():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    seen = []
    model[0].register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    model[1].weight = nn.Parameter(torch.ones(4, 4, 3, 3, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"weight of '1' to be float32, .*, got torch.complex64; exclude it"):
        wa.convert(model)
    model[0].load_state_dict(model[0].state_dict())
    assert seen == [model[0]] and type(model[0]) is nn.Conv2d
