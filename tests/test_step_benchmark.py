"""benchmarks.step: losses are compared, memory is counted, records and report say what was measured."""

import json
import pathlib
import sys

import pytest
import torch
from torch import nn

import weightalign_cuda as wa

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import goals, harness, providers, step, step_models

QUICK = harness.Limits(rounds=10, seconds=0.1)
CPU = providers.Setting("cpu")
HALF = providers.Setting("cpu", torch.float32, torch.bfloat16, torch.channels_last)
FIELDS = {
    "suite", "case", "provider", "direction", "clock", "dtype", "out_dtype", "layout", "out_layout", "shape",
    "n_layers", "batch", "p20", "p50", "p80", "samples", "speedups", "overhead", "max_error",
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("quick")


def tiny_model():
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 10, 3), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten())


TINY = step_models.Network("tiny", "torch", tiny_model, "Conv2d")


def case(setting=CPU, timed=True):
    return step.Case(TINY, 2, 16, setting, timed)


@pytest.mark.parametrize("network", step_models.NETWORKS, ids=lambda network: network.name)
def test_networks_have_the_layers_that_convert_replaces(network):
    with torch.device("meta"):
        model = network.build()
        layers = network.layers(model)
        wa.convert(model)
    assert len(layers) == sum(isinstance(module, wa.nn.layers.Aligned) for module in model.modules()) > 30
    assert not network.layers(model)


def test_records_and_report(capsys):
    records = step.measure(case(), QUICK, with_compile=False)
    assert {r["suite"] for r in records} == {"step", "step memory"}
    for record in map(json.loads, map(json.dumps, records)):
        assert record.keys() >= FIELDS
        assert (record["batch"], record["shape"], record["n_layers"]) == (2, [2, 3, 16, 16], 2)
        assert 0 < record["p20"] <= record["p50"] <= record["p80"]
        assert record["samples"] == (10 if record["suite"] == "step" else 1)
        assert (record["max_error"] is None) == (record["provider"] == "plain")
        ours = record["provider"].startswith("ours")
        assert record["speedups"].keys() >= {"plain", "eager", "timm"} if ours else not record["speedups"]
    step.print_report(step.Console(), [{**r, "device": "cpu"} for r in records], ["a network: no package"])
    printed = capsys.readouterr().out
    assert "tiny, 2, per layer" in printed
    assert "left out: a network: no package" in printed


def test_untimed_case_measures_only_memory(monkeypatch):
    """In bfloat16, while losses are compared in float32."""
    check, checked = step.check, []
    monkeypatch.setattr(step, "check", lambda entrants: checked.extend(entrants.values()) or check(entrants))
    records = step.measure(case(HALF, timed=False), QUICK, with_compile=False)
    assert {(r["suite"], r["out_dtype"]) for r in records} == {("step memory", "bfloat16")}
    assert {each.setting.out_dtype for each in checked} == {torch.float32}


def test_providers_of_a_model_that_aligns_itself():
    network = step_models.timm_network("test_nfnet", "ScaledStdConv2d")
    entrants = step.trainings(step.Case(network, 1, 32, CPU), with_compile=False)
    assert step.check(entrants).keys() >= {"ours per layer", "plain", "timm"}
    parameters = {name: sum(p.numel() for p in each.model.parameters()) for name, each in entrants.items()}
    assert parameters["ours per layer"] == parameters["timm"] > parameters["plain"]


def test_weights_given_as_a_list_do_not_outlive_the_forward():
    seen = []

    def align(weights, gains):
        seen.extend(providers.formula(w, g) for w, g in zip(weights, gains, strict=True))
        return seen

    model = step_models._by_list(TINY, align, tiny_model())
    model(torch.randn(2, 3, 16, 16))
    assert len(seen) == 2
    assert all(not module.aligned.func.__self__ for module in model if hasattr(module, "aligned"))


@pytest.mark.parametrize("provider", ["ours per layer", "plain"])
def test_wrong_loss_is_an_error(provider):
    entrants = step.trainings(case(), with_compile=False)
    with torch.no_grad():
        entrants[provider].model[3].bias[0] += float("nan") if provider == "plain" else 0.1
    with pytest.raises(harness.WrongResultError, match=provider):
        step.check(entrants)


def test_wrong_gradient_is_an_error():
    entrants = step.trainings(case(), with_compile=False)
    for parameter in entrants["ours per layer"].model.parameters():
        parameter.register_hook(lambda grad: 1000 * grad)
    with pytest.raises(harness.WrongResultError, match="ours per layer"):
        step.check(entrants)


def test_peak_bytes_counts_live_tensors():
    def call():
        first = torch.ones(5000)
        del first
        second, third = torch.ones(4000), torch.ones(3000)
        return second, third

    assert harness.peak_bytes(call, cuda=False) == pytest.approx(4 * 7000, abs=256)


def test_goals_are_compared_with_measurements():
    ratio = {"ratio": 0.9, "low": 0.8, "high": 1.0}
    record = {"suite": "step", "case": "resnet50", "batch": 1, "clock": "wall", "device": "cpu"}
    (line,) = goals.lines([{**record, "provider": "ours foreach", "speedups": {"plain": ratio}}])
    assert line.endswith("1.111 (1.000 to 1.250); must 1.080: 0.031 missing, target 1.040: 0.071 missing")
    (line,) = goals.lines([{**record, "provider": "ours foreach", "speedups": {"plain": {**ratio, "ratio": 0.95}}}])
    assert line.endswith("must ✓ 1.080, target 1.040: 0.013 missing")


def test_networks_of_missing_packages_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step_models.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["step", "--device", "cpu", "--out", str(tmp_path)])
    step.main()
    assert "left out: resnetv2_50x1_bit: timm is not installed" in capsys.readouterr().out


def test_main_writes_records(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step, "cases", lambda device, size: [case()])
    arguments = ["--device", "cpu", "--rounds", "10", "--seconds", "0.1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["step", *arguments])
    step.main()
    assert "wrote" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "step.jsonl").read_text().splitlines()]
    assert all(r.keys() >= {"device", "torch", "git", "time"} for r in records)
