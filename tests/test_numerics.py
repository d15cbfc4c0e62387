"""The cases of benchmarks/numerics.py on every backend, and their committed table."""

import pathlib
import sys

import pytest

import weightalign_cuda as wa

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import numerics

by_name = pytest.mark.parametrize("case", numerics.CASES, ids=lambda case: case.name)
RIVALS = ["eager", "timm"]


@by_name
def test_rounding_explains_every_error(backend, case):
    case.check(numerics.ours(backend)(case))


def committed():
    """For each result's table: the columns, and a row of cells per case."""
    tables = {}
    for block in numerics.TABLE.read_text().split("\n\n"):
        if block.startswith("|"):
            head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
            tables[head[0]] = head[1:], {name: cells for name, *cells in rows}
    return tables


def test_table_has_these_cases_and_columns():
    tables = committed()
    assert list(tables) == list(numerics.RESULTS)
    for columns, rows in tables.values():
        assert list(rows) == [case.name for case in numerics.CASES]
        assert columns[-4:] == ["cpu", "reference", *RIVALS]
        assert columns[:-4] in (["cuda", "triton"], ["cuda (emulated)", "triton (interpreted)"])


def test_table_marks_where_ours_is_wrong():
    """Bold beyond float32's range and nowhere else, in agreement with test_rounding_explains_every_error."""
    for columns, rows in committed().values():
        for case in numerics.CASES:
            for column, cell in zip(columns, rows[case.name], strict=True):
                if column not in RIVALS:
                    assert cell.startswith("**") != case.in_range, (case.name, column)


@by_name
@pytest.mark.parametrize("column", [name for name in ("cpu", "reference") if wa.backends()[name] == "available"])
def test_table_has_current_errors(column, case):
    """Within a factor of 4: other processors and versions of torch sum in other orders."""
    for i, (columns, rows) in enumerate(committed().values()):
        then, now = rows[case.name][columns.index(column)], numerics.row(case, numerics.ours(column))[i]
        if then.strip("*") in ("nan", "0") or now.strip("*") in ("nan", "0"):
            assert then == now
        else:
            assert 0.25 <= float(then.strip("*")) / float(now.strip("*")) <= 4
