"""The ops and the functions of `ops.direct` called past Python's checks: each call raises an exception or, where the
arguments have a meaning, gives the right answer. None crashes: they run in a process of their own, which says what it
is about to do.
"""

import itertools
import math
import os
import pathlib
import random
import resource
import subprocess
import sys

import direct_calls
import pytest
import torch
from test_prepare import padded
from truth import ACTIVATIONS, F32, F64, formula, is_near, normal

import weightalign_cuda as wa
from weightalign_cuda.ops import direct, native

TESTS = pathlib.Path(__file__).parent
EPS, SCALE = 0.4, 1.7
MODES, NAMES = ("zeros", "reflect", "replicate", "circular"), list(ACTIVATIONS)
PADDING, MODE, GELU = [1, 2, 0, 1], 3, NAMES.index("gelu")

# Right answers, in float64 and from values alone. They raise for arguments that have no meaning.


def true_forward(weights, gains, eps, scales, dtype, memory_format):
    assert memory_format in range(4) and dtype in (5, 6, 15) and weights
    aligned, statistics = [], []
    for w, g, e, s in zip(weights, gains, eps, scales, strict=True):
        w, g = values(w), None if g is None else gain_values(g, w)
        rows = w.flatten(1)
        rstd = 1 / (rows.shape[1] / 2 * rows.var(1, correction=0) + float(e)).sqrt()
        statistics.append(torch.stack([rows.mean(1), rstd], 1) if rows.numel() else rows.new_zeros(len(w), 2))
        aligned.append(formula(w, g, float(e), float(s)))
    return aligned, torch.cat(statistics)


def true_backward(grads, weights, gains, statistics, scales):
    """With x = (w - mean) * rstd and G: d gain = scale * sum(G x), d w = scale * gain * rstd * (G - mean(G) - x * sum(G
    x) / 2), mean and rstd being those of `statistics`, but for the rounding of the mean."""
    assert statistics.shape == (sum(len(w) for w in weights), 2) and statistics.dtype == F32 and weights
    grad_weights, grad_gains = [], []
    rows = values(statistics).split([len(w) for w in weights])
    for grad, w, g, s, row in zip(grads, weights, gains, scales, rows, strict=True):
        assert grad.shape == w.shape
        grad, d, mean, rstd = values(grad).flatten(1), values(w).flatten(1), row[:, :1], row[:, 1:]
        s = float(s)
        factor = s * rstd if g is None else s * rstd * gain_values(g, w)[:, None]
        x = d - mean
        x = (x - x.mean(1, keepdim=True)) * rstd
        along = (grad * x).sum(1, keepdim=True)
        grad_weights.append((factor * (grad - grad.mean(1, keepdim=True) - x * along / 2)).view(w.shape))
        grad_gains.append((s * along).flatten())
    return grad_weights, torch.cat(grad_gains)


def prepared(x, padding, mode, activation):
    padding = [int(n) for n in padding]
    assert mode in range(4) and activation in range(len(NAMES)) and min(padding) >= 0
    pairs = list(zip(padding[::2], padding[1::2], strict=True))
    assert len(pairs) == x.dim() - 2 and max(padding) < 2**20
    return padded(ACTIVATIONS[NAMES[activation]](x), pairs, MODES[mode])


def true_prepare_forward(x, weights, gains, eps, scales, dtype, memory_format, *preparation):
    aligned = true_forward(weights, gains, eps, scales, dtype, memory_format)
    return prepared(values(x), *preparation), *aligned


def true_prepare_backward(grad, saved, grads, weights, gains, statistics, scales, dtype, order, *preparation):
    x = values(saved).requires_grad_()
    assert dtype in (5, 6, 15) and sorted(order) == list(range(x.dim())) and preparation[2] > NAMES.index("relu")
    truth = prepared(x, *preparation)
    assert truth.shape == grad.shape
    (grad_input,) = torch.autograd.grad(truth, x, values(grad))
    return grad_input, *true_backward(grads, weights, gains, statistics, scales)


