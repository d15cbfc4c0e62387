"""The library uses only libtorch's stable ABI, as of torch 2.11, so that one file works with every later torch."""

import json
import pathlib
import subprocess
import sys

import weightalign_cuda as wa

LIBRARY = pathlib.Path(wa.__file__).with_name("_weightalign.so")


def test_stable_abi_of_torch_2_11():
    audit = [sys.executable, "-c", "from torch_abi_audit.cli import main; raise SystemExit(main())", "--check", "torch"]
    done = subprocess.run([*audit, "--json", str(LIBRARY)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (library,) = json.loads(done.stdout)["bundled_libs"]
    torch_abi = library["torch"]
    assert torch_abi["uses_torch"] and torch_abi["stable"] and library["error"] is None
    assert torch_abi["unstable_symbols"] == []
    assert torch_abi["unknown_shim_symbols"] == []
    assert tuple(map(int, torch_abi["min_torch_version"].split("."))) <= (2, 11, 0)
