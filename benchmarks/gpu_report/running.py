"""Runs a step within its limit, and says in one line what became of it."""

import importlib.util
import os
import pathlib
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .. import machine
from .steps import Step

LEAST = 5  # seconds that a step needs at least


@dataclass(frozen=True)
class Outcome:
    """state: done, failed, cut (at its limit), left out (something is not installed), or not run (no time left)."""

    state: str
    note: str = ""
    seconds: float = 0.0

    @property
    def is_bad(self) -> bool:
        return self.state in ("failed", "cut", "not run")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def missing(step: Step) -> list[str]:
    """The programs and modules that the step needs and that are not here."""
    programs = [name for name in step.programs if shutil.which(name) is None]
    return programs + [name for name in step.modules if importlib.util.find_spec(name) is None]


def run(step: Step, folder: pathlib.Path, left: float) -> Outcome:
    """`folder` is the step's own, emptied first; `left`: seconds that the whole report may still take."""
    shutil.rmtree(folder, ignore_errors=True)
    if absent := missing(step):
        return Outcome("left out", f"not installed: {', '.join(absent)}")
    limit = min(step.limit, left)
    if limit < LEAST:
        return Outcome("not run", "no time left")
    folder.mkdir(parents=True)
    command = [part.replace("{out}", str(folder)) for part in step.command]
    return watch(command, folder / "log.txt", limit, step.environment)


def watch(command: list[str], log: pathlib.Path, limit: float, environment: Mapping[str, str]) -> Outcome:
    """At its limit the command ends with all processes that it has started."""
    start = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=machine.ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    took = round(time.monotonic() - start, 1)
    if code is None:
        return Outcome("cut", f"at its limit of {limit:.0f} s", took)
    return Outcome("failed" if code else "done", last_line(log), took)


def last_line(log: pathlib.Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip("= ") if lines else ""