def values(t):
    """In float64, each value in a place of its own."""
    assert t.dtype in (torch.float16, torch.bfloat16, F32) and t.layout is torch.strided and t.device.type == "cpu"
    assert t.numel() < 2**30 and (t._is_zerotensor() or t.untyped_storage().nbytes() > 4 or not t.numel())
    t = torch._from_functional_tensor(t) if torch._is_functional_tensor(t) else t
    return torch.empty(t.shape, dtype=F64).copy_(t.detach())


def gain_values(gain, w):
    assert gain.shape[0] == gain.numel() == len(w)
    return values(gain.float() if gain.dtype == F64 else gain).flatten()


# Valid arguments, to be changed one at a time.


def forward_arguments():
    return [normal(4, 3, 3, 3), normal(2, 5, seed=1)], [normal(4, seed=2), None], [EPS] * 2, [SCALE, 0.8], 6, 1


def backward_arguments():
    weights, gains, eps, scales, *_ = forward_arguments()
    rows = true_forward(weights, gains, eps, scales, 6, 1)[1].float()
    return [normal(*w.shape, seed=3 + i) for i, w in enumerate(weights)], weights, gains, rows, scales


def preparation():
    return list(PADDING), MODE, GELU


def prepare_forward_arguments():
    return normal(2, 3, 5, 4, seed=5), *forward_arguments(), *preparation()


def prepare_backward_arguments():
    order = [0, 1, 2, 3]
    return normal(2, 3, 8, 5, seed=6), normal(2, 3, 5, 4, seed=5), *backward_arguments(), 6, order, *preparation()


OPS = {
    "align_forward": (forward_arguments, true_forward),
    "align_backward": (backward_arguments, true_backward),
    "prepare_forward": (prepare_forward_arguments, true_prepare_forward),
    "prepare_backward": (prepare_backward_arguments, true_prepare_backward),
}


def freed(t, left=0):
    t = t.clone()
    t.untyped_storage().resize_(left)
    return t


TENSORS = {
    "negated": torch._neg_view,
    "imaginary part of a conjugate": lambda t: torch.complex(t, t).conj().imag,
    "zeros without memory": lambda t: torch._efficientzerotensor(t.shape),
    "expanded": lambda t: t[:1].expand(t.shape),
    "one value": lambda t: t.flatten()[0].expand(t.shape),
    "overlapping": lambda t: t.flatten().as_strided(t.shape, (1,) * t.dim()),
    "every second": lambda t: torch.stack([t, t], -1)[..., 0],
    "requires gradients": lambda t: t.clone().requires_grad_(),
    "subclass": lambda t: torch.nn.Parameter(t),
    "half": torch.Tensor.half,
    "bfloat16": torch.Tensor.bfloat16,
    "double": torch.Tensor.double,
    "integers": torch.Tensor.int,
    "bools": torch.Tensor.bool,
    "complex": lambda t: t.cfloat().conj(),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "sparse": torch.Tensor.to_sparse,
    "compressed": lambda t: t.flatten(1).to_sparse_csr() if t.dim() > 1 else t.to_sparse(),
    "mkldnn": torch.Tensor.to_mkldnn,
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "jagged": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
    "meta": lambda t: t.to("meta"),
    "functional": torch._to_functional_tensor,
    "freed": freed,
    "shortened": lambda t: freed(t, 4),
    "number": lambda t: t.flatten()[0],
    "vector": torch.Tensor.flatten,
    "one more dimension": lambda t: t.unsqueeze(-1),
    "one less filter": lambda t: t[1:],
    "no filter": lambda t: t[:0],
    "no value": lambda t: t.flatten(1)[:, :0] if t.dim() > 1 else t[:0],
    "of rank 9": lambda t: t.view(*t.shape, *[1] * (9 - t.dim())),
    "transposed": lambda t: t.transpose(0, -1),
    "2^40 filters": lambda t: t[:1].expand(2**40, *t.shape[1:]),
    "2^40 values": lambda t: t.flatten()[0].expand(2**20, 2**20),
    "2^33 in a filter": lambda t: t.flatten()[0].expand(2, 2**33),
    "2^40 empty filters": lambda t: torch.empty(1, 0).expand(2**40, 0),
    "2^80 values of no filter": lambda t: torch.empty(0, 1, 1).expand(0, 2**40, 2**40),
    "NaN": lambda t: t * math.nan,
    "infinite": lambda t: t * math.inf,
}
NUMBERS = [0.0, -1.0, 1e-300, 1e300, math.nan, math.inf, -math.inf]
# Of dtypes and memory formats, only numbers that are some: torch itself takes 2**32 + 6 for float32, and crashes on
# those out of range in any op with a kernel in Python.
INTEGERS = [0, 1, 2, 3, 4, 5, 7, 8, 15]
LONG = [-1, -(2**63), 99, 2**31, 2**32 + 1, 2**40 + 1, 2**62, 2**63 - 1]
ENDS = [[n, n, 0, 0] for n in LONG]
PADDINGS = [[], [1], [0] * 6, [-1, 0, 0, 0], [4, 4, 3, 3], [6, 0, 0, 0], *ENDS, [2**63 - 1] * 4, [2**30] * 4]
ORDERS = [[0, 1, 2], [0, 0, 1, 2], [0, 1, 2, 4], [-1, 0, 1, 2], [3, 2, 1, 0], [2**40, 1, 2, 3]]


