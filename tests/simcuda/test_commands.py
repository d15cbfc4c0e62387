"""The project's commands with --device cuda, to their end, on small cases."""

import json
import subprocess
import sys

import pytest
import test_conv_layers_benchmark as conv_layers_tests
import test_readme
import test_step_benchmark as step_tests
import torch

from benchmarks import align, conv_layers, demo, step


@pytest.fixture
def run(monkeypatch, tmp_path, quick):
    """Runs a command in this process; returns its records."""

    def command(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, "--device", "cuda", "--out", str(tmp_path), *arguments])
        module.main()
        (records,) = tmp_path.glob("*.jsonl")
        return [json.loads(line) for line in records.read_text().splitlines()]

    return command


def check(records, suites, capsys):
    assert {r["suite"] for r in records} == suites
    assert {r["device"] for r in records} == {"simulated"}
    assert "wall" in {r["clock"] for r in records}
    assert "its times mean nothing" in " ".join(capsys.readouterr().out.split())


def test_align(run, capsys, tmp_path):
    arguments = "--only", "64x64x1x1", "--suites", "layer", "--no-compile"
    check(records := run(align, *arguments), {"layer"}, capsys)
    assert {r["clock"] for r in records} == {"graph", "wall"}
    assert not list(tmp_path.glob("*.png"))  # no plot of meaningless times


def test_layers(run, capsys, monkeypatch):
    monkeypatch.setattr(conv_layers, "resnet50", list)
    monkeypatch.setattr(conv_layers, "EXPLICIT", [conv_layers_tests.SAME, conv_layers_tests.REFLECT])
    monkeypatch.setattr(conv_layers, "BATCHES", (2,))
    check(run(conv_layers), {"conv"}, capsys)


def test_step(run, capsys, monkeypatch):
    setting = step.Setting("cuda", torch.float32, torch.bfloat16, torch.channels_last)
    monkeypatch.setattr(step, "cases", lambda device, size: [step_tests.case(setting)])
    check(run(step, "--no-compile"), {"step", "step memory"}, capsys)


def test_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "RATES", (0.03,))
    monkeypatch.setattr(sys, "argv", ["demo", "--device", "cuda", "--steps", "3", "--out", str(tmp_path)])
    demo.main()
    assert (tmp_path / "demo.png").exists()


def test_training_script_in_two_processes(tmp_path):
    """By gloo, as NCCL needs a driver; on a quarter of the images."""
    page = (test_readme.ROOT / "docs/pages/training.md").read_text()
    script = next(code for code in test_readme.BLOCK.findall(page) if code.startswith("# train.py"))
    for theirs, ours in ('"nccl"', '"gloo"'), ("FakeData(16,", "FakeData(4,"):
        assert theirs in script
        script = script.replace(theirs, ours)
    (tmp_path / "train.py").write_text(script)
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py"]
    test_readme.assert_trained(2, test_readme.run(*command, cwd=tmp_path))


def test_gpu_report(tmp_path):
    """A step that is quick here, and one whose tool is missing."""
    options = ["--out", str(tmp_path), "--steps", "static", "profile"]
    command = [sys.executable, "-m", "benchmarks.gpu_report", *options]
    done = subprocess.run(command, cwd=test_readme.ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode in (0, 1), done.stderr
    (report,) = tmp_path.glob("*/report.md")
    assert "its times mean nothing" in report.read_text()
