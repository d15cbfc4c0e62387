"""The benchmarks measure what they claim: layer lists, statistics, the correctness check, the fields of a record."""

import itertools
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import align, command, harness, layers, machine, providers, stats

SETTING = providers.Setting("cpu")
QUICK = harness.Limits(rounds=10, seconds=0.1)
FIELDS = {
    "suite", "case", "provider", "direction", "dtype", "out_dtype", "layout", "out_layout", "shape", "n_layers",
    "batch", "clock", "p20", "p50", "p80", "samples", "bytes_min", "GB/s", "fraction_of_flat", "fraction_of_copy",
    "launches", "speedups", "max_error",
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("quick")
MACHINE_FIELDS = {"gpu", "cpu", "driver", "cuda", "torch", "triton", "git", "time"}


def test_layers_match_the_model():
    for name in layers.NETWORKS:
        assert (layers.FOLDER / f"{name}.json").read_text() == layers.to_text(layers.from_model(name))


def test_resnet50_by_known_counts():
    network = layers.load("resnet50")
    assert len(network.layers) == 53
    assert len(network.shapes) == 20
    assert sum(network.shapes.values()) == 53
    assert (network.weights, network.filters) == (23_454_912, 26_560)
    assert network.layers[0] == ("conv1", (64, 3, 7, 7))


def test_quantiles():
    assert stats.quantiles([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == pytest.approx((2.0, 3.5, 5.0))
    assert stats.quantiles([7.0]) == (7.0, 7.0, 7.0)


def test_median_ratio_of_constant_samples_has_no_width():
    found = stats.median_ratio([6.0] * 30, [2.0] * 30)
    assert (found.ratio, found.low, found.high) == (3.0, 3.0, 3.0)


def test_ratio_without_interval(monkeypatch):
    assert stats.median_ratio([6.0], [2.0]) == stats.Ratio(3.0, None, None)
    monkeypatch.setattr(stats, "bootstrap", None)
    assert stats.median_ratio([6.0, 6.5, 7.0], [2.0, 2.0, 2.0]) == stats.Ratio(3.25, None, None)


def test_median_ratio_pairs_rounds():
    """Noise common to both sides of a round cancels: twice as slow in every round is exactly twice as slow."""
    noise = np.random.default_rng(1).uniform(1, 5, 31)
    found = stats.median_ratio(2 * noise, noise)
    assert (found.low, found.high) == pytest.approx((2.0, 2.0))


def test_median_ratio_interval_covers_the_truth():
    """A 95 % interval contains the true ratio of medians about 95 times in 100."""
    random = np.random.default_rng(2)
    held = 0
    for _ in range(200):
        found = stats.median_ratio(3 * random.lognormal(0, 0.3, 30), random.lognormal(0, 0.3, 30), resamples=400)
        held += found.low <= 3 <= found.high
    assert 180 <= held <= 200


@pytest.mark.parametrize(("above", "below"), [([1.0], [1.0, 2.0]), ([], [])])
def test_median_ratio_refuses_unpaired_samples(above, below):
    with pytest.raises(ValueError, match="equally long"):
        stats.median_ratio(above, below)


def test_interleave_takes_turns():
    order = []
    timers = {name: lambda name=name: order.append(name) or 1.0 for name in "AB"}
    samples = harness.interleave(timers, harness.Limits(rounds=30, seconds=10))
    rounds = ["".join(pair) for pair in zip(order[::2], order[1::2], strict=True)]
    assert len(rounds) == 30 and set(rounds) == {"AB", "BA"}
    assert samples == {"A": [1.0] * 30, "B": [1.0] * 30}


def test_interleave_keeps_ten_rounds_when_slow():
    samples = harness.interleave({"A": lambda: 1.0}, harness.Limits(rounds=30, seconds=0))
    assert len(samples["A"]) == harness.MIN_ROUNDS == 10


def test_wall_timer_rotates_and_fills_a_sample():
    used = []
    timer, count = harness.wall_timer([lambda i=i: used.append(i) for i in range(3)], cuda=False)
    assert 0 < timer() < 1e-4
    assert count * 3e-8 < 1e-2
    assert all((after - before) % 3 == 1 for before, after in itertools.pairwise(used))


@pytest.mark.parametrize("direction", providers.DIRECTIONS)
def test_every_provider_is_correct(direction):
    inputs = providers.make_inputs([(6, 3, 3, 3), (4, 8, 1, 1)], SETTING)
    for provider in providers.providers(SETTING, 2, with_compile=False):
        assert harness.largest_error(provider, direction, inputs) < 2e-5


@pytest.mark.parametrize("value", [1.001, math.nan])
@pytest.mark.parametrize("direction", providers.DIRECTIONS)
def test_wrong_provider_is_an_error(direction, value):
    right = providers.ours(SETTING)
    wrong = providers.Provider("wrong", lambda weights, gains: [value * y for y in right(weights, gains)])
    case = harness.Case("tiny", ((4, 2, 3, 3),))
    with pytest.raises(harness.WrongResultError, match=f"wrong, {direction}"):
        harness.measure("layer", case, SETTING, [wrong], QUICK, directions=[direction])


def test_bytes_of_resnet50():
    """141.0 and 235.0 MB: float32 weights to bfloat16, statistics and gains included."""
    case = harness.Case("resnet50", tuple(shape for _, shape in layers.load("resnet50").layers))
    setting = providers.Setting("cpu", torch.float32, torch.bfloat16)
    assert case.bytes_min("forward", setting) == pytest.approx(141.0e6, rel=1e-3)
    assert case.bytes_min("backward", setting) == pytest.approx(235.0e6, rel=1e-3)
    assert case.bytes_min("both", setting) == case.bytes_min("forward", setting) + case.bytes_min("backward", setting)


@pytest.mark.parametrize("shapes", [((4, 2, 3, 3),), ((4, 2, 3, 3), (6, 4, 1, 1))])
def test_records(shapes):
    entrants = providers.providers(SETTING, len(shapes), with_compile=False)
    records = harness.measure("layer", harness.Case("tiny", shapes), SETTING, entrants, QUICK, copy=1e10)
    assert len(records) == 3 * len(entrants)
    rivals = {"eager", "timm", "multiply", "cast", "flat"} | ({"ours per layer"} if len(shapes) > 1 else set())
    for record in map(json.loads, map(json.dumps, records)):
        assert record.keys() >= FIELDS
        assert 0 < record["p20"] <= record["p50"] <= record["p80"]
        assert record["samples"] == len(record["rounds"]) == 10
        assert record["GB/s"] == pytest.approx(record["bytes_min"] / record["p50"] / 1e9)
        assert record["max_error"] < 2e-5
        assert record["shape"] == (list(shapes[0]) if len(shapes) == 1 else None)
        if record["provider"] == "ours":
            assert record["speedups"].keys() == rivals
            assert all(r["low"] <= r["ratio"] <= r["high"] for r in record["speedups"].values())


def test_facts_of_the_machine():
    facts = machine.facts("cpu")
    assert facts.keys() >= MACHINE_FIELDS
    assert facts["torch"] == torch.__version__
    json.dumps(facts)


def test_main_writes_records_and_plot(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(align, "why_no_compile", lambda setting: "not tried in this test")
    monkeypatch.setattr(harness, "copy_rate", lambda device: 1e10)
    arguments = ["align", "--device", "cpu", "--only", "64x64x1x1", "--rounds", "10", "--seconds", "0.1"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--out", str(tmp_path)])
    align.main()
    printed = capsys.readouterr().out
    assert "64x64x1x1" in printed
    assert "left out: compile" in printed
    assert "align_foreach, 53 weights, forward without grad" in printed
    records = [json.loads(line) for line in (tmp_path / "align.jsonl").read_text().splitlines()]
    assert all(record.keys() >= MACHINE_FIELDS for record in records)
    assert {record["suite"] for record in records} == {"layer", "op", "host"}
    assert (tmp_path / "align-cpu-float32-float32.png").stat().st_size > 10_000


def test_unknown_only_lists_the_cases():
    with pytest.raises(SystemExit, match="64x64x1x1"):
        align.cases(layers.load("resnet50"), ["layer"], "no such case")


def test_a_case_that_fails_leaves_the_others(tmp_path, capsys):
    run = command.Run("cpu", tmp_path / "records.jsonl")
    with run.case("first"):
        raise harness.WrongResultError("0.1 off\nand more")
    with run.case("second"):
        run.add([{"case": "second"}])
        assert json.loads((tmp_path / "records.jsonl").read_text())["case"] == "second"
    with pytest.raises(SystemExit, match=r"failed: first: WrongResultError: 0\.1 off"):
        run.end()
    assert "failed: first" in capsys.readouterr().out


def test_simulated_device_is_said_once(tmp_path, monkeypatch, capsys):
    facts = {**machine.facts("cpu"), "device": "simulated"}
    monkeypatch.setattr(machine, "facts", lambda device: facts)
    run = command.Run("cpu", tmp_path / "records.jsonl")
    run.end()
    assert capsys.readouterr().out.count("its times mean nothing") == 1


WITHOUT_RICH = """
import sys
sys.modules |= dict.fromkeys(("rich", "rich.console", "scipy", "scipy.stats", "matplotlib"))
import runpy
sys.argv = ["align", "--only", "64x64x1x1", "--suites", "layer", "--no-compile", "--rounds", "10", "--seconds", "0.1"]
sys.argv += ["--device", "cpu", "--out", OUT]
runpy.run_module("benchmarks.align", run_name="__main__")
"""


def test_without_rich_scipy_and_matplotlib(tmp_path):
    code = WITHOUT_RICH.replace("OUT", repr(str(tmp_path)))
    done = subprocess.run([sys.executable, "-c", code], cwd=machine.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "[yellow]" not in done.stdout
    assert re.search(r"^64x64x1x1 +\d", done.stdout, re.MULTILINE)
    assert [path.name for path in tmp_path.iterdir()] == ["align.jsonl"]
    first = json.loads((tmp_path / "align.jsonl").read_text().splitlines()[0])
    assert first["speedups"]["eager"]["ratio"] > 0 and first["speedups"]["eager"]["low"] is None


def test_a_package_that_is_missing_is_named(tmp_path):
    (tmp_path / "rich.py").write_text("raise ModuleNotFoundError(\"No module named 'rich'\", name='rich')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "benchmarks.demo"]
    done = subprocess.run(command, cwd=machine.ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "rich is not installed, which this needs: pip install -e '.[bench]'\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to report on")
def test_gpu_report_without_a_gpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "gpu-report", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "") and not list(tmp_path.iterdir())
    assert done.stderr == f"the report is about a GPU, and torch {torch.__version__} sees no CUDA device\n"