class Lying:
    """A sequence that is as long as it says, and has no items."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        raise KeyError(i)


class Shrinking(list):
    def __getitem__(self, i):
        item = super().__getitem__(i)
        self.clear()
        return item


GARBAGE = [None, "text", b"", 1, 2**70, 1.5, True, {}, {0: 1}, object(), type, len, iter([1.0]), [[]], (None,)]
GARBAGE += [
    Lying(2),
    Lying(2**31),
    Lying(2**62),
    float,
    [1.0] * 100_000,
    math,
    NotImplemented,
    torch.ones,
    [torch.ones],
]


def replacements(item):
    """(description, what might stand in the place of an item)."""
    if isinstance(item, torch.Tensor):
        yield from ((name, change(item)) for name, change in TENSORS.items())
    if isinstance(item, float):
        yield from ((str(number), number) for number in NUMBERS)
    if isinstance(item, int):
        yield from ((str(number), number) for number in INTEGERS + (LONG if item in (MODE, GELU) else []))
    yield from ((f"{type(each).__name__} {each!r:.20}", each) for each in GARBAGE)


def changes(argument):
    """The same for an argument."""
    if not isinstance(argument, list):
        yield from replacements(argument)
        return
    for i, item in enumerate(argument):
        for name, new in replacements(item):
            yield f"item {i}: {name}", [*argument[:i], new, *argument[i + 1 :]]
    lists = [[], argument[:-1], argument + argument[-1:], argument * 3, argument[::-1], tuple(argument)]
    yield from ((f"list {each!s:.30}", each) for each in [*lists, *PADDINGS, *ORDERS, Shrinking(argument), *GARBAGE])


def calls(arguments):
    """(description, arguments) of all calls with one change, and of some with two."""
    each = [list(changes(argument)) for argument in arguments]
    for i, those in enumerate(each):
        for name, new in those:
            yield f"argument {i}, {name}", [*arguments[:i], new, *arguments[i + 1 :]]
    chance = random.Random(0)
    for _ in range(200):
        (i, one), (j, other) = ((i, chance.choice(each[i])) for i in sorted(chance.sample(range(len(each)), 2)))
        new = [*arguments[:i], one[1], *arguments[i + 1 : j], other[1], *arguments[j + 1 :]]
        yield f"arguments {i}, {one[0]} and {j}, {other[0]}", new


def in_gains_shape(grad_weights, grad_gains, gains):
    parts = grad_gains.split([len(w) for w in grad_weights])
    return *grad_weights, *(None if g is None else p.view(g.shape) for g, p in zip(gains, parts, strict=True))


def in_fresh_memory(*arguments):
    results = direct.forward(*arguments, None)
    return results and results[:2]


def true_direct_forward(weights, gains, eps, scales, dtype, memory_format):
    """dtype: the weights' if None."""
    return true_forward(weights, gains, eps, scales, 6 if dtype is None else dtype, memory_format)


