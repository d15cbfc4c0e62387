"""Imports within the package go one way: model -> nn -> functional -> ops. Public modules keep their names."""

import ast
import importlib
import pathlib
import pickle

import pytest
import torch

import weightalign_cuda as wa

PACKAGE = pathlib.Path(wa.__file__).parent
LAYERS = ("ops", "functional", "nn", "model")  # each may import from itself and those before it
MODULES = {
    file.relative_to(PACKAGE).with_suffix("").parts: file
    for folder in LAYERS
    for file in (PACKAGE / folder).rglob("*.py")
}


def imported(module):
    """The modules of this package that a module imports from, as paths from the package root."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = module[: len(module) - node.level]
            yield (*base, *(node.module or "").split("."))


@pytest.mark.parametrize("module", MODULES, ids="/".join)
def test_imports_go_one_way(module):
    allowed = LAYERS[: LAYERS.index(module[0]) + 1]
    assert {names[0] for names in imported(module)} <= {"torch_private", *allowed}


def test_only_the_triton_backend_imports_triton():
    importing = {
        module
        for module, file in MODULES.items()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Import) and any(name.name.split(".")[0] == "triton" for name in node.names)
    }
    assert importing and all(module[:2] == ("ops", "triton") for module in importing)


@pytest.mark.parametrize("name", ["functional", "folded", "layers", "ops"])
def test_public_module_names(name):
    assert importlib.import_module(f"weightalign_cuda.{name}") is getattr(wa, name)


@pytest.mark.parametrize("make", [lambda: wa.WAConv2d(3, 4, 3), lambda: wa.fold(wa.WALinear(3, 2, activation="relu"))])
def test_old_pickles_load(make):
    """They name the classes by weightalign_cuda.layers and weightalign_cuda.folded."""
    layer = make()
    stem = type(layer).__module__.rpartition(".")[2].encode()
    pickled = pickle.dumps(layer, protocol=2)  # stores names as text
    assert b"weightalign_cuda.nn." + stem in pickled
    loaded = pickle.loads(pickled.replace(b"weightalign_cuda.nn." + stem, b"weightalign_cuda." + stem))
    assert type(loaded) is type(layer) and torch.equal(loaded.weight, layer.weight)
