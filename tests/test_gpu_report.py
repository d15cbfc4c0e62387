"""benchmarks.gpu_report: goals from records, steps within their limits, what a cut leaves; without a GPU."""

import importlib
import json
import pathlib
import sys
import time

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import goals, machine, report, tables
from benchmarks.__main__ import COMMANDS
from benchmarks.gpu_report import page, profile, running, sections
from benchmarks.gpu_report.steps import Step, steps

FACTS = {**machine.facts("cpu"), "device": "cuda", "gpu": "A GPU"}
SIMULATED = {**FACTS, "device": "simulated", "gpu": "Simulated device 0"}


def record(suite, direction="both", clock="graph", p50=1e-3, share=None, facts=FACTS, **fields):
    speedups = {rival: {"ratio": r, "low": 0.9 * r, "high": 1.1 * r} for rival, r in fields.pop("speedups", {}).items()}
    common = {"case": "resnet50", "provider": "ours", "dtype": "float32", "out_dtype": "bfloat16", "shape": None}
    rates = {"fraction_of_copy": share, "fraction_of_flat": None, "launches": 1, "batch": None}
    fields = {"suite": suite, "direction": direction, "clock": clock, "p50": p50, **common, **rates, **fields}
    return {**fields, "speedups": speedups, **facts}


def write(folder, step, records):
    path = folder / step / "records.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def made(folder, facts=FACTS, share=0.85):
    """A report of a run that was cut: the whole model and a training step are there."""
    whole = [record("network", d, share=share, speedups={"eager": 30.0}, facts=facts) for d in ("forward", "backward")]
    write(folder, "model", [*whole, record("network", share=0.9, speedups={"eager": 40.0}, facts=facts)])
    step = {"provider": "ours foreach", "batch": 1, "facts": facts}
    write(folder, "step", [record("step", clock="wall", speedups={"plain": 1 / 1.01}, **step)])
    done = running.Outcome("done", "1 passed | all", 2.0)
    found = page.Report(folder, facts, {"model": done, "step": running.Outcome("cut", "at its limit of 100 s", 100.0)})
    found.write()
    return found


def cells_of(found, goal):
    return next(verdict.cells for verdict in found.verdicts if verdict.goal.name == goal)


def test_goals_met_and_missed(tmp_path):
    found = made(tmp_path)
    assert cells_of(found, "whole model, forward, of the copy rate")[1:] == [
        "85.0%", "✓ 78.0%", "88.0%: 3.0% missing", "93.0%: 8.0% missing",
    ]  # fmt: skip
    step = cells_of(found, "training step of batch 1, wall / plain")
    assert step[1:] == ["1.010 (0.918 to 1.122)", "✓ 1.020", "1.000: 0.010 missing", "0.970: 0.040 missing"]
    eager = cells_of(found, "whole model, forward + backward, graph, against eager")
    assert eager[1:4] == ["40.00x (36.00x to 44.00x)", "✓ 20.00x", "✓ 35.00x"]
    assert cells_of(found, "host's time of 53 weights, with grad")[1:3] == ["not measured", "130 us"]


def test_report_of_a_cut_run(tmp_path):
    text = (made(tmp_path).folder / "report.md").read_text()
    assert "**0 of 4 measured goals miss their must, 22 not measured; step cut.**" in text
    assert "| done | 2 | 1 passed \\| all |" in text
    assert "| cut | 100 | at its limit of 100 s |" in text
    assert "| not reached | 0 |" in text
    assert "| forward, graph | 1000.0 | 1 | 85% |  | 30.0x |" in text
    whole = json.loads((tmp_path / "report.json").read_text())
    assert whole["steps"]["step"]["state"] == "cut"
    assert [g["value"] for g in whole["goals"][:3]] == [0.85, 0.85, 40.0]
    assert page.Report.of(tmp_path, FACTS, is_new=False).outcomes["model"].seconds == 2.0
    assert not page.Report.of(tmp_path, FACTS, is_new=True).outcomes


def test_exit_code(tmp_path):
    assert made(tmp_path / "cut").is_bad
    for share, is_bad in ((0.85, False), (0.79, True)):
        found = made(tmp_path / str(share), share=share)
        found.outcomes["step"] = running.Outcome("done")
        assert found.is_bad == is_bad
    assert "1 of 4 measured goals miss their must" in found.summary


def test_record_that_was_cut_within_its_line(tmp_path):
    found = made(tmp_path)
    with (tmp_path / "model" / "records.jsonl").open("a") as file:
        file.write('{"suite": "netw')
    assert len(found.records("model")) == 3


def test_simulated_records_are_named_and_left_out(tmp_path):
    found = made(tmp_path, SIMULATED, share=0.1)
    text = (tmp_path / "report.md").read_text()
    assert "A simulated device: its times mean nothing" in text
    assert "1000.0" not in text
    assert all(verdict.value is None for verdict in found.verdicts)
    records = found.records("model")
    with pytest.raises(ValueError, match="simulated"):
        report.plot(records, tmp_path / "plot.png")
    assert report.plots([{**r, "suite": "layer"} for r in records], tmp_path) == []
    with pytest.raises(ValueError, match="simulated"):
        goals.judge(records)
    assert goals.lines(records) == []


def test_tables_refuse_simulated_records(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "align-x.jsonl").write_text(json.dumps(record("network", facts=SIMULATED)) + "\n")
    with pytest.raises(ValueError, match="simulated"):
        tables.read("align", "x.jsonl")


