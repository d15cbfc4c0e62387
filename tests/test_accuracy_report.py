"""RESULTS.md says what the records hold, and a repetition that disagrees with them fails."""

import json
import pathlib
import sys

import pytest
from scipy import stats

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks.accuracy import __main__ as command
from benchmarks.accuracy import claims, compare, experiments, logs, measured, report, running
from benchmarks.accuracy.config import Run

# Errors of the synthetic runs: by norm and alignment at batch 64, and how much they grow by batch 1.
ERRORS = {("bn", "none"): (0.40, 0.45), ("none", "wa"): (0.50, 0.05), ("gn", "none"): (0.44, 0.1)}


def tuned(run):
    return run.but(rate=0.1)


def record_of(run):
    error, growth = ERRORS.get((run.norm, run.align), (0.42, 0.1))
    error += growth if run.batch == 1 else 0
    epochs = [{"loss": 1.0, "error": round(error + 0.01 * run.seed, 4)}] * run.epochs
    record = {"run": run.to_json(), "data": "drawings", "epochs": epochs, "seconds": 36.0, "steps": 1}
    if run.shifts:
        record["shifts"] = {name: 0.8 for name in run.shifts}
    if run.pretrained:
        record["start_error"] = 0.7
    if run.variance:
        depth = 150 if "150" in run.network else 50
        factor = 0.5 if run.align == "wa" else 1.0
        record["start_variance"] = [factor**i for i in range(depth)]
        record |= {"variance": record["start_variance"]} if run.epochs else {}
    return record


@pytest.fixture
def folder(tmp_path):
    """The records of all experiments."""
    for experiment in experiments.EXPERIMENTS.values():
        for run in experiment(tuned):
            logs.add(tmp_path / "logs", record_of(run))
    for run in experiments.tuning():
        logs.add(tmp_path / "logs", record_of(run))
    return tmp_path / "logs"


def rows(text, title):
    """By their first cells, those of the tables under a heading."""
    section = text.split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_intervals_are_those_of_a_t_test():
    values = [1.0, 2.5, 3.0]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = measured.estimate(values)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert [measured.estimate(each).sign for each in ([1, 1.1, 0.9], [-1, -1.1, -0.9], [-1, 1, 0.5], [3])] == [
        1,
        -1,
        0,
        0,
    ]
    assert str(measured.estimate([2.0])) == "2.0" and str(measured.estimate([1.0, 3.0])) == "2.0 ± 12.7"


def test_differences_are_paired_by_seed():
    found = measured.paired({0: 10.0, 1: 20.0, 2: 30.0}, {1: 19.0, 0: 9.0, 5: 7.0})
    assert (found.mean, found.low, found.high, found.seeds) == (1.0, 1.0, 1.0, 2)
    assert measured.paired({0: 1.0}, {1: 1.0}) is None


def test_report_shows_the_records(folder):
    text = report.text(report.all_records(folder))
    interval = f"± {stats.t.ppf(0.975, 2) * 1 / 3**0.5:.1f}"
    assert rows(text, "Batch sizes")["BN"] == [f"41.0 {interval}"] * 4 + [f"86.0 {interval}"]
    assert rows(text, "Batch sizes")["VGG16, BN"] == ["28", "29", "33", "98"]
    assert rows(text, "Each norm, without and with alignment")["GN"] == [
        f"45.0 {interval}", f"43.0 {interval}", "25.46 → 23.64", "4.96 → 4.60"
    ]  # fmt: skip
    assert rows(text, "Halves and scales")["four times the scale"][-2:] == ["does not train", "does not train"]
    assert rows(text, "Other domains")["WA"][1:] == ["80.0 ± 0.0"] * (len(experiments.SHIFTS) + 1)
    assert rows(text, "Fine-tuning")['BN, gain="preserve"'] == ["70.0 ± 0.0", f"43.0 {interval}"]
    assert rows(text, "Variance of activations")["WA"] == [
        *(f"{0.5**depth:.2g} ({0.5**depth:.2g} to {0.5**depth:.2g})" for depth in (49, 149, 49, 49)), "x 0.500"
    ]  # fmt: skip
    assert "does not stay within 2x" in text and "drawings" in text


