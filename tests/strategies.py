"""Hypothesis strategies: valid arguments of any function, as plain values. A failing example prints as the code that
makes it, to be pasted into `@example`, and stays a regression test whatever becomes of the strategies."""

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from truth import ACTIVATIONS, DTYPES, F32, F64, dense, normal

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Strided:
    """Random numbers in any order of dimensions, perhaps with gaps, an offset, an expanded dimension."""

    shape: tuple[int, ...]
    dtype: torch.dtype = F32
    order: tuple[int, ...] | None = None  # of the dimensions in memory, outermost first
    steps: tuple[int, ...] | None = None
    starts: tuple[int, ...] | None = None
    expanded: int | None = None
    seed: int = 0
    mean: float = 0.0
    std: float = 1.0

    def tensor(self, device):
        ones = (1,) * len(self.shape)
        each = zip(self.shape, self.steps or ones, self.starts or (0,) * len(ones), strict=True)
        cut = [slice(start, start + step * n, step) for n, step, start in each]
        if self.expanded is not None:
            cut[self.expanded] = slice(0, 1)
        numbers = {"seed": self.seed, "mean": self.mean, "std": self.std, "dtype": self.dtype}
        whole = normal(*(c.stop for c in cut), **numbers)
        return dense(whole, self.order or range(len(ones))).to(device)[tuple(cut)].expand(self.shape)


@dataclass(frozen=True)
class Member:
    """A weight, what belongs to it, and whether it and its gain are trained and its result is used."""

    weight: Strided
    gain: Strided | None
    grad: Strided
    eps: float
    scale: float
    is_trained: bool = True
    is_gain_trained: bool = True
    is_used: bool = True


@dataclass(frozen=True)
class Preparation:
    """A convolution's input, and what is to happen to it."""

    input: Strided
    padding: tuple[tuple[int, int], ...]
    padding_mode: str
    activation: str | None


MEANS = [(0.0, 1.0), (0.0, 1.0), (0.0, 1e-3), (0.5, 0.05), (-30.0, 1.0), (0.0, 100.0)]
# Small tensors of any rank, some without elements; filters beyond a block of 4096 values, beyond 128 rows of a tile.
SHAPES = st.one_of(
    st.lists(st.integers(1, 7), min_size=2, max_size=5),
    st.lists(st.integers(0, 5), min_size=2, max_size=5),
    st.tuples(st.integers(1, 3), st.integers(1, 9000)),
    st.tuples(st.integers(1, 12), st.integers(1, 150), st.integers(1, 4)),
).map(tuple)


@st.composite
def strided(draw, shape, dtype, seed=0, mean=0.0, std=1.0):
    rank = len(shape)
    return Strided(
        tuple(shape),
        dtype,
        order=tuple(draw(st.permutations(range(rank)))),
        steps=tuple(draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in shape),
        starts=tuple(draw(st.sampled_from([0, 0, 1, 3])) for _ in shape),
        expanded=draw(st.sampled_from([None, None, *range(rank)])) if 0 not in shape else None,
        seed=seed,
        mean=mean,
        std=std,
    )


def powers(least, most):
    return st.floats(least, most).map(lambda exponent: float(f"{10**exponent:.3g}"))


@st.composite
def members(draw, dtype=None, result_dtype=None, shape=None, seed=0, gain_dtypes=DTYPES):
    """No default eps and scale. dtype: the weight's, by default any; result_dtype: by default the weight's."""
    shape = draw(SHAPES) if shape is None else shape
    dtype = draw(st.sampled_from(DTYPES)) if dtype is None else dtype
    mean, std = draw(st.sampled_from(MEANS))
    ones = (1,) * draw(st.integers(0, len(shape) - 1))
    gain_dtype, gain = draw(st.sampled_from([None, *gain_dtypes])), None
    if gain_dtype is not None:
        gain = draw(strided((shape[0], *ones), gain_dtype, seed + 2, 1.0, 0.5))
    return Member(
        draw(strided(shape, dtype, seed, mean, std)),
        gain,
        draw(strided(shape, result_dtype or dtype, seed + 1)),
        eps=draw(powers(-9, 2)),
        scale=draw(powers(-2, 2)) * draw(st.sampled_from([1, -1])),
        is_trained=draw(st.sampled_from([True, True, False])),
        is_gain_trained=draw(st.sampled_from([True, True, False])),
        is_used=draw(st.sampled_from([True, True, True, False])),
    )


