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
    """All but the script, one after another, as a reader would type them."""
    (tmp_path / "examples.py").write_text("".join(block for block in BLOCKS if block != TRAINING))
    run("examples.py", cwd=tmp_path)


@pytest.mark.parametrize("processes", [1, 2])
def test_training_script(tmp_path, processes):
    (tmp_path / "train.py").write_text(TRAINING)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] if processes > 1 else []
    printed = run(*launcher, "train.py", cwd=tmp_path)
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", printed)]
    assert len(losses) == processes and all(0 < loss < 10 for loss in losses)
