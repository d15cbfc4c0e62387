"""The CUDA kernels on lists: weights of all kinds in one launch, and more weights than one launch takes."""

import itertools

import pytest
import torch
from emulator import Emulator
from problem import Layer, check_all, problem
from truth import BF16, F16, F32, F64, PAIRS, name

# Every size of team, layout and alignment side by side. 7 of them: with 5 dtypes of gain, 35 combinations.
KINDS = (
    Layer(67, 9),
    Layer(3, 576, columns=9),
    Layer(5, 64, misaligned=("weight", "grad")),
    Layer(4, 147, columns=49, misaligned=("out", "grad_weight")),
    Layer(2, 1152),
    Layer(6, 1),
    Layer(9, 27, columns=9),
)
LONG = (Layer(1, 11000), Layer(2, 4608, columns=9), Layer(1, 8196, misaligned=("weight",)), Layer(1, 4096))
both_directions = pytest.mark.parametrize("direction", ["forward", "backward"])


def mixed(count: int) -> list[Layer]:
    """Short filters and, if there are more than 10, some long ones among them."""
    layers = list(itertools.islice(itertools.cycle(KINDS), count))
    for i, layer in enumerate(LONG if count > 10 else ()):
        layers[(2 * i + 1) * count // 8] = layer
    return layers


@both_directions
@pytest.mark.parametrize("count", [1, 16, 17, 53])  # 16 fit in the small table
@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda dtypes: "-".join(map(name, dtypes)))
def test_mixed_lists(check: Emulator, direction: str, count: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    layers = [layer for layer in mixed(count) if F64 not in dtypes or not (layer.columns and layer.n > 4096)]
    check_all(check, problem(layers, *dtypes), direction)


@both_directions
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F16)], ids=lambda d: "-".join(map(name, d)))
def test_lists_of_several_launches(check: Emulator, direction: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    layers = [Layer(3 + i % 5, (9, 27, 64, 8)[i % 4], columns=9 * (i % 4 == 1)) for i in range(600)]
    layers[100], layers[500] = LONG[:2]
    check_all(check, problem(layers, *dtypes), direction)


@both_directions
def test_a_million_values_beside_short_filters(check: Emulator, direction: str) -> None:
    layers = [Layer(19, 147), Layer(1, 1_200_004), Layer(67, 9), Layer(2, 1152, columns=9), LONG[2]]
    check_all(check, problem(layers, F32, BF16), direction)


@both_directions
def test_long_filters_in_scalar_accesses(check: Emulator, direction: str) -> None:
    check_all(check, problem([Layer(1, 300_001), Layer(3, 7)], F16, F32), direction)
