"""Processes that test side by side, each with cores of its own.

What a test starts takes as many threads as it sees cores. Where two tests do so, the threads of one wait, busily, for
those of the other.
"""

import os


def _take_cores() -> None:
    """Take every n-th core, for the n processes of pytest-xdist; before anything loads a library that counts them."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None or not hasattr(os, "sched_setaffinity"):
        return
    place, count = int(worker.removeprefix("gw")), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    own = sorted(os.sched_getaffinity(0))[place::count]
    if own:  # more processes than cores share them all
        os.sched_setaffinity(0, own)


_take_cores()
