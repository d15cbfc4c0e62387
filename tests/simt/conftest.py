from pathlib import Path

import pytest
from emulator import Emulator, build, load


@pytest.fixture(scope="session")
def modules() -> Path:
    return build()


@pytest.fixture(scope="session")
def check(modules: Path) -> Emulator:
    """The build in which every memory access is checked."""
    module = load(modules, "simt_check")
    assert module.instrumented()
    return Emulator(module)
