"""transformers' BiT, whose convolutions standardise their weights, becomes an exact equivalent."""

import copy

import pytest
import torch
from transformers import BitConfig, BitForImageClassification
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d
from truth import F64, normal

import weightalign_cuda as wa

SMALL = {"embedding_size": 8, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 2, 1, 1], "num_groups": 4}
PADDINGS = {
    "symmetric": {"layer_type": "preactivation"},
    "TensorFlow's": {"layer_type": "bottleneck", "global_padding": "SAME", "embedding_dynamic_padding": True},
}


@pytest.mark.parametrize("options", PADDINGS.values(), ids=PADDINGS)
def test_bit(native, device, options):
    torch.manual_seed(0)
    theirs = BitForImageClassification(BitConfig(**SMALL, **options, num_labels=7)).to(device, F64).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():  # variances comparable to eps, and means that matter
            parameter.copy_(normal(*parameter.shape, seed=len(name), std=1e-3, dtype=F64) + 2e-3)
    ours = wa.convert(copy.deepcopy(theirs))
    image = normal(2, 3, 65, 54, dtype=F64, device=device)
    results = []
    for model in (theirs, ours):
        output = model(image).logits
        output.sin().sum().backward()
        results.append((output, {name: p.grad for name, p in model.named_parameters()}))
    (true_output, true_gradients), (output, gradients) = results
    assert output.std() > 1e-6 and (output - true_output).abs().max() <= 1e-9 * true_output.abs().max()
    assert gradients.keys() == true_gradients.keys()
    for name, true in true_gradients.items():
        assert (gradients[name] - true).abs().max() <= 1e-9 * true.abs().max(), name
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    kinds = {name: type(module) for name, module in theirs.named_modules()}
    assert sum(kind is WeightStandardizedConv2d for kind in kinds.values()) == 20
    for name, layer in ours.named_modules():
        assert isinstance(layer, wa.WAConv2d) == (kinds[name] is WeightStandardizedConv2d)
        assert not (isinstance(layer, wa.WAConv2d) and hasattr(layer, "pad"))
    folded = wa.fold(ours)(image).logits
    assert (folded - true_output).abs().max() <= 1e-9 * true_output.abs().max()
