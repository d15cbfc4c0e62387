"""Gloo processes on this machine that run the jobs of a test."""

import contextlib
import queue
import tempfile
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


@contextlib.contextmanager
def in_processes(count):
    """A function that runs job(rank, *arguments) in `count` processes and returns rank 0's result. The processes are
    started once, which takes longer than most jobs: use it in a fixture of the module.

    The job must be a function of a module, not a lambda; arguments and result are pickled.
    """
    context = torch.multiprocessing.get_context("spawn")
    results, jobs = context.Queue(), [context.Queue() for _ in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = [(rank, count, folder, jobs[rank], results) for rank in range(count)]
        processes = [context.Process(target=_serve, args=each, daemon=True) for each in arguments]
        for process in processes:
            process.start()

        def run(*job):
            for each in jobs:
                each.put(job)
            answers, errors = {}, []
            for _ in processes:
                try:  # after an error the others may wait for that process for ever
                    rank, answers[rank], error = results.get(timeout=5 if errors else 120)
                except queue.Empty:
                    break
                errors += [f"process {rank}: {error}"] if error else []
            assert not errors, errors[0]
            return answers[0]

        try:
            yield run
        finally:
            for each, process in zip(jobs, processes, strict=True):
                each.put(None)
                process.join(10)
                process.kill()
