"""benchmarks/machine_code: the library's sm_90 kernels, executed from their machine code, against float64; faults that
must not go unnoticed; the model of the chip where its result is known."""

import dataclasses
import functools
import itertools
import json
import pathlib
import re
import subprocess
import sys

import pytest

from weightalign_cuda.ops import library, native_library

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks.machine_code import chip, flat, input, predict, report, sass, semantics, static
from benchmarks.machine_code.problem import Image, Layer
from benchmarks.machine_code.step import UnknownInstruction

pytestmark = pytest.mark.skipif(
    predict.ARCHITECTURE not in library.architectures, reason="the library has no kernels for sm_90"
)
both_directions = pytest.mark.parametrize("direction", ["forward", "backward"])
# A few layers come in a small table, more than 16 in a large one; filters of 11000 values are read in parts.
FEW = [Layer(70, 64), Layer(40, 147), Layer(3, 4608), Layer(2, 11000)]
MANY = [Layer(9, 576), Layer(9, 1152, columns=9), *[Layer(3, 8)] * 16]
RESNET50 = 23_454_912  # values


@functools.cache
def built():
    return predict.Library(native_library.PATH)


@both_directions
@pytest.mark.parametrize("layers", [FEW, MANY], ids=["small table", "large table"])
def test_rounding_explains_every_error(direction, layers):
    (launch,) = built().execute(layers, direction)
    assert {kind.layer for kind in launch.kinds} == set(layers)
    for kind in launch.kinds:
        assert kind.values >= kind.layer.n
        assert kind.error <= 1, kind.layer


INPUTS = [
    Image(2, 72, 1, 196, to_channels_last=False),
    Image(2, 72, 1, 196),
    Image(2, 40, 9, 13, padding=1),
    Image(2, 24, 30, 20, padding=2, from_channels_last=True),
    Image(3, 3, 1, 1000),
    Image(2, 72, 12, 28, padding=3),
    Image(2, 72, 7, 7, padding=1),  # a run of whole channels
    Image(2, 40, 1, 196),
    Image(2, 40, 1, 49, to_channels_last=False),
]


@both_directions
@pytest.mark.parametrize("image", INPUTS, ids=str)
def test_tiles_of_an_input(direction, image):
    launch = input.execute(built(), image if direction == "forward" else image.turned, direction)
    assert len(launch.blocks) > 1
    for kind in launch.kinds:
        assert kind.values > 0
        assert kind.error <= 1


@pytest.mark.parametrize(
    ("direction", "opcode"),
    [*itertools.product(["forward", "backward"], ["FADD", "FFMA", "SHFL", "MUFU"]), ("forward", "F2FP")],
)
def test_wrong_arithmetic_is_noticed(direction, opcode, monkeypatch):
    """An exponent is off by one."""
    right = semantics.SEMANTICS[opcode]

    def wrong(step):
        right.run(step)
        result = 1 if opcode == "SHFL" else 0
        step.write(result, step.bits(result) ^ 0x00800000)

    monkeypatch.setitem(semantics.SEMANTICS, opcode, dataclasses.replace(right, run=wrong))
    (launch,) = built().execute([Layer(8, 1024)], direction)
    assert not launch.kinds[0].error <= 1


@both_directions
def test_second_read_is_counted(direction):
    """A filter that does not fit in a block is read twice: 10 instead of 6 bytes a value, 16 instead of 10."""
    once, twice = {"forward": (6, 10), "backward": (10, 16)}[direction]
    (launch,) = built().execute([Layer(1, 11000), Layer(1, 8192)], direction)
    for kind, per_value in zip(launch.kinds, (twice, once), strict=True):
        assert 0 < kind.trace.bytes_moved - per_value * kind.layer.n < 100, kind.layer  # the rest is of the filter


def test_unknown_instruction_is_named(monkeypatch):
    monkeypatch.delitem(semantics.SEMANTICS, "FFMA")
    with pytest.raises(UnknownInstruction, match=r"FFMA R\d+, .* at 0x"):
        built().execute([Layer(8, 1024)], "forward")


