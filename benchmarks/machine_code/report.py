"""All figures of a library, as they go into the JSON file: static ones, and those of networks' launches and of inputs,
by the machine code of sm_90."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import torch

from .. import harness, layers
from ..providers import Setting
from . import chip, flat, input, static
from .launches import Direction
from .predict import ExecutedLaunch, Library
from .problem import Image, Layer

DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
SETTING = Setting("cuda", torch.float32, torch.bfloat16)
NETWORK = layers.load("resnet50")
OTHER_NETWORKS = ("convnext_tiny", "eca_nfnet_l0")
OWN_CHIPS = tuple(where for where in chip.CHIPS if where.runs_sm_90)  # the others take as long, and are rougher guesses
INPUTS = {
    "64x64x56x56": Image(64, 64, 1, 56 * 56),
    "64x64x56x56, padded by 1": Image(64, 64, 56, 56, padding=1),
    "64x64x56x56, padded by 1, channels_last": Image(64, 64, 56, 56, padding=1, from_channels_last=True),
    "16x64x112x112, padded by 3": Image(16, 64, 112, 112, padding=3),
    "64x256x14x14": Image(64, 256, 1, 14 * 14),
    "64x512x7x7": Image(64, 512, 1, 7 * 7),
    "64x512x7x7, padded by 1": Image(64, 512, 7, 7, padding=1),
}

Report = dict[str, Any]


class WrongResultError(AssertionError):
    """A block has not computed what it must."""


def static_report(path: pathlib.Path) -> Report:
    return {"static": [dataclasses.asdict(f) for f in static.figures(path)]}


def full_report(path: pathlib.Path) -> Report:
    """Static figures; those of ResNet-50's launches with one layout on both sides; as `channels_last`, of the same
    launches from contiguous weights to filters in channels_last; of other networks; and of inputs."""
    with ProcessPoolExecutor() as pool:  # the interpreter is Python
        straight, transposed = (
            pool.submit(_of_launches, path, NETWORK, is_transposed) for is_transposed in (False, True)
        )
        networks = {name: pool.submit(_of_launches, path, layers.load(name), False) for name in OTHER_NETWORKS}
        inputs = [pool.submit(_of_input, path, name) for name in INPUTS]
        found = static_report(path) | straight.result() | {"channels_last": transposed.result()}
        found["networks"] = {name: each.result() for name, each in networks.items()}
        return found | {"inputs": [each.result() for each in inputs]}


_library = functools.cache(Library)  # read once in each process


def _of_launches(path: pathlib.Path, network: layers.Network, is_transposed: bool) -> Report:
    columns = (math.prod(shape[2:]) if is_transposed else 1 for _, shape in network.layers)
    filters = [
        Layer(shape[0], math.prod(shape[1:]), count if count > 1 else 0)
        for (_, shape), count in zip(network.layers, columns, strict=True)
    ]
    executed = {direction: _library(path).execute(filters, direction) for direction in DIRECTIONS}
    _check(executed)
    return {
        "instructions_per_value": _instructions_per_value(executed, network),
        "launches": {direction: len(launches) for direction, launches in executed.items()},
        **_predicted(executed, network, OWN_CHIPS if is_transposed else chip.CHIPS),
    }


def _of_input(path: pathlib.Path, name: str) -> Report:
    """Of a convolution's input alone, float32 and contiguous outside, bfloat16 and channels_last inside."""
    image = INPUTS[name]
    row: Report = {"input": name}
    for direction in DIRECTIONS:
        launch = input.execute(_library(path), image if direction == "forward" else image.turned, direction)
        _check({direction: [launch]})
        row[f"{direction}_instructions_per_value"] = 32 * launch.instructions / image.values
        for where in OWN_CHIPS:
            seconds = launch.on(where).microseconds / 1e6
            row[f"{direction}_copy_fraction_{where.name}"] = image.bytes_min / seconds / 1e9 / where.copy_rate
    return row


def flat_report() -> dict[str, dict[str, float]]:
    """The fractions of the copy rate that a flat cast and add reach, by chip."""
    kernels = {direction: flat.Flat(direction) for direction in DIRECTIONS}
    return {
        where.name: {
            f"{direction}_copy_fraction": kernel.copy_fraction(where, NETWORK.weights)
            for direction, kernel in kernels.items()
        }
        for where in chip.CHIPS
    }


def _check(executed: dict[Direction, list[ExecutedLaunch]]) -> None:
    for direction, launches in executed.items():
        for kind in (kind for launch in launches for kind in launch.kinds):
            if not kind.values or not kind.error <= 1:
                raise WrongResultError(f"{direction}, {kind.layer}: {kind.error:.3g} times what rounding explains")


def _instructions_per_value(
    executed: dict[Direction, list[ExecutedLaunch]], network: layers.Network
) -> list[dict[str, Any]]:
    """For each length of filter, and for the whole network (n is None)."""
    by_length: dict[int | None, dict[str, float]] = {}
    for direction, launches in executed.items():
        for kind in (kind for launch in launches for kind in launch.kinds):
            by_length.setdefault(kind.layer.n, {})[direction] = kind.instructions_per_value
        total = sum(launch.instructions for launch in launches)
        by_length.setdefault(None, {})[direction] = 32 * total / network.weights
    rows = sorted(by_length.items(), key=lambda row: row[0] or math.inf)
    return [{"n": n, **instructions} for n, instructions in rows]


def _predicted(
    executed: dict[Direction, list[ExecutedLaunch]], network: layers.Network, chips: Sequence[chip.Chip]
) -> Report:
    case = harness.Case(network.name, tuple(shape for _, shape in network.layers))
    jobs = [(where, direction) for where in chips for direction in DIRECTIONS]
    with ThreadPoolExecutor() as pool:  # of programs that run beside Python
        runs = pool.map(lambda job: [launch.on(job[0]) for launch in executed[job[1]]], jobs)
    predicted: dict[str, dict[str, float]] = {where.name: {} for where in chips}
    for (where, direction), launches in zip(jobs, runs, strict=True):
        floor = case.bytes_min(direction, SETTING)
        microseconds = sum(run.microseconds for run in launches)
        predicted[where.name][f"{direction}_us"] = microseconds
        predicted[where.name][f"{direction}_copy_fraction"] = floor / microseconds / 1e3 / where.copy_rate
        slots = sum(run.issue_slots_used * run.microseconds for run in launches) / microseconds
        predicted[where.name][f"{direction}_issue_slots_used"] = slots
    over_floor = {
        direction: sum(launch.bytes_moved for launch in launches) / case.bytes_min(direction, SETTING)
        for direction, launches in executed.items()
    }
    return {"predicted": predicted, "bytes_over_floor": over_floor}
