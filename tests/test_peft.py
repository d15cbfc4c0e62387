"""peft's adapters on aligned layers: adapters stay plain, and are merged into folded weights only."""

import copy
import io

import pytest
import torch
from peft import BOFTConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from torch import nn
from truth import F64, formula, normal

import weightalign_cuda as wa


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.cls_logits, self.out = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)  # prediction layers, by name and by position

    def forward(self, x):
        return self.out(self.cls_logits(self.second(self.first(x).relu())))


LAYERS = {"target_modules": ["second", "cls_logits", "out"]}
LORA = LoraConfig(**LAYERS, r=3, init_lora_weights=False)
ADDING = {
    "lora": LORA,
    "loha": LoHaConfig(**LAYERS, r=3, init_weights=False),
    "lokr": LoKrConfig(**LAYERS, r=3, init_weights=False),
    "ia3": IA3Config(**LAYERS, feedforward_modules=["second"], init_ia3_weights=False),
}


def adapted(config):
    torch.manual_seed(0)
    model = get_peft_model(Model(), config).to(F64)
    for name, parameter in model.named_parameters():
        if "ia3" in name:
            nn.init.uniform_(parameter, 0.5, 2)
    return model


@pytest.mark.filterwarnings("ignore:Unmerge result can be inaccurate")
@pytest.mark.parametrize("config", ADDING.values(), ids=ADDING)
def test_adapters_stay_plain(log, config):
    """The layers that an adapter adds to, or scales, are aligned; the adapter and prediction layers are not."""
    model, plain = wa.convert(adapted(config)), adapted(config)
    aligned = [name for name, module in model.named_modules() if isinstance(module, wa.nn.layers.Aligned)]
    assert aligned == ["base_model.model.first", "base_model.model.second.base_layer"]
    assert "base_model.model.cls_logits.base_layer, base_model.model.out.base_layer (predictions)" in log.text
    assert ("peft's adapters" in log.text) == (config is LORA)  # the others contain no layers
    for layer in (plain.base_model.model.first, plain.base_model.model.second.base_layer):
        layer.weight.data = formula(layer.weight.data)
    image = normal(2, 4, 6, 5, dtype=F64)
    output = model(image)
    torch.testing.assert_close(output, plain(image), rtol=1e-10, atol=1e-10)
    with pytest.raises(RuntimeError, match=r"merge: the base layer is yet to align its weight; wa.fold\(model\) first"):
        model.merge_adapter()
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for each in (model, copy.deepcopy(model), torch.load(saved, weights_only=False)):
        merged = wa.fold(each).merge_and_unload()
        torch.testing.assert_close(merged(image), output, rtol=1e-10, atol=1e-10)
    folded = wa.fold(model)
    folded.merge_adapter()
    folded.unmerge_adapter()
    torch.testing.assert_close(folded(image), output, rtol=1e-6, atol=1e-6)  # IA3 divides by its factor and 1e-8


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("config", [LoraConfig(**LAYERS, r=3, use_dora=True), BOFTConfig(**LAYERS, boft_block_size=2)])
def test_base_layers_whose_weight_is_read_are_skipped(log, config):
    model = wa.convert(get_peft_model(Model(), config), include="*")
    aligned = [name for name, module in model.named_modules() if isinstance(module, wa.nn.layers.Aligned)]
    assert aligned == ["base_model.model.first"]
    names = [f"base_model.model.{name}.base_layer" for name in LAYERS["target_modules"]]
    assert f"{', '.join(names)} (peft's adapter works on its weight)" in log.text
    model.merge_adapter()


def test_merged_before_convert(log):
    """Removing a merged adapter needs the original weight."""
    model = adapted(LORA)
    image = normal(2, 4, 6, 5, dtype=F64)
    model.merge_adapter()
    wa.convert(model)
    with (
        pytest.raises(RuntimeError, match="unmerge: the base layer is yet to align its weight"),
        model.disable_adapter(),
    ):
        model(image)
