"""Gloo processes on this machine that run the jobs of a test."""

import contextlib
import queue
import tempfile
import time
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing


def _serve(rank, count, folder, jobs, results):
    """Each process runs jobs until it gets None."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count)
    while (job := jobs.get()) is not None:
        function, *arguments = job
        try:
            results.put((rank, function(rank, *arguments), None))
        except BaseException:
            results.put((rank, None, traceback.format_exc()))
    dist.destroy_process_group()


class _Group:
    def __init__(self, count):
        context = torch.multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.results, self.jobs = context.Queue(), [context.Queue() for _ in range(count)]
        arguments = [(rank, count, self.folder.name, jobs, self.results) for rank, jobs in enumerate(self.jobs)]
        self.processes = [context.Process(target=_serve, args=each, daemon=True) for each in arguments]
        for process in self.processes:
            process.start()

    def run(self, job):
        for each in self.jobs:
            each.put(job)
        answers, errors = {}, []
        for _ in self.processes:
            try:  # after an error the others may wait for that process for ever
                rank, answers[rank], error = self.results.get(timeout=5 if errors else 120)
            except queue.Empty:
                break
            errors += [f"process {rank}: {error}"] if error else []
        assert not errors, errors[0]
        return answers[0]

    def stop(self, wait):
        for each in self.jobs:
            each.put(None)
        end = time.monotonic() + wait
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
            process.kill()
        self.folder.cleanup()


@contextlib.contextmanager
def in_processes(count):
    """A function that runs job(rank, *arguments) in `count` processes and returns rank 0's result. The processes are
    started once, which takes longer than most jobs, and again after an error: use it in a fixture of the session.

    The job must be a function of a module, not a lambda; arguments and result are pickled.
    """
    group = None

    def run(*job):
        nonlocal group
        group = group or _Group(count)
        try:
            return group.run(job)
        except BaseException:
            group.stop(wait=0)
            group = None
            raise

    try:
        yield run
    finally:
        if group:
            group.stop(wait=10)
