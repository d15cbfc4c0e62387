"""DTensors in several gloo processes: aligned, prepared and convolved where they lie; errors for what cannot be."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from count_ops import CountOps
from torch import nn
from truth import ACTIVATIONS, BF16, F64, formula, normal
from varied import numbers, vary

import weightalign_cuda as wa

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")


def align_sharded(rank):
    from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh, grid = DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [[0, 1]], mesh_dim_names=("a", "b"))
    cases = [  # uneven, empty on the second process, even; mixed meshes; channels_last
        ((5, 3, 3, 3), mesh, [Shard(0)]),
        ((1, 4), mesh, [Shard(0)]),
        ((4, 2, 3, 3), mesh, [Replicate()]),
        ((6, 7), grid, [Replicate(), Shard(0)]),
        ((4, 3, 2), grid, [Shard(0), Shard(0)]),
    ]
    plain, placed = [], []
    for i, (shape, where, placements) in enumerate(cases):
        weight, gain = normal(*shape, seed=i, dtype=F64), normal(shape[0], seed=50 + i, dtype=F64)
        weight = weight.contiguous(memory_format=torch.channels_last) if i == 2 else weight
        plain.append([t.clone().requires_grad_() for t in (weight, gain)])
        placed.append([distribute_tensor(t, where, placements).requires_grad_() for t in (weight, gain)])
    plain.append([normal(3, 4, dtype=F64).requires_grad_(), None])  # and one that is not a DTensor
    placed.append([plain[-1][0].detach().requires_grad_(), None])
    options = numbers(len(plain))
    each = list(zip(*options.values(), strict=True))
    expected = [formula(*pair, *own) for pair, own in zip(plain, each, strict=True)]
    with CommDebugMode() as communication, CountOps() as ops:
        together = wa.align_foreach(*zip(*placed, strict=True), **options)
        alone = [wa.align(*pair, eps=eps, scale=scale) for pair, (eps, scale) in zip(placed, each, strict=True)]
    assert ops.calls["align_forward"] == 1 + len(placed) and communication.get_total_counts() == 0
    for pair, one, other, truth in zip(placed, together, alone, expected, strict=True):
        outside = normal(*truth.shape, seed=9, dtype=F64)
        grads = []
        for result in (one, other):
            grad = outside
            if isinstance(pair[0], DTensor):
                assert (result.device_mesh, result.placements) == (pair[0].device_mesh, pair[0].placements)
                assert result.shape == pair[0].shape and result.stride() == pair[0].stride()
                grad = distribute_tensor(outside, result.device_mesh, result.placements)
            leaves = [t for t in pair if t is not None]
            with communication:
                grads.append(torch.autograd.grad(result, leaves, grad, retain_graph=True))
            assert communication.get_total_counts() == 0  # each `with` starts from 0
            assert all(
                getattr(g, "placements", 0) == getattr(t, "placements", 0)
                for g, t in zip(grads[-1], leaves, strict=True)
            )
            grads[-1] = [whole(t) for t in (result, *grads[-1])]
        index = [id(t) for t in expected].index(id(truth))
        leaves = [t for t in plain[index] if t is not None]
        true = [truth.detach(), *torch.autograd.grad(truth, leaves, outside, retain_graph=True)]
        for found in grads:
            for a, b in zip(found, true, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    weight, gain = placed[0]
    turned = DeviceMesh("cpu", [1, 0])
    for bad, message in (
        (Shard(1), r"weight: expected a DTensor placed by Shard\(0\).* got S(hard\(dim=)?\(?1"),
        (Partial(), r"weight: expected a DTensor placed by Shard\(0\).*got P"),
    ):
        with pytest.raises(ValueError, match=message):
            wa.align(DTensor.from_local(normal(4, 4), mesh, [bad]))
        with pytest.raises(ValueError, match=message.replace("weight", r"weights\[1\]")):
            wa.align_foreach([normal(4, 4), DTensor.from_local(normal(4, 4), mesh, [bad])])
    for pair in (
        (weight, plain[0][1]),
        (plain[0][0], gain),
        (weight, distribute_tensor(plain[0][1], mesh, [Replicate()])),
        (weight, distribute_tensor(plain[0][1], turned, [Shard(0)])),
    ):
        with pytest.raises(ValueError, match="gain: expected the weight's placement"):
            wa.align(*pair)
        with pytest.raises(ValueError, match=r"gains\[1\]: expected the weight's placement"):
            wa.align_foreach([weight, pair[0]], [gain, pair[1]])
    for last in (
        wa.align(weight.detach(), memory_format=torch.channels_last),
        *wa.align_foreach([weight.detach()], memory_format=torch.channels_last),
    ):
        assert last.stride() == (27, 1, 9, 3)
        assert last.to_local().is_contiguous(memory_format=torch.channels_last)
    pair = weight.detach().float(), gain.detach()
    for low in (wa.align(*pair, dtype=BF16), *wa.align_foreach(*zip(pair), dtype=BF16)):
        assert low.dtype == BF16 and low.placements == weight.placements


def whole(t):
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach()


def test_sharded_weights(in_two_processes):
    in_two_processes(align_sharded)


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(whole(one), whole(other), rtol=1e-11, atol=1e-12)


def padded(t, pairs, mode):
    """Padded along its last dimensions by (before, after) pairs."""
    flat = [n for pair in reversed(pairs) for n in pair]
    return F.pad(t[None], flat, "constant" if mode == "zeros" else mode)[0] if any(flat) else t


def prepare_sharded(rank):
    from torch.distributed.tensor import DeviceMesh, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh, grid = DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [[0], [1]], mesh_dim_names=("a", "b"))
    r, by, keep, last = Replicate(), Shard, torch.preserve_format, torch.channels_last
    # Batches and filters that do not divide; channels; unbatched; along a dimension that is not padded, or not here.
    cases = [
        (mesh, (5, 4, 6, 7), [by(0)], (5, 4, 3, 3), [by(0)], "relu", [(1, 2), (1, 1)], "zeros", keep),
        (mesh, (3, 6, 5, 4), [by(1)], (4, 6, 1, 2), [r], "silu", [(2, 0), (1, 2)], "zeros", last),
        (mesh, (4, 9, 8), [by(0)], (3, 2, 3, 3), [by(0)], "gelu", [(2, 1), (1, 1)], "circular", last),
        (mesh, (3, 9), [r], (1, 3, 5), [by(0)], "hardswish", [(0, 3)], "replicate", keep),
        (grid, (2, 2, 6, 4), [by(3), r], (4, 2, 3, 1), [by(0), r], "silu", [(1, 2), (0, 0)], "zeros", keep),
        (grid, (3, 2, 4, 5, 3), [by(0), r], (4, 2, 3, 3, 3), [r, by(0)], None, [(0, 0), (2, 2), (1, 0)], "zeros", keep),
        (mesh, (4, 3, 5, 5), [by(2)], (4, 3, 3, 3), [r], "gelu", [(1, 1), (1, 1)], "zeros", last),
    ]
    each = zip(cases, *numbers(len(cases)).values(), strict=True)
    for i, ((where, *both, activation, pairs, mode, memory_format), eps, scale) in enumerate(each):
        (shape, of_input, filters, of_weight), is_left = both, mode == "zeros" and all(a == b for a, b in pairs)
        plain = [normal(*size, seed=3 * i + j, dtype=F64) for j, size in enumerate((shape, filters, filters[:1]))]
        plain[0] = plain[0].contiguous(memory_format=last) if i == 0 else plain[0]
        places = of_input, of_weight, of_weight
        placed = [distribute_tensor(t, where, p).requires_grad_() for t, p in zip(plain, places, strict=True)]
        leaves = [t.requires_grad_() for t in plain]
        options = {"padding": pairs, "padding_mode": mode, "activation": activation, "eps": eps, "scale": scale}
        with CommDebugMode() as communication:
            found = wa.prepare(*placed, **options, memory_format=memory_format)
        assert communication.get_total_counts() == 0
        unsharded = wa.prepare(*plain, **options, memory_format=memory_format)
        for one, other, t in zip(found, unsharded, placed, strict=False):
            assert (one.device_mesh, one.placements) == (t.device_mesh, t.placements)
            assert (one.shape, one.stride()) == (other.shape, other.stride())
        active = ACTIVATIONS[activation](leaves[0])
        truth = active if is_left else padded(active, pairs, mode), formula(*leaves[1:], eps, scale)
        assert_close(found, truth)
        outside = [normal(*t.shape, seed=50 + j, dtype=F64) for j, t in enumerate(truth)]
        grads = [distribute_tensor(g, t.device_mesh, t.placements) for g, t in zip(outside, found, strict=True)]
        with communication:
            grads = torch.autograd.grad(found, placed, grads)
        assert communication.get_total_counts() == 0
        assert [g.placements for g in grads] == [t.placements for t in placed]
        assert_close(grads, torch.autograd.grad(truth, leaves, outside))
    assert wa.prepare(placed[0], placed[1], memory_format=torch.contiguous_format)[0] is placed[0]
    low = wa.prepare(*(t.detach().float() for t in placed), dtype=BF16, activation="silu")
    assert [t.dtype for t in low] == [BF16, BF16]


def test_prepare(in_two_processes):
    in_two_processes(prepare_sharded)


def convolve_sharded(rank):
    """Replicated layers, whose input is replicated or sharded by batch, and layers sharded by filters."""
    from torch.distributed.tensor import DeviceMesh, Replicate, Shard, distribute_module, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    torch.manual_seed(0)
    mesh = DeviceMesh("cpu", [0, 1])
    cases = [
        (wa.WAConv2d(3, 5, 3, padding=1, activation="silu"), (3, 3, 6, 5)),
        (wa.WAConv2d(4, 6, 3, stride=2, padding="same_tf", groups=2, activation="relu"), (3, 4, 8, 7)),
        (wa.WAConv2d(4, 5, 3, stride=2, padding=1, padding_mode="reflect", bias=False), (4, 4, 6, 5)),
        (wa.WAConv1d(4, 3, 4, padding="same", activation="gelu"), (3, 4, 9)),
        (wa.WAConv3d(2, 3, 2, dilation=2, activation="hardswish"), (2, 2, 4, 5, 3)),
        (wa.WAConv2d(3, 5, 3, activation="relu"), (3, 6, 5)),
        (wa.WAConvTranspose2d(4, 6, 3, stride=2, groups=2, activation="gelu"), (3, 4, 5, 6)),
        (wa.WAConvTranspose1d(4, 5, 3, output_padding=1, stride=2, activation="relu"), (3, 4, 5)),
    ]
    activations = [name for name in ACTIVATIONS if name != "hardswish"]  # torch has no backward of it for DTensors
    cases += [(wa.WALinear(6, 5, activation=name), (4, 6)) for name in activations]
    vary(nn.ModuleList([layer for layer, _ in cases]).double())
    for layer, shape in cases:
        is_linear, groups = isinstance(layer, wa.WALinear), getattr(layer, "groups", 1)
        is_batched = len(shape) == layer.weight.dim()
        for placement, by_filters in ((Replicate(), False), (Shard(0), False), (Replicate(), True)):
            if (placement.is_shard() and not is_batched) or (by_filters and groups > 1):
                continue
            sharded = distribute_module(copy.deepcopy(layer), mesh)
            for name, p in layer.named_parameters() if by_filters else ():
                by = Shard(1 if name == "weight" and "Transpose" in type(layer).__name__ else 0)
                setattr(sharded, name, nn.Parameter(distribute_tensor(p.detach(), mesh, [by])))
            image = normal(*shape, seed=1, dtype=F64).requires_grad_()
            placed = distribute_tensor(image.detach(), mesh, [placement]).requires_grad_()
            with CommDebugMode() as communication:  # which leaves hooks on the parameters
                copy.deepcopy(sharded)(placed.detach())
            expected, found = layer(image), sharded(placed)
            assert communication.get_total_counts() == 0
            assert is_linear or (found.shape, found.stride()) == (expected.shape, expected.stride())
            assert found.placements == ((Shard(1 if is_batched else 0),) if by_filters else (placement,))
            outside = normal(*expected.shape, seed=2, dtype=F64)
            true = torch.autograd.grad(expected, [image, *layer.parameters()], outside)
            grad = distribute_tensor(outside, mesh, found.placements)
            grads = torch.autograd.grad(found, [placed, *sharded.parameters()], grad)
            assert_close([found, *grads], [expected, *true])


def test_layers(in_two_processes):
    in_two_processes(convolve_sharded)


def refuse(rank):
    from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = DeviceMesh("cpu", [0, 1])
    image, weight, bias = normal(4, 4, 6, 6), normal(6, 4, 3, 3), normal(6)
    r, images = (
        [distribute_tensor(t, mesh, [Replicate()]) for t in (image, weight, bias, normal(4, 8, 6, 6))],
        [distribute_tensor(image, mesh, [Shard(d)]) for d in range(4)],
    )
    partial, filters = DTensor.from_local(image, mesh, [Partial()]), distribute_tensor(weight, mesh, [Shard(0)])
    layer = wa.WAConv2d(4, 6, 3, activation="relu")
    asymmetric = {"padding": [0, (1, 2)]}
    for function, arguments, options, message in (
        (wa.prepare, (image, r[1]), {}, r"input: .*weight, .*on ranks \[0, 1\]; got a tensor of this process"),
        (wa.prepare, (r[0], weight), {}, r"input: .*weight, a tensor of this process; got .*on ranks \[0, 1\]"),
        (wa.prepare, (partial, r[1]), {}, r"input: .*got P.*; redistribute"),
        (
            wa.prepare,
            (images[3], r[1]),
            asymmetric,
            r"input: .*not along a dimension that is padded.* got S.*3.*; redistribute",
        ),
        (wa.prepare, (r[0], r[1], bias), {}, r"gain: expected the weight's placement.*; got a tensor of this process"),
        (
            wa.prepare,
            (image, weight, r[2]),
            {},
            r"gain: expected the weight's placement, a tensor of this process; got",
        ),
        (wa.prepare, (r[0], distribute_tensor(weight, mesh, [Shard(1)])), {}, r"weight: .* got S.*1"),
        (wa.conv2d, (image, r[1], r[2]), {}, r"input: .*got a tensor of this process"),
        (wa.conv2d, (r[0], r[1], bias), {}, r"bias: expected a DTensor placed by .*R.*got a tensor of this process"),
        (
            wa.conv2d,
            (r[0], filters, r[2]),
            {},
            r"bias: expected a DTensor placed by .*S.*on ranks \[0, 1\]; got .*R",
        ),
        (wa.conv2d, (r[0], weight), {}, r"input: .*weight, a tensor of this process"),
        (wa.conv2d, (images[0], filters), {}, r"input: expected .* or .*; got S.*0.* with S.*0.*; redistribute"),
        (wa.conv2d, (images[1], r[1]), {}, r"input: .*; got S.*1.* with R"),
        (wa.conv2d, (images[2], r[1]), {}, r"input: .*; got S.*2.* with R"),
        (wa.conv2d, (r[3], filters), {"groups": 2}, r"input: .*; got R.* with S"),
        (wa.conv2d, (distribute_tensor(image[0], mesh, [Shard(0)]), r[1]), {}, r"input: .*; got S.*0.* with R"),
        (layer, (r[0],), {}, r"input: .*weight, a tensor of this process"),
    ):
        with pytest.raises(ValueError, match=message):
            function(*arguments, **options)


def test_what_cannot_be_convolved(in_two_processes):
    in_two_processes(refuse)


def compare_meshes(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DeviceMesh, DTensor, Shard

    first, second = DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [0, 2])
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("row", "column"))
    if rank:
        return
    pairs = [(first, second), (grid["row"], grid["column"]), (first, grid["row"]), (grid["column"], second)]
    for of_weight, of_gain in pairs:
        weight, gain = (
            DTensor.from_local(normal(*shape, dtype=F64), where, [Shard(0)], run_check=False)
            for shape, where in (((2, 3, 3), of_weight), ((2,), of_gain))
        )
        ranks = [rf"on ranks \[0, {int(where.mesh[1])}\]" for where in (of_weight, of_gain)]
        with pytest.raises(ValueError, match=rf"gain: expected the weight's placement, .*{ranks[0]}; got .*{ranks[1]}"):
            wa.align(weight, gain)
        image = DTensor.from_local(normal(4, 3, 9, dtype=F64), of_gain, [Shard(0)], run_check=False)
        with pytest.raises(ValueError, match=rf"input: .*{ranks[0]}; got .*{ranks[1]}"):
            wa.prepare(image, weight)
    weight = DTensor.from_local(normal(2, 3, 3, dtype=F64), grid["row"], [Shard(0)], run_check=False)
    gain = DTensor.from_local(normal(2, dtype=F64), second, [Shard(0)], run_check=False)
    torch.testing.assert_close(wa.align(weight, gain).to_local(), formula(weight.to_local(), gain.to_local()))


def test_meshes_are_compared_by_their_ranks(in_four_processes):
    in_four_processes(compare_meshes)


def align_shards_of_shards(rank):
    """FSDP2 over tensor parallelism, which has a placement of its own: the weights as they are, and in a step."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(2)
    plain = vary(wa.WALinear(6, 8, activation="relu").double())
    layer = parallelize_module(copy.deepcopy(plain), mesh["tensor"], ColwiseParallel(output_layouts=Replicate()))
    fully_shard(layer, mesh=mesh["data"])
    placed, leaves = [layer.weight, layer.gain], [plain.weight, plain.gain]
    assert "Strided" in type(layer.weight.placements[0]).__name__
    truth, outside = formula(*leaves, 0.3, 0.7), normal(8, 6, seed=5, dtype=F64)
    grad = distribute_tensor(outside, mesh, layer.weight.placements)
    true = torch.autograd.grad(truth, leaves, outside)
    for function, arguments, options in (
        (wa.align, placed, {"eps": 0.3, "scale": 0.7}),
        (wa.align_foreach, [[t] for t in placed], {"eps": [0.3], "scale": [0.7]}),
    ):
        with CommDebugMode() as communication:
            result = function(*arguments, **options)
            result = result[0] if isinstance(result, list) else result
            grads = torch.autograd.grad(result, placed, grad)
        assert communication.get_total_counts() == 0
        assert [t.placements for t in (result, *grads)] == [layer.weight.placements] * 3
        assert_close([result, *grads], [truth, *true])
    images = normal(4, 6, seed=6, dtype=F64)
    expected, found = plain(images), layer(images.chunk(2)[rank // 2])
    assert_close([found], [expected.chunk(2)[rank // 2]])
    expected.square().mean().backward()
    found.square().mean().backward()
    assert_close([p.grad for p in layer.parameters()], [p.grad for p in plain.parameters()])


def test_shards_of_shards(in_four_processes):
    in_four_processes(align_shards_of_shards)