def memory_formats(*ranks):
    """Of weights of these ranks; channels_last if any of them can have it."""
    return st.sampled_from(
        [torch.preserve_format, torch.contiguous_format, *(FORMATS[r] for r in ranks if r in FORMATS)]
    )


@st.composite
def lists(draw):
    """Members of a list, in the dtype of the results or None, and a memory format."""
    dtype = draw(st.sampled_from([None, *DTYPES]))
    of_weights = {None: st.sampled_from(DTYPES), F64: st.just(F64)}.get(dtype, st.sampled_from(DTYPES[:3]))
    each = [draw(members(draw(of_weights), dtype, seed=10 * i)) for i in range(draw(st.integers(0, 5)))]
    return each, dtype, draw(memory_formats(4, 5))


@st.composite
def preparations(draw, dtype, channels, spatial, widest=6):
    """widest: of the borders."""
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    size = [draw(st.integers(1, 7)) for _ in range(spatial)]
    size[-1] = draw(st.sampled_from([size[-1], size[-1], 40]))
    padding = []
    for n in size:
        most = min({"zeros": 5, "reflect": n - 1, "replicate": 4, "circular": n}[mode], widest)
        padding.append((draw(st.integers(0, most)), draw(st.integers(0, most))))
    batch = draw(st.sampled_from([(), (1,), (2,), (3,)]))
    x = draw(strided((*batch, channels, *size), dtype, 5, std=draw(st.sampled_from([1.0, 3.0]))))
    return Preparation(x, tuple(padding), mode, draw(st.sampled_from(list(ACTIVATIONS))))


@st.composite
def convolutions(draw):
    """(input, weight, arguments) of wa.conv1d to wa.conv3d, in float64."""
    spatial, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3]))
    per_group, filters = draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    each = st.one_of(st.integers(1, 3), st.tuples(*[st.integers(1, 3)] * spatial))
    kernel, stride, dilation = (draw(st.integers(1, 4)) for _ in range(spatial)), draw(each), draw(each)
    member = draw(members(F64, shape=(filters, per_group, *kernel), gain_dtypes=[F64]))
    preparation = draw(preparations(F64, per_group * groups, spatial))
    words = ["valid", "same_tf", *(["same"] if stride in (1, (1,) * spatial) else [])]
    padding = draw(st.sampled_from([*words, "pairs", "pairs", "pairs"]))
    return member, preparation, padding, stride, dilation, groups, draw(st.booleans())


@st.composite
def layers(draw):
    """(name of a layer's class, its arguments by name, shape of an input, eps, scale, activation)."""
    numbers = (
        draw(powers(-9, 2)),
        draw(powers(-2, 2)),
        draw(st.sampled_from(list(ACTIVATIONS))),
    )
    name, spatial = draw(st.sampled_from(["Linear", "Conv", "ConvTranspose"])), draw(st.integers(1, 3))
    if name == "Linear":
        features = draw(st.integers(1, 40)), draw(st.integers(1, 9))
        arguments = {"in_features": features[0], "out_features": features[1], "bias": draw(st.booleans())}
        return "WALinear", arguments, (draw(st.integers(1, 3)), features[0]), *numbers
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    each = st.tuples(*[st.integers(1, 3)] * spatial)
    arguments = {
        "in_channels": groups * draw(st.integers(1, 3)),
        "out_channels": groups * draw(st.integers(1, 3)),
        "kernel_size": draw(each),
        "stride": draw(each),
        "padding": tuple(draw(st.integers(0, 2)) for _ in range(spatial)),
        "dilation": draw(each),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    if name == "ConvTranspose":
        most = [max(s, d) - 1 for s, d in zip(arguments["stride"], arguments["dilation"], strict=True)]
        arguments["output_padding"] = tuple(draw(st.integers(0, n)) for n in most)
    reach = [d * (k - 1) + 1 for d, k in zip(arguments["dilation"], arguments["kernel_size"], strict=True)]
    size = [max(5, n) + draw(st.integers(0, 3)) for n in reach]  # 5: else padding leaves nothing of transposed ones
    return f"WA{name}{spatial}d", arguments, (2, arguments["in_channels"], *size), *numbers


def is_empty(shape):
    return math.prod(shape) == 0
