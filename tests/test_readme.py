"""What the README shows runs as it stands there."""

import pathlib
import re
import subprocess
import sys

import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
TRAINING = next(block for block in BLOCKS if block.startswith("# train.py"))


def run(*command, cwd):
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_examples(tmp_path):
    """One after another, as a reader would type them; the training script, too, by one process."""
    (tmp_path / "examples.py").write_text("".join(BLOCKS))
    assert_trained(1, run("examples.py", cwd=tmp_path))


@pytest.mark.slow
def test_training_script_by_two_processes(tmp_path):
    (tmp_path / "train.py").write_text(TRAINING)
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py"]
    assert_trained(2, run(*command, cwd=tmp_path))


def assert_trained(processes, printed):
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", printed)]
    assert len(losses) == processes and all(0 < loss < 10 for loss in losses)


def test_tables_are_those_of_the_records():
    pytest.importorskip("rich")
    from benchmarks import readme

    text = README.read_text()
    assert readme.with_tables(text) == text
