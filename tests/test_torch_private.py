"""Private names of torch stand in one file, and are all in this torch."""

import ast
import inspect
import pathlib

import pytest
import torch

import weightalign_cuda as wa
from weightalign_cuda import torch_private

PACKAGE = pathlib.Path(wa.__file__).parent


def test_this_torch_has_them_all():
    assert torch_private.missing() == []


def private_names(source):
    """torch.a._b, and what is imported from torch under such a name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            chain = ast.unparse(node)
            if chain.startswith("torch."):
                yield chain
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            yield from (f"{node.module}.{name.name}" for name in node.names if "._" in f"{node.module}.{name.name}")


def test_no_other_file_has_one():
    found = {file.name: list(private_names(file.read_text())) for file in PACKAGE.rglob("*.py")}
    assert found.pop("torch_private.py")
    assert not any(found.values()), {name: names for name, names in found.items() if names}


def test_one_that_is_missing_is_named_where_it_is_needed(monkeypatch):
    monkeypatch.setattr(torch_private, "_missing", [])
    function = torch_private._find("torch._C._no_such_name")
    assert torch_private.missing() == ["torch._C._no_such_name"]
    with pytest.raises(RuntimeError, match=rf"needs torch._C._no_such_name, which torch {torch.__version__[:4]}"):
        function(1, key=2)


def test_a_class_without_what_is_used_of_it_is_named(monkeypatch):
    owner, (_, names) = next(iter(torch_private._ATTRIBUTES.items()))
    monkeypatch.setitem(torch_private._ATTRIBUTES, owner, (object(), names))
    assert torch_private.missing() == [f"{owner}.{name}" for name in names]


def test_each_stands_with_its_purpose():
    """A comment above each group of names."""
    lines = inspect.getsource(torch_private).splitlines()
    for i, line in enumerate(lines):
        if "_find(" in line and "def " not in line:
            above = next(lines[j] for j in range(i - 1, 0, -1) if "_find(" not in lines[j])
            assert above.startswith("#"), line
