"""README and documentation: code runs, tables match the records, links resolve."""

import pathlib
import re
import subprocess
import sys

import pytest

import weightalign_cuda as wa

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs/pages").glob("*.md"))]
LINKING = [*PAGES, ROOT / "CHANGELOG.md", ROOT / ".github/CONTRIBUTING.md", ROOT / "benchmarks/NOTES.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def code_of(page):
    """All code blocks of a page, on their own lines, for tracebacks."""
    lines = [""] * page.count("\n")
    for block in BLOCK.finditer(page):
        first = page.count("\n", 0, block.start(1))
        code = block[1].splitlines()
        lines[first : first + len(code)] = code
    return "\n".join(lines) + "\n"


def run(*command, cwd):
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


EACH = """
import pathlib, sys
for path in sys.argv[2:]:
    code = pathlib.Path(sys.argv[1], pathlib.Path(path).name).read_text()
    exec(compile(code, path, "exec"), {"__name__": "__main__"})
"""


def test_examples(tmp_path):
    """Each page's blocks in order, as a reader would run them; the training script as well, in one process."""
    for page in PAGES:
        (tmp_path / page.name).write_text(code_of(page.read_text()))
    assert_trained(1, run("-c", EACH, str(tmp_path), *map(str, PAGES), cwd=tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("option", [[], ["--fsdp"]], ids=["DDP", "FSDP2"])
def test_training_script_in_two_processes(tmp_path, option):
    page = (ROOT / "docs/pages/training.md").read_text()
    (tmp_path / "train.py").write_text(next(code for code in BLOCK.findall(page) if code.startswith("# train.py")))
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py", *option]
    assert_trained(2, run(*command, cwd=tmp_path))


def assert_trained(processes, printed):
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", printed)]
    assert len(losses) == processes and all(0 < loss < 10 for loss in losses)


def test_tables_match_the_records():
    pytest.importorskip("numpy")
    from benchmarks import tables

    shown = []
    for document in tables.DOCUMENTS:
        text = document.read_text()
        assert tables.with_tables(text) == text
        shown += tables.PLACE.findall(text)
    assert sorted(shown) == sorted(tables.TABLES)


def test_every_public_name_is_in_the_reference():
    page = (ROOT / "docs/pages/api.md").read_text()
    assert sorted(re.findall(r"^::: weightalign_cuda\.(?:\w+\.)*(\w+)$", page, re.MULTILINE)) == sorted(wa.__all__)


def anchors_of(page):
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    text = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.name)
def test_links_resolve(page):
    for target, anchor in re.findall(r"\]\((?![a-z]+:)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text()):
        path = page.parent / target if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors_of(path.read_text()), f"{target}#{anchor}"