def test_library_of_other_sources_is_refused(monkeypatch):
    other = {name: dataclasses.replace(r, constant=r.constant + 8) for name, r in built().resources.items()}
    monkeypatch.setattr(built(), "resources", other)
    with pytest.raises(predict.LayoutError, match="bytes of parameters"):
        built().execute([Layer(8, 1024)], "forward")


def test_every_instruction_is_parsed():
    """Operands that are not understood are names; only these are."""
    known = {"SRZ", "PR", "SR_TID.X", "SR_CTAID.X", "SR_CgaCtaId", *(f"B{i}" for i in range(16))}
    for name, listing in built().listings.items():
        code = sass.instructions(listing)
        assert len(code) == listing.count("/* 0x") // 2, name
        names = {operand.text for i in code for operand in i.operands if isinstance(operand, sass.Name)}
        assert names <= known, name


def test_scheduling_is_decoded():
    listing = """
        /*0000*/  @P1 STG.E.128 desc[UR6][R8.64+-0x10], R16 ;  /* 0x0000001008001986 */
                                                              /* 0x0001e2000c101d06 */
        /*0010*/      FFMA R40, -R52.reuse, |R53|, 1 ;         /* 0x3f80000034287423 */
                                                              /* 0x004fc80000000135 */
    """
    store, multiply = sass.instructions(listing)
    assert (store.stall, store.sets_when_written, store.sets_when_read, store.waits_for) == (1, 7, 0, 0)
    assert (multiply.stall, multiply.sets_when_written, multiply.sets_when_read, multiply.waits_for) == (4, 7, 7, 0b100)
    assert store.guard == sass.Predicate("P", 1) and store.modifiers == ("E", "128")
    assert store.operands[0] == sass.Address(False, (sass.Term(sass.Register("R", 8), is_pair=True),), -16)
    assert multiply.operands[1:] == (
        sass.Register("R", 52, negated=True),
        sass.Register("R", 53, absolute=True),
        sass.Number(1.0),
    )


RECORD = pathlib.Path(__file__).parent.parent / "benchmarks/results/machine-code.json"


@pytest.mark.slow
def test_instructions_are_as_recorded():
    """A path that takes more of them does so on purpose: with `--out` as below its record is made anew."""
    recorded, now = json.loads(RECORD.read_text()), report.full_report(native_library.PATH)
    parts = [(r, r["channels_last"], *r["networks"].values()) for r in (recorded, now)]
    paths = [
        pair
        for both in zip(*parts, strict=True)
        for pair in zip(*(part["instructions_per_value"] for part in both), strict=True)
    ]
    for old, new in [*paths, *zip(recorded["inputs"], now["inputs"], strict=True)]:
        for name in (name for name in old if name.endswith(("forward", "backward", "instructions_per_value"))):
            assert new[name] <= 1.05 * old[name], f"{old}: {new}; python -m benchmarks.machine_code --out {RECORD}"


def test_no_spills():
    figures = static.of_architecture(native_library.PATH, predict.ARCHITECTURE)
    assert len(figures) == len(built().resources)
    for kernel in figures:
        assert kernel.stack == kernel.spill_loads == kernel.spill_stores == 0, kernel


@pytest.mark.skipif(not flat.has_compiler(), reason="needs nvcc")
@pytest.mark.parametrize("where", chip.CHIPS, ids=lambda where: where.name)
def test_flat_cast_runs_at_the_copy_rate(where):
    """But for the start and the end of the launch, 6 % of the time on a B200."""
    least = 0.89 if where.name == "B200" else 0.9
    assert least < flat.Flat("forward").copy_fraction(where, RESNET50) < 1


def test_tables_without_rich(tmp_path):
    path = tmp_path / "code.json"
    code = f"""
import sys
sys.modules |= dict.fromkeys(("rich", "rich.console"))
sys.argv += ["--static", "--out", {str(path)!r}]
from benchmarks.machine_code.__main__ import main
main()
"""
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^sm_90 align_forward<float, LargeTable>( +\d+){7}$", done.stdout, re.MULTILINE)
    assert done.stdout.endswith(f"wrote {path}\n")
    assert len(json.loads(path.read_text())["static"]) == 8 * len(library.architectures)
