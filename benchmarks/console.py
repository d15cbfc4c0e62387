"""What the benchmarks print: rich's console, table and progress bar, or plain text where rich is not installed."""

import re
from collections.abc import Sequence
from typing import Any

MARKUP = re.compile(r"\[/?(?:red|yellow)\]")

try:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table

    def progress(console: Console) -> Progress:
        """Drawn once a second, because drawing takes time from the measurements."""
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        return Progress(*columns, TimeRemainingColumn(), console=console, refresh_per_second=1)

    Printed = Table | str

    def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Printed:
        """The first column to the left, the others to the right."""
        result = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
        for i, name in enumerate(head):
            result.add_column(name, justify="right" if i else "left", no_wrap=True)
        for cells in rows:
            result.add_row(*cells)
        return result

except ImportError:

    class Console:  # type: ignore[no-redef]
        def __init__(self, width: int | None = None) -> None:
            """Lines are as long as they are."""

        def print(self, text: str, **_: Any) -> None:
            """Without rich's markup."""
            print(MARKUP.sub("", text), flush=True)

    class Progress:  # type: ignore[no-redef]
        """A line for each task that begins."""

        def __enter__(self) -> "Progress":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def add_task(self, description: str, total: int) -> int:
            return 0

        def update(self, task: int, description: str) -> None:
            print(description, flush=True)

        def advance(self, task: int, cost: int = 1) -> None:
            pass

    def progress(console: Console) -> Progress:
        return Progress()

    Printed = str  # type: ignore[misc]

    def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Printed:  # type: ignore[misc]
        lines = [[MARKUP.sub("", cell).replace("\n", " ") for cell in cells] for cells in (head, *rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = ([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])] for cells in lines)
        return "\n".join([title, *("  ".join(cells) for cells in padded)])


def one_line(failure: Exception) -> str:
    """An exception in one line."""
    lines = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {lines[0] if lines else ''}"
