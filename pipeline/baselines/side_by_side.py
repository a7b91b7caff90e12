"""Experiments side by side, each in a process of its own: policies as small as theirs gain little from a second core.

Experiments share runs: whoever comes first makes one, and the others wait for it
(:func:`pipeline.baselines.study.alone`).
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace

from pipeline.baselines.experiments import EXPERIMENTS
from pipeline.baselines.results import Result
from pipeline.baselines.study import Study
from pipeline.contracts.cores import usable_cores
from pipeline.contracts.errors import InputError, StaleArtifactError
from pipeline.logs import show_log
from pipeline.run.step import log

_THREADS = "OMP_NUM_THREADS"


def count_jobs(asked: int | None, *, n_experiments: int) -> int:
    """How many experiments are performed at a time.

    Args:
        asked: by the user; as many as there are cores where not.
        n_experiments: how many there are.

    Raises:
        InputError: the number that was asked for is not positive.
    """
    if asked is not None and asked < 1:
        raise InputError(f"--jobs is {asked}; it must be at least 1")
    return max(1, min(n_experiments, asked or usable_cores()))


def perform_experiments(study: Study, names: Sequence[str], *, jobs: int) -> Iterator[tuple[Result, float]]:
    """Perform experiments, several at a time; one at a time in this process.

    Args:
        study: the study.
        names: of experiments, those that take longest first.
        jobs: how many are performed at a time; the cores are shared among them.

    Yields:
        Each experiment's result and how long it took in seconds, as they are done.

    Raises:
        DualignError: whatever stops one of them; the others are stopped too, and finished work is kept.
    """
    if jobs == 1:
        for name in names:
            yield _perform(study, name)
        return
    quiet = replace(study, show_progress=False)  # bars of several processes would draw over each other
    threads = max(1, usable_cores() // jobs)
    level = log.getEffectiveLevel()
    before = os.environ.get(_THREADS)
    os.environ[_THREADS] = str(threads)  # read when a worker loads its libraries
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin_worker, (threads, level))
    try:
        futures = [pool.submit(_perform, quiet, name) for name in names]
        for future in as_completed(futures):
            yield future.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        pool.shutdown()
        os.environ.pop(_THREADS)
        if before is not None:
            os.environ[_THREADS] = before


def _perform(study: Study, name: str) -> tuple[Result, float]:
    started = time.monotonic()
    log.info("==== %s: %s", name, EXPERIMENTS[name].title)
    try:
        result = EXPERIMENTS[name].perform(study)
    except StaleArtifactError as error:
        made_from = str(error).rpartition("\n")[0]  # the last line is the remedy of another command
        raise StaleArtifactError(
            f"{made_from}\nThe experiments' recipe has changed since: remove {study.folder} to make them anew"
        ) from error
    return result, time.monotonic() - started


def _begin_worker(threads: int, level: int) -> None:
    """Show the log of a worker, and let it end with the process that started it, even where that one is killed."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it stops it
    torch.set_num_threads(threads)
    show_log(quiet=level > logging.INFO, verbose=False)
    parent = multiprocessing.parent_process()
    assert parent is not None  # it was spawned

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
