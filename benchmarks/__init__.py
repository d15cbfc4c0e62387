"""Benchmarks: the speed of alignment against its rivals, and its effect on training."""

import sys
from types import TracebackType


def _say_what_is_missing(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, ModuleNotFoundError):
        print(f"{error.name} is not installed, which this needs: pip install -e '.[bench]'", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.argv[0] == "-m":  # python -m benchmarks...: this file is imported before the module that is asked for
    sys.excepthook = _say_what_is_missing
