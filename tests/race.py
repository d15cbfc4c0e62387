"""Threads that call all ops on the same tensors at once, and compare with what one thread gets: for the thread
sanitizer (tests/sanitize.py), which sees the library's own memory accesses."""

import threading

import torch

import weightalign_cuda as wa
from weightalign_cuda.ops import direct, native

THREADS, CALLS = 4, 30


def calls():
    """Functions without arguments, each of which returns tensors."""
    torch.manual_seed(0)
    weights = [torch.randn(*s, requires_grad=True) for s in [(8, 3, 3, 3), (40, 65), (3, 5000)]]
    gains = [torch.randn(len(w), requires_grad=True) for w in weights]
    image = torch.randn(2, 3, 9, 8, requires_grad=True)
    eps, scales = [0.1, 0.2, 0.3], [1.5, -0.7, 2.0]

    def foreach():
        aligned = wa.align_foreach(weights, gains, eps=eps, scale=scales, memory_format=torch.channels_last)
        return *aligned, *torch.autograd.grad([a.sin().sum() for a in aligned], [*weights, *gains])

    def convolution():
        result = wa.conv2d(image, weights[0], padding=((1, 2), 1), padding_mode="reflect", activation="gelu", eps=0.3)
        return result, *torch.autograd.grad(result.sin().sum(), [image, weights[0]])

    def ops():
        with torch.no_grad():
            aligned, statistics = native.align_forward(
                weights, gains, eps, scales, torch.bfloat16, torch.preserve_format
            )
            return *aligned, statistics

    def declined():
        return () if direct.forward(weights, [None], eps, scales, 6, 1, None) is None else (torch.ones(1),)

    return [foreach, convolution, ops, declined]


def main():
    functions = calls()
    # In their first calls, too: nothing is set up before.
    wrong, start, results = [], threading.Barrier(THREADS), {}

    def work(thread):
        start.wait()
        for i in range(CALLS):
            which = (i + thread) % len(functions)
            results[thread, which] = functions[which]()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (thread, which), found in results.items():
        expected = functions[which]()
        if not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
            wrong.append((thread, functions[which].__name__))
    print(f"{len(results)} results of {THREADS} threads, {len(wrong)} wrong", *wrong)
    raise SystemExit(len(wrong) > 0 or len(results) != THREADS * len(functions))


if __name__ == "__main__":
    main()
