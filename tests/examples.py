"""Counts the examples of a Hypothesis test, and ends it when its time is up, under `make fuzz`."""

import functools
import os
import time

import pytest
from hypothesis.errors import StopTest, UnsatisfiedAssumption

MINUTES = "WEIGHTALIGN_FUZZ_MINUTES"  # for all Hypothesis tests of a run; by default their number of examples ends them


class Clock:
    """Of the test that is running."""

    def start(self, tests):
        processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
        seconds = 60 * float(os.environ.get(MINUTES, "inf")) * processes / tests
        self.end, self.examples, self.has_failed = time.monotonic() + seconds, 0, False


clock = Clock()


def counted(test):
    """Hypothesis hands pytest's skips on at once; but what has failed is still to be shrunk."""

    @functools.wraps(test)
    def example(*args, **kwargs):
        clock.examples += 1
        try:
            test(*args, **kwargs)
        except (StopTest, UnsatisfiedAssumption):  # not an example after all
            raise
        except BaseException:
            clock.has_failed = True
            raise
        # After the example, because Hypothesis takes one that draws less than before for a fault of the strategy.
        if time.monotonic() > clock.end and not clock.has_failed:
            pytest.skip(f"time is up after {clock.examples} examples")

    return example
