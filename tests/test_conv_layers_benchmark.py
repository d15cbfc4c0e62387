"""benchmarks.conv_layers: the layers are ResNet-50's, records say what was measured, a wrong result is an error."""

import json
import pathlib
import sys

import pytest

import weightalign_cuda as wa

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import conv_layers, harness, layers

QUICK = harness.Limits(rounds=10, seconds=0.1)
SAME = conv_layers.Layer("tiny", "same", (4, 2, 3, 3), (8, 6), 2, "same_tf", activation="silu", groups=2)
REFLECT = conv_layers.Layer("tiny", "reflect", (4, 2, 3, 3), (8, 6), 1, 1, "reflect")
PROVIDERS = ["prep ours", "prep eager", "conv ours", "conv eager", "conv plain"]
FIELDS = {
    "suite", "case", "provider", "direction", "clock", "dtype", "shape", "batch", "p20", "p50", "p80", "samples",
    "speedups", "overhead", "max_error",
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("quick")


def test_layers_of_resnet50():
    found = conv_layers.resnet50()
    assert len(found) == 23
    assert {layer.shape for layer in found} == set(layers.load("resnet50").shapes)
    assert set(conv_layers.SUBSET) < {layer.name for layer in found}
    strided = next(layer for layer in found if layer.name == "layer2.0.conv2")
    assert (strided.size, strided.stride, strided.implicit_padding) == ((56, 56), 2, [1, 1])


@pytest.mark.parametrize("layer", [SAME, REFLECT], ids=lambda layer: layer.name)
def test_records(layer):
    records = conv_layers.measure(layer, 2, "cpu", QUICK)
    assert [r["provider"] for r in records] == PROVIDERS
    for record in map(json.loads, map(json.dumps, records)):
        assert record.keys() >= FIELDS
        assert (record["suite"], record["direction"], record["batch"]) == ("conv", "both", 2)
        assert record["samples"] == 10
        assert 0 < record["p20"] <= record["p50"] <= record["p80"]
    speedups = {r["provider"]: set(r["speedups"]) for r in records}
    assert speedups["prep ours"] == {"prep eager"}
    assert speedups["conv ours"] == {"conv eager", "conv plain"}
    conv_layers.print_report(conv_layers.Console(), records)


@pytest.mark.parametrize("name", ["prepare", "conv2d"])
def test_wrong_result_is_an_error(name, monkeypatch):
    right = getattr(wa, name)

    def wrong(*args, **options):
        results = right(*args, **options)
        return 1.001 * results if name == "conv2d" else (results[0], 1.001 * results[1])

    monkeypatch.setattr(wa, name, wrong)
    with pytest.raises(harness.WrongResultError, match="ours, same"):
        conv_layers.measure(SAME, 1, "cpu", QUICK)