def without_graph(*arguments):
    with torch.no_grad():
        return direct.backward(*arguments)


def direct_backward_arguments():
    return direct_calls.backward_arguments(*backward_arguments())


def true_direct_backward(grads, wanted, tensors, versions, statistics, scales, holders_of_spent, smallest):
    count = len(grads)
    assert len(tensors) == 2 * count and len(wanted) == direct_calls.OTHERS + 2 * count
    wanted = wanted[direct_calls.OTHERS :]
    assert all(bool(w) or bool(g) for w, g in zip(wanted[:count], wanted[count:], strict=True))
    for tensor, version in zip(tensors, versions, strict=True):
        assert tensor is None or tensor._version == version
    assert isinstance(smallest, int) and max(grad.numel() for grad in grads) < smallest < 2**63
    weights, gains = tensors[:count], tensors[count:]
    return in_gains_shape(*true_backward(grads, weights, gains, statistics, scales), gains)


SETS = {
    "native": {name: (getattr(native, name), *each) for name, each in OPS.items()},
    "in_triton": {name: (getattr(wa.ops.in_triton, name), *each) for name, each in OPS.items()},
    "direct": {
        "forward": (in_fresh_memory, forward_arguments, true_direct_forward),
        "backward": (without_graph, direct_backward_arguments, true_direct_backward),
    },
}


def attempt(function, arguments):
    try:
        return function(*arguments)
    except Exception:
        return None


def plain(result):
    """The tensors of a result."""
    leaves = (t for t in torch.utils._pytree.tree_leaves(result) if t is not None)
    return [torch._from_functional_tensor(t) if torch._is_functional_tensor(t) else t for t in leaves]


def what_is_wrong(found, truth):
    if truth is None:
        return "took what has no meaning"
    found, truth = plain(found), plain(truth)
    if [t.shape for t in found] != [t.shape for t in truth]:
        return f"shapes {[t.shape for t in found]}, not {[t.shape for t in truth]}"
    for f, t in zip(found, truth, strict=True):
        if not is_near(f.detach(), t, (1e-3 if f.dtype == F32 else 0.02) * (1 + t.abs())):
            return f"{f.flatten()[:4].tolist()}, not {t.flatten()[:4].tolist()}"
    return None


def check(which):
    """In a process of its own: says each call before it, then what was wrong."""
    torch.set_num_threads(1)
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (2 << 30)  # so that nobody gets terabytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    count, wrong = 0, []
    if which == "in_triton":  # which reads memory that is not there, as torch's own operations do
        del TENSORS["freed"], TENSORS["shortened"]
    if which != "direct":  # torch's parser of arguments is torch's
        del GARBAGE[5:]
    step = 10 if which == "in_triton" else 1  # interpreted, and some 100 times slower
    for name, (function, arguments, truth) in SETS[which].items():
        found = function(*arguments())
        assert which == "direct" or what_is_wrong(found, truth(*arguments())) is None, f"{name} of valid arguments"
        for said, new in itertools.islice(calls(arguments()), 0, None, step):
            print(name, said, flush=True)
            count += 1
            found = attempt(function, new)
            problem = None if found is None else what_is_wrong(found, attempt(truth, new))
            wrong += [f"{name}, {said}: {problem}"] if problem else []
    print(f"{count} calls, {len(wrong)} wrong", *wrong, sep="\n")


@pytest.mark.parametrize("which", ["direct", "native", pytest.param("in_triton", marks=pytest.mark.slow)])
def test_exception_or_right_answer(which):
    if which == "in_triton":
        pytest.importorskip("triton")
    path = str(pathlib.Path(wa.__file__).parents[1])
    code = f"import test_past_checks as t; t.check({which!r})"
    env = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=TESTS, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout.splitlines()[-1:]}, then {done.stderr[-2000:]}"
    assert " calls, 0 wrong" in done.stdout, done.stdout[done.stdout.index(" calls, ") - 9 :]
