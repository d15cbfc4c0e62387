"""python -m benchmarks NAME [ARGUMENT...]: every benchmark; NAME --help says more about each."""

import ast
import pathlib
import runpy
import sys

FOLDER = pathlib.Path(__file__).parent
COMMANDS = {
    "align": "align",
    "layers": "conv_layers",
    "step": "step",
    "demo": "demo",
    "numerics": "numerics",
    "instructions": "instructions",
    "launch-plan": "launch_plan",
    "machine-code": "machine_code",
    "scaling": "scaling",
    "compare": "compare",
    "accuracy": "accuracy",
    "goals": "goals",
    "gpu-report": "gpu_report",
    "tables": "tables",
    "layer-lists": "layers",
}


def about(module: str) -> str:
    """The first line of its documentation."""
    path = FOLDER / module
    path = path / "__init__.py" if path.is_dir() and (path / "__init__.py").exists() else path.with_suffix(".py")
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    return doc.partition("\n")[0].partition(": ")[2]


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        print(__doc__)
        print("\n".join(f"  {command:14}{about(module)}" for command, module in COMMANDS.items()))
        raise SystemExit(0 if name in ("-h", "--help") else 2)
    del sys.argv[1]
    runpy.run_module(f"benchmarks.{COMMANDS[name]}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