def test_facts_of_a_simulated_device(monkeypatch):
    monkeypatch.setattr(machine.torch.cuda, "get_device_name", lambda: "Simulated device of eight SMs")
    assert machine.facts("cuda")["device"] == "simulated"
    monkeypatch.setattr(machine.torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    assert machine.facts("cuda")["device"] == "cuda"


def python(code, **options):
    return Step("name", "about", options.pop("limit", 60), (sys.executable, "-c", code), **options)


def test_step_that_exceeds_its_limit(tmp_path, monkeypatch):
    """With the process that it has started, which would go on and write."""
    monkeypatch.setattr(running, "LEAST", 0)
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    code = (
        f"import subprocess, sys, time; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    )
    start = time.monotonic()
    outcome = running.run(python(code, limit=2), tmp_path / "step", left=60)
    assert outcome.state == "cut"
    assert (tmp_path / "step" / "log.txt").read_text() == "begun\n"
    time.sleep(max(0, start + 5 - time.monotonic()))
    assert not (tmp_path / "late").exists()


@pytest.mark.parametrize(
    ("step", "left", "state", "note"),
    [
        (python("print('one'); print('== 2 passed ==')"), 60, "done", "2 passed"),
        (python("raise SystemExit('why')"), 60, "failed", "why"),
        (
            python("", programs=("no-such-program",), modules=("no_such_module",)),
            60,
            "left out",
            "no-such-program, no_",
        ),
        (python(""), 3, "not run", "no time left"),
        (python("import os; print(os.environ['X'])", environment={"X": "given"}), 60, "done", "given"),
    ],
)
def test_outcomes(tmp_path, step, left, state, note):
    (tmp_path / "earlier").mkdir()
    outcome = running.run(step, tmp_path / "earlier", left)
    assert outcome.state == state
    assert note in outcome.note
    assert outcome.is_bad == (state in ("failed", "not run"))
    assert (tmp_path / "earlier").exists() == (state in ("done", "failed"))


@pytest.mark.parametrize(("minutes", "limit"), [(19, 90), (9.5, 45), (1, 45)])
def test_more_minutes_lengthen_each_step(tmp_path, monkeypatch, minutes, limit):
    program, given = importlib.import_module("benchmarks.gpu_report.__main__"), []
    monkeypatch.setattr(program.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(program.machine, "facts", lambda device: FACTS)
    monkeypatch.setattr(program, "steps", lambda: [python("", limit=45)])
    monkeypatch.setattr(
        program, "run", lambda step, _, left: given.append((step.limit, left)) or running.Outcome("done")
    )
    monkeypatch.setattr(sys, "argv", ["gpu_report", "--out", str(tmp_path), "--minutes", str(minutes)])
    with pytest.raises(SystemExit):
        program.main()
    assert given == [(limit, pytest.approx(60 * minutes, abs=30))]


def test_steps_are_commands_that_exist(monkeypatch, capsys):
    """Each benchmark knows the options that its step gives it."""
    benchmarks = [step for step in steps() if "benchmarks" in step.command]
    assert len(benchmarks) == 6
    for step in benchmarks:
        name, *options = step.command[step.command.index("benchmarks") + 1 :]
        monkeypatch.setattr(sys, "argv", [name, *options, "--rounds", "none"])
        with pytest.raises(SystemExit):
            importlib.import_module(f"benchmarks.{COMMANDS[name]}").main()
        assert "argument --rounds: invalid int value" in capsys.readouterr().err


def test_prediction_beside_measurement(tmp_path):
    predicted = {"forward_us": 50.0, "backward_us": 80.5, "forward_copy_fraction": 0.94, "backward_copy_fraction": 0.9}
    whole = {"static": [], "predicted": {"H200": dict.fromkeys(predicted, 0.5), "H100": predicted}}
    (tmp_path / "machine-code.json").write_text(json.dumps(whole))
    measured = [record("network", "forward", p50=60e-6, share=0.8)]
    lines = sections.predictions(tmp_path, measured, "NVIDIA H100 80GB HBM3")
    assert lines[2:] == ["| forward | 50.0 | 60.0 | 94% | 80% |", "| backward | 80.5 |  | 90% |  |"]
    assert sections.predictions(tmp_path, measured, "A GPU without a model") == []
    assert sections.predictions(tmp_path / "not run", [], "NVIDIA H100 80GB HBM3") == []


def test_metrics_of_ncu():
    stall = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
    names = ["ID", "Kernel Name", *profile.METRICS.values(), stall.format("barrier"), stall.format("long_scoreboard")]
    rows = [
        names,
        ["", "", "us", "%", "%", "register/thread", "inst", "inst"],
        ["0", "void align_forward_kernel<float>(AlignTable)", "50.1", "81.2", "95.0", "64", "1.5", "12.25"],
    ]
    text = "==PROF== Connected\n" + "\n".join(",".join(f'"{cell}"' for cell in row) for row in rows)
    (found,) = profile.kernels(text)
    assert found == {
        "kernel": "void align_forward_kernel", "time": "50.1 us", "DRAM %": "81.2", "occupancy %": "95.0",
        "registers": "64 register/thread", "stalls": {"long_scoreboard": 12.25, "barrier": 1.5},
    }  # fmt: skip
    assert profile.kernels("==ERROR== ERR_NVGPUCTRPERM") == []