def test_verdicts(folder):
    found = {claim.text: claim for claim in claims.all_claims(report.all_records(folder))}
    growth = found["error(batch 1) - error(batch 64): larger for BN than for WA, by"]
    assert growth.difference.mean == pytest.approx(40) and growth.verdict == "holds"
    assert found["WA improves GN at batch 64, by"].verdict == "holds"
    assert found["WA improves BN at batch 64, by"].verdict == "contradicted"
    assert found["WA improves LN at batch 64, by"].verdict == "open"
    assert found["WA improves no norm at batch 64, by"].verdict == "contradicted"


def test_report_of_what_was_not_run(tmp_path):
    text = report.text(report.all_records(tmp_path))
    assert text.count("Not run yet.") == len(report.SECTIONS) and "holds" not in text


def test_plots(folder, tmp_path):
    written = report.write(folder, tmp_path)
    assert [path.name for path in written] == ["RESULTS.md", "batch.png", "epochs.png", "variance.png"]
    assert all(path.stat().st_size < 100_000 for path in written)


def batch_record(seed, error, batch=64):
    run = Run("batch", "resnet8", "bn", batch=batch, seed=seed, test_images=1000)
    return {"run": run.to_json(), "epochs": [{"loss": 1.0, "error": error}]}


def test_prediction_interval():
    """Of the mean and three values, at the level of 99 %: s = 1 point, t with 2 degrees of freedom."""
    committed = [batch_record(seed, error) for seed, error in enumerate((0.39, 0.40, 0.41))]
    (found,) = compare.comparisons([batch_record(0, 0.41)], committed)
    half = stats.t.ppf(0.995, 2) * (1 + 1 / 3) ** 0.5 + 0.1
    assert (found.low, found.high) == pytest.approx((40 - half, 40 + half))
    assert found.agrees and not compare.comparisons([batch_record(0, 0.6)], committed)[0].agrees
    assert compare.comparisons([batch_record(0, 0.4, batch=2)], committed) == []


def test_half_as_many_seeds_pool_the_deviation_of_all_settings():
    committed = [batch_record(seed, error) for seed, error in enumerate((0.39, 0.41))]
    other = [{**record, "run": {**record["run"], "norm": "gn"}} for record in committed]
    alone, pooled = (compare.comparisons([batch_record(0, 0.4)], each)[0] for each in (committed, committed + other))
    assert pooled.high - pooled.low < (alone.high - alone.low) / 3


@pytest.mark.parametrize(("change", "code"), [(0.0, 0), (0.3, 1)])
def test_repetition_exits_with_1_if_it_disagrees(folder, tmp_path, monkeypatch, capsys, change, code):
    def run_all(runs, place, own, label):
        for run in runs:
            record = record_of(run)
            record["epochs"] = [{**epoch, "error": epoch["error"] + change} for epoch in record["epochs"]]
            logs.add(own, record)

    monkeypatch.setattr(running, "run_all", run_all)
    monkeypatch.setattr(experiments, "tuned", lambda records: tuned)
    arguments = ["repeat", "--data", "unused", "--device", "cpu", "--out", str(tmp_path / "out"), "--logs", str(folder)]
    monkeypatch.setattr(sys, "argv", ["accuracy", *arguments])
    with pytest.raises(SystemExit) as exit:
        command.main()
    assert exit.value.code == code
    assert ("outside" in capsys.readouterr().out) == bool(code)


def test_nothing_to_compare(tmp_path):
    with pytest.raises(ValueError, match="several seeds"):
        compare.of_folders(tmp_path, tmp_path)


def test_finished_runs_are_skipped(tmp_path):
    runs = experiments.batch(tuned)[:3]
    logs.add(tmp_path, record_of(runs[1]))
    assert logs.pending(tmp_path, runs) == [runs[0], runs[2]]


def test_committed_results_match_the_committed_records():
    for path in logs.LOGS.glob("*.jsonl"):
        assert all(json.loads(line)["data"] == "CIFAR-10 (JPEG)" for line in path.read_text().splitlines())
    shown = (command.HERE / "RESULTS.md").read_text()
    assert shown == report.text(report.all_records(logs.LOGS))
