"""benchmarks.compare: a loss is found behind the noise of a run, runs of different machines are refused."""

import json
import pathlib
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import compare, stats

FACTS = {
    "device": "cpu", "gpu": None, "cpu": "a processor", "cpu_kernels": "avx2", "threads": 2, "driver": None,
    "cuda": None, "torch": "2.15.0", "triton": None,
}  # fmt: skip


def run(seed, ours=1.0, load=1.0, **facts):
    """Records of one case: the rounds of all providers share a noise of 20 %, each has its own of 2 %."""
    random = np.random.default_rng(seed)
    shared = load * random.lognormal(0, 0.2, 30)
    times = {
        name: (factor * shared * random.lognormal(0, 0.02, 30)).tolist()
        for name, factor in (("ours", ours), ("eager", 4.0), ("timm", 2.0))
    }
    speedups = {name: stats.median_ratio(times[name], times["ours"]).to_json() for name in ("eager", "timm")}
    fields = {"suite": "layer", "case": "64x64x1x1", "direction": "both", "clock": "wall", "dtype": "float32", **FACTS}
    return [
        {**fields, **facts, "provider": name, **stats.spread(each), "speedups": speedups if name == "ours" else {}}
        for name, each in times.items()
    ]


def only_change(a, b):
    (found,), left_out = compare.changes(a, b)
    assert not left_out
    return found


@pytest.mark.parametrize("load", [1.0, 3.0])
@pytest.mark.parametrize(("factor", "verdict"), [(1.2, "loss"), (1 / 1.2, "gain"), (1.0, ""), (1.03, "")])
def test_known_change(factor, verdict, load):
    """Whatever else the machine does: a load makes all of B three times as slow."""
    found = only_change(run(1), run(2, ours=factor, load=load))
    assert found.verdict == verdict
    assert found.ratio.ratio == pytest.approx(factor, rel=0.02)
    assert found.ratio.low < found.ratio.ratio < found.ratio.high


def test_loss_within_its_interval_is_none():
    """Ours is 1.3 times as slow, and nobody knows: its own rounds differ by more."""
    noisy = run(2, ours=1.3)
    rounds = noisy[0]["rounds"]
    noisy[0]["rounds"] = [r * (0.5 if i % 2 else 1.5) for i, r in enumerate(rounds)]
    found = only_change(run(1), noisy)
    assert found.ratio.low < 1.05
    assert found.verdict == ""


@pytest.mark.parametrize(("after", "verdict"), [(104, ""), (106, "loss"), (94, "gain")])
def test_memory_has_no_interval(after, verdict):
    def memory(ours):
        fields = {"suite": "step memory", "case": "resnet50", "clock": "memory", "batch": 1, **FACTS}
        both = (("ours foreach", ours, {"plain": stats.Ratio(1.0).to_json()}), ("plain", 50.0, {}))
        return [{**fields, "provider": p, **stats.spread([value]), "speedups": s} for p, value, s in both]

    found = only_change(memory(100.0), memory(float(after)))
    assert (found.ratio.low, found.verdict) == (None, verdict)


@pytest.mark.parametrize("other", [{"cpu": "another"}, {"threads": 4}, {"cpu_kernels": "avx512"}, {"gpu": "H200"}])
def test_other_machines_are_refused(other):
    with pytest.raises(ValueError, match=f"different machines: {next(iter(other))}"):
        compare.check_same_machine(run(1), run(2, **other))


def test_other_versions_are_named():
    assert compare.check_same_machine(run(1), run(2)) == []
    assert compare.check_same_machine(run(1), run(2, torch="2.14.0")) == ["torch: 2.15.0 in A, 2.14.0 in B"]


def test_simulated_device_is_refused():
    with pytest.raises(ValueError, match="Simulated device 0: the times"):
        compare.check_same_machine(run(1), run(2, device="simulated", gpu="Simulated device 0"))


def test_what_cannot_be_paired_is_named():
    a, b = run(1), run(2)
    assert compare.changes(a, [{**r, "case": "other"} for r in b])[1] == [
        "layer, 64x64x1x1, ours, both, wall, float32: only in A",
        "layer, other, ours, both, wall, float32: only in B",
    ]
    assert "no rival in common" in compare.changes(a, [{**b[0], "speedups": {}}, *b[1:]])[1][0]
    assert "not recorded" in compare.changes(a, [{k: v for k, v in r.items() if k != "rounds"} for r in b])[1][0]
    with pytest.raises(ValueError, match="more than one run"):
        compare.changes(a, b + b)


@pytest.mark.parametrize(("after", "code"), [(run(2), 0), (run(2, ours=1.2), 1), (run(2, threads=8), 2)])
def test_exit_code(tmp_path, monkeypatch, capsys, after, code):
    for name, records in (("a", run(1)), ("b", after)):
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in records))
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    with pytest.raises(SystemExit) as end:
        compare.main()
    assert end.value.code == code
    printed = capsys.readouterr()
    assert ("1 slower, 0 faster" in printed.out) == (code == 1)
    assert ("threads is 2 in A, 8 in B" in printed.err) == (code == 2)
