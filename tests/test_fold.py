"""wa.fold and wa.frozen: weights aligned once, for deployment and for inference between training steps."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrizations, prune
from truth import BF16, F64, formula, normal
from varied import vary

import weightalign_cuda as wa
from weightalign_cuda.folded import FoldedConv1d, FoldedConv2d, FoldedConvTranspose2d, FoldedLinear

LAYERS = {  # ours, keyword arguments, shape of an input, what it folds to
    "Conv1d": (wa.WAConv1d, {}, (4, 9), nn.Conv1d),
    "Conv2d": (wa.WAConv2d, {"stride": 2, "padding": 1, "groups": 2, "scale": 1.5, "eps": 0.1}, (4, 9, 8), nn.Conv2d),
    "reflect": (wa.WAConv2d, {"padding": 1, "padding_mode": "reflect", "bias": False}, (4, 9, 8), nn.Conv2d),
    "same": (wa.WAConv2d, {"padding": "same", "dilation": 2}, (4, 9, 8), nn.Conv2d),
    "Conv3d": (wa.WAConv3d, {}, (4, 4, 5, 3), nn.Conv3d),
    "ConvTranspose1d": (wa.WAConvTranspose1d, {"stride": 2}, (4, 5), nn.ConvTranspose1d),
    "ConvTranspose2d": (wa.WAConvTranspose2d, {"stride": 2, "groups": 2}, (4, 5, 4), nn.ConvTranspose2d),
    "ConvTranspose3d": (wa.WAConvTranspose3d, {}, (4, 3, 2, 3), nn.ConvTranspose3d),
    "Linear": (wa.WALinear, {}, (4,), nn.Linear),
    "same_tf": (wa.WAConv2d, {"padding": "same_tf", "stride": 2}, (4, 9, 8), FoldedConv2d),
    "same_tf circular": (
        wa.WAConv1d,
        {"padding": "same_tf", "stride": 2, "padding_mode": "circular", "activation": "silu"},
        (4, 9),
        FoldedConv1d,
    ),
    "relu": (wa.WAConv2d, {"padding": 1, "activation": "relu"}, (4, 9, 8), FoldedConv2d),
    "gelu transposed": (wa.WAConvTranspose2d, {"activation": "gelu"}, (4, 5, 4), FoldedConvTranspose2d),
    "silu linear": (wa.WALinear, {"activation": "silu"}, (4,), FoldedLinear),
}


def make(cls, arguments, device="cpu", dtype=F64):
    size, options = () if cls is wa.WALinear else (3,), {"eps": 0.3, "scale": 1.7} | arguments
    layer = cls(4, 6, *size, **options, dtype=dtype, device=device)
    with torch.no_grad():
        layer.gain.copy_(normal(6, seed=2))
    return layer


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def case(request, device):
    cls, arguments, shape, folded = request.param
    return make(cls, arguments, device), normal(2, *shape, dtype=F64, device=device), folded


def network(device="cpu"):
    """With a shared layer, layers that share parameters, and layers that fold to classes of this package."""
    torch.manual_seed(0)
    model = nn.Sequential(
        wa.WAConv2d(3, 8, 3, padding="same_tf", stride=2),
        nn.BatchNorm2d(8),
        *[wa.WAConv2d(8, 8, 3, padding=1, activation=kind) for kind in (None, None, "relu")],
        wa.WAConvTranspose2d(8, 4, 2),
        nn.Flatten(),
        nn.LazyLinear(5),
    )
    model.append(wa.WALinear(5, 5))
    model.append(model[-1])
    model(normal(2, 3, 9, 8))
    vary(model)
    for name in ("weight", "gain", "eps", "scale"):
        setattr(model[3], name, getattr(model[2], name))
    return model.to(device).eval()


def ops_of(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def test_every_layer(case):
    layer, image, folded_class = case
    folded = wa.fold(layer)
    assert type(folded) is folded_class and isinstance(layer, wa.nn.layers.Aligned)
    torch.testing.assert_close(folded(image), layer(image), rtol=1e-13, atol=1e-13)
    assert list(folded.state_dict()) == [k for k in layer.state_dict() if k != "gain"]
    assert folded.weight.shape == layer.weight.shape and isinstance(folded.weight, nn.Parameter)
    if not isinstance(layer, nn.modules.conv._ConvTransposeNd):
        expected = formula(layer.weight, layer.gain, layer.eps, layer.scale)
        torch.testing.assert_close(folded.weight, expected, rtol=1e-12, atol=1e-12)
    assert wa.fold(folded, inplace=True) is folded
    for other in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        assert torch.equal(other(image), folded(image)) and repr(other) == repr(folded)
    if folded_class in vars(nn).values():  # nothing of this package is left
        size = [] if folded_class is nn.Linear else [3]
        assert folded.__dict__.keys() == folded_class(4, 6, *size).__dict__.keys()
    program = torch.export.export(folded, (image,), strict=False)
    assert not [op for op in ops_of(program) if not op.startswith("aten.")]
    torch.testing.assert_close(program.module()(image), layer(image), rtol=1e-13, atol=1e-13)


def test_repr():
    layer = wa.WAConv2d(4, 6, 3, stride=2, padding="same_tf", activation="relu")
    shape = "4, 6, kernel_size=(3, 3), stride=(2, 2)"
    assert repr(wa.fold(layer)) == f"FoldedConv2d({shape}, padding=same_tf, activation=relu)"
    assert repr(wa.fold(wa.WALinear(3, 2))) == repr(nn.Linear(3, 2))


@pytest.mark.parametrize("inplace", [False, True])
def test_model(device, inplace):
    model = network(device)
    image = normal(2, 3, 9, 8, device=device)
    expected, keys = model(image), model.state_dict().keys()
    folded = wa.fold(model, inplace=inplace)
    assert (folded is model) == inplace
    torch.testing.assert_close(folded(image), expected, rtol=1e-5, atol=1e-5)
    assert not [m for m in folded.modules() if isinstance(m, wa.nn.layers.Aligned)]
    assert set(keys) - set(folded.state_dict()) == {k for k in keys if k.endswith("gain")}
    assert folded[-1] is folded[-2] and folded[2].weight is folded[3].weight is not folded[4].weight
    if not inplace:
        assert torch.equal(model(image), expected) and wa.gain_parameters(model)
        assert not {id(p) for p in model.parameters()} & {id(p) for p in folded.parameters()}
    modules = list(folded.modules())
    assert all(a is b for a, b in zip(modules, wa.fold(folded, inplace=True).modules(), strict=True))
    other = wa.fold(network())
    other.load_state_dict(folded.state_dict())


def small(cls=wa.WAConv2d, out_channels=4, gain=0.6, **options):
    layer = cls(4, out_channels, 3, **options)
    layer.gain = None if gain is None else nn.Parameter(torch.full((out_channels,), gain))
    return layer


DIFFERENT = {  # two layers each, which share weight and gain except what differs
    "eps": lambda: (small(eps=0.2), small(eps=2.0)),
    "scale": lambda: (small(scale=0.5), small(scale=1.7)),
    "weight": lambda: (small(), small()),
    "gain": lambda: (small(), small(gain=1.4)),
    "class": lambda: (small(), small(wa.WAConvTranspose2d)),
    "groups": lambda: [small(wa.WAConvTranspose2d, 4 * groups, None, groups=groups) for groups in (1, 2)],
}


@pytest.mark.parametrize("different", DIFFERENT)
def test_different_layers_are_not_shared(device, different):
    first, second = DIFFERENT[different]()
    for name in {"weight", "gain"} - {different}:
        setattr(second, name, getattr(first, name))
    layers = nn.ModuleList([first, second]).to(device)
    image = normal(2, 4, 6, 6, device=device)
    for layer, folded in zip(layers, wa.fold(layers), strict=True):
        torch.testing.assert_close(folded(image), layer(image), rtol=1e-5, atol=1e-5)


def test_attributes_are_kept(device):
    calls = []
    for cls in (wa.WAConv2d, wa.WAConvTranspose2d):
        # Stride = kernel size: where windows overlap, torch adds them in bfloat16, in an order of its own.
        layer = make(cls, {"groups": 2, "stride": 3}, device, BF16).to(memory_format=torch.channels_last).eval()
        layer.weight.requires_grad_(False)
        layer.register_forward_hook(lambda module, *args: calls.append(module))
        folded = wa.fold(layer)
        image = normal(2, 4, 6, 6, dtype=BF16, device=device)
        with torch.autocast(device, dtype=torch.float16):  # does not affect folding
            again = wa.fold(layer)
        assert torch.equal(again.weight, folded.weight)
        # For other strides, here of the filters, torch's convolution may sum in another order.
        torch.testing.assert_close(folded(image), layer(image), rtol=2**-6, atol=2**-6)
        assert (folded.weight.dtype, folded.weight.stride()) == (BF16, layer.weight.stride())
        assert (folded.weight.requires_grad, folded.bias.requires_grad, folded.training) == (False, True, False)
        assert calls[-2:] == [folded, layer]


def test_export_of_a_model_with_dynamic_sizes():
    model = wa.fold(nn.Sequential(*network()[:6], nn.AdaptiveAvgPool2d(2)))
    image = normal(2, 3, 9, 8)
    auto = torch.export.Dim.AUTO
    program = torch.export.export(model, (image,), dynamic_shapes=({0: auto, 2: auto, 3: auto},), strict=False)
    assert not [op for op in ops_of(program) if "weightalign" in op]
    for size in ((2, 3, 9, 8), (3, 3, 12, 15)):
        torch.testing.assert_close(program.module()(normal(*size)), model(normal(*size)))


class Tripled(wa.WAConv2d):
    def forward(self, input):
        return 3 * super().forward(input)


def test_errors():
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got list"):
        wa.fold([])
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got list"), wa.frozen([]):
        pass
    pruned, normed, compiled = (wa.WAConv2d(3, 4, 3) for _ in range(3))
    prune.l1_unstructured(pruned, "weight", 0.5)
    parametrizations.weight_norm(normed)
    compiled.compile()
    for layer, message in (
        (pruned, r"expected the weight of '0' to be a plain torch.nn.Parameter, got one that .*L1Unstructured"),
        (normed, "got a layer parametrized by torch.nn.utils.parametrize"),
        (compiled, "expected layers that are not compiled, got '0'"),
        (Tripled(3, 4, 3), "expected layers of this package, got Tripled at '0', which has its own forward"),
    ):
        with pytest.raises(ValueError, match=message):
            wa.fold(nn.Sequential(layer))


@pytest.fixture
def count(monkeypatch):
    """How often a layer has aligned its own weight."""
    calls, original = [], wa.nn.layers.Aligned.align_filters

    def counted(self):
        calls.append(self)
        return original(self)

    monkeypatch.setattr(wa.nn.layers.Aligned, "align_filters", counted)
    return calls


def test_frozen_aligns_once(device, count):
    model = network(device)
    image = normal(2, 3, 9, 8, device=device)
    expected = model(image)
    count.clear()
    with torch.no_grad(), wa.frozen(model) as same:
        assert same is model
        for _ in range(3):
            torch.testing.assert_close(model(image), expected)
        assert len(count) == 6 == len(set(count))
        copy.deepcopy(model)(image)  # a copy is not frozen
        assert len(count) > 6
    count.clear()
    assert torch.equal(model(image), expected) and count
    assert all(layer.aligned_by is None for layer in model.modules() if isinstance(layer, wa.nn.layers.Aligned))


def test_frozen_ends_after_an_error_and_can_be_nested(count):
    layer = wa.WALinear(3, 2).eval()
    with pytest.raises(KeyError), wa.frozen(layer):
        raise KeyError
    assert layer.aligned_by is None
    with wa.frozen(layer):
        layer(normal(1, 3))
        with wa.frozen(layer):
            layer(normal(1, 3))
        layer(normal(1, 3))
    assert len(count) == 2 and layer.aligned_by is None
    count.clear()
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None  # no optimizer hook keeps it alive


def alias(layer):
    """Another parameter on the same memory, with the same version."""
    other = nn.Parameter(layer.weight.data)
    while other._version < layer.weight._version:
        other.mul_(normal(6, 4, 3, 3, dtype=F64))
    assert other._version == layer.weight._version > 0
    layer.weight = other


CHANGES = {
    "in place": lambda layer: layer.weight.mul_(normal(6, 4, 3, 3, dtype=F64)),
    "gain": lambda layer: layer.gain.mul_(2),
    "load_state_dict": lambda layer: layer.load_state_dict(make(wa.WAConv2d, {}).state_dict()),
    "assigned": lambda layer: layer.load_state_dict(make(wa.WAConv2d, {}).state_dict(), assign=True),
    "to float32": lambda layer: layer.to(torch.float32),
    "to float16 and back": lambda layer: layer.half().double(),
    "new parameter of equal version": lambda layer: alias(layer),
    "new data": lambda layer: setattr(layer.weight, "data", normal(6, 4, 3, 3, seed=5, dtype=F64)),
    "new parameter": lambda layer: setattr(layer, "weight", nn.Parameter(normal(6, 4, 3, 3, dtype=F64))),
    "no gain": lambda layer: layer.register_parameter("gain", None),
    "scale": lambda layer: setattr(layer, "scale", 3.0),
    "eps": lambda layer: setattr(layer, "eps", 3.0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_frozen_notices_changes(change, activation):
    layer = make(wa.WAConv2d, {"activation": activation}).eval()
    image = normal(2, 4, 6, 6, dtype=F64)
    with torch.no_grad(), wa.frozen(layer):
        before = layer(image)
        change(layer)
        image = image.to(layer.weight.dtype)
        after = layer(image)
    assert torch.equal(after, layer(image)) and not torch.equal(after.double(), before)


def test_frozen_keeps_the_sources_of_its_filters():
    """Otherwise another tensor could get the id or address that identifies them. No longer than the filters."""
    layer, image = make(wa.WAConv2d, {}).eval(), normal(2, 4, 6, 6, dtype=F64)

    def are_alive():
        gc.collect()
        return {each() is not None for each in objects} | {not each.expired() for each in memory}

    with torch.no_grad(), wa.frozen(layer):
        layer(image)
        objects = [weakref.ref(p) for p in (layer.weight, layer.gain)]
        memory = [StorageWeakRef(p.untyped_storage()) for p in (layer.weight, layer.gain)]
        for name in ("weight", "gain"):
            values = getattr(layer, name).detach().clone()
            getattr(layer, name).data = values
            setattr(layer, name, nn.Parameter(2 * values))
        assert are_alive() == {True}
        layer(image)
        assert are_alive() == {False}


def test_frozen_under_autocast_and_inference_mode(device, count):
    model = network(device)
    image = normal(2, 3, 9, 8, device=device)
    with torch.autocast(device, dtype=BF16), torch.inference_mode():
        expected = model(image)
    count.clear()
    with wa.frozen(model):
        with torch.inference_mode():
            with torch.autocast(device, dtype=BF16):
                assert torch.equal(model(image), expected) and torch.equal(model(image), expected)
            full = model(image)
        assert len(count) == 12
        leaf = image.requires_grad_()
        output = model(leaf)  # on the weights that were aligned under inference_mode
        output.sum().backward()
        assert torch.equal(output, full) and leaf.grad.abs().max() > 0
    assert len(count) == 12


def test_frozen_and_gradients(device):
    """Gradients of inputs are correct in eval mode; training raises an error, unless weight and gain are frozen."""
    layer, image = make(wa.WAConv2d, {}, device).eval(), normal(2, 4, 6, 6, dtype=F64, device=device).requires_grad_()
    expected = torch.autograd.grad(layer(image).sin().sum(), image)
    with wa.frozen(layer):
        assert torch.equal(torch.autograd.grad(layer(image).sin().sum(), image)[0], expected[0])
        layer(image).sum().backward()
        assert layer.weight.grad is None and layer.gain.grad is None and layer.bias.grad is not None
        layer.train()
        for parameter in (layer.weight, layer.gain):
            message = "wa.frozen is for inference: gradients do not reach weight and gain"
            with pytest.raises(RuntimeError, match=message):
                layer(image).sum().backward()
            parameter.requires_grad_(False)
        layer(image).sum().backward()
    layer.weight.requires_grad_(True)
    layer(image).sum().backward()
    assert layer.weight.grad.abs().max() > 0


def test_frozen_and_compiled(device):
    """A graph cannot check versions, so it aligns at every call and is never stale."""
    layer = wa.WAConv2d(3, 4, 3).to(device).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    image = normal(2, 3, 6, 6, device=device)
    with torch.no_grad(), wa.frozen(layer):
        torch.testing.assert_close(compiled(image), layer(image))
        layer.weight.copy_(normal(4, 3, 3, 3))
        torch.testing.assert_close(compiled(image), layer(image))
    torch.testing.assert_close(compiled(image), layer(image))


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}], ids=str)
def test_frozen_notices_an_optimizer_step(options):
    """Fused optimizers do not bump versions."""
    layers, image = [wa.WAConv2d(3, 3, 3), wa.WAConv2d(3, 4, 3)], normal(1, 3, 5, 5)
    model = nn.Sequential(*layers)
    model(image).square().sum().backward()
    for layer in layers:
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, **options)
        with torch.no_grad(), wa.frozen(model):
            before = model(image)
            optimizer.step()
            after = model(image)
        assert torch.equal(after, model(image)) and not torch.equal(after, before)


def test_frozen_notices_other_strides():
    layer, image = wa.WAConv2d(3, 4, 3), normal(1, 3, 5, 5)
    with torch.no_grad(), wa.frozen(layer):
        layer(image)
        layer.weight.data = layer.weight.data.transpose(2, 3)
        assert torch.equal(layer(image), F.conv2d(image, wa.align(layer.weight, layer.gain), layer.bias))


def test_frozen_under_transforms():
    """vmap over images uses the kept weights; transformed parameters are aligned at each call."""
    layer, images = wa.WAConv2d(3, 4, 3).eval(), normal(2, 3, 5, 5)
    parameters = dict(layer.named_parameters())
    stacked = {name: torch.stack([p, p + 1]) for name, p in parameters.items()}
    with wa.frozen(layer):
        each = torch.func.vmap(layer)(images)
        grads = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (images,)).sum())(parameters)
        ensemble = torch.func.vmap(lambda p: torch.func.functional_call(layer, p, (images,)))(stacked)
    torch.testing.assert_close(each, layer(images))
    torch.testing.assert_close(ensemble[0], layer(images))
    assert grads["weight"].abs().max() > 0


def test_output_size_of_a_folded_layer():
    layer, image = wa.WAConvTranspose2d(3, 4, 3, stride=2, activation="relu"), normal(1, 3, 4, 4)
    assert torch.equal(wa.fold(layer)(image, output_size=[10, 10]), layer(image, output_size=[10, 10]))
