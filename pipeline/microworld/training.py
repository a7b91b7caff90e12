"""The training loop shared by the reference policy and the scorers, and its reproducibility."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Lock
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import logging

_Row = TypeVar("_Row")
_Batch = TypeVar("_Batch")

# Llama's usual 0.02 suits widths of thousands; near 100 a wider start learns faster.
INITIALIZER_RANGE = 0.06

_WARMUP_SHARE = 0.08
_WEIGHT_DECAY = 0.05
_BETAS = (0.9, 0.95)
_MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class TrainingJob(Generic[_Batch]):
    """One model to train: one AdamW step a batch, with linear warm-up and then a cosine down to 0.

    Attributes:
        name: for the recorded losses.
        model: trained in place.
        batches: used once each, in order.
        loss_of: mean loss of a batch, a scalar tensor.
        learning_rate: the peak.
        step_cost: how long a step takes in comparison with other jobs, in any unit.
    """

    name: str
    model: nn.Module
    batches: Sequence[_Batch]
    loss_of: Callable[[_Batch], Tensor]
    learning_rate: float
    step_cost: int


@contextmanager
def reproducible_torch(*, seed: int) -> Iterator[None]:
    """Make what torch computes on a CPU a function of ``seed`` alone, and put everything back afterwards.

    A float32 sum depends on how it is split over threads, so each operation runs on one thread.
    """
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic)
            torch.set_num_threads(threads)


@contextmanager
def hidden_write_progress() -> Iterator[None]:
    """Keep the progress bar that transformers draws for each checkpoint out of the one bar of the build."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def train_models(jobs: Sequence[TrainingJob[Any]], *, advance: Callable[[int], object]) -> dict[str, list[float]]:
    """Train the models of ``jobs``, two at a time, within :func:`reproducible_torch`.

    Jobs share nothing and draw no random numbers, so the result does not depend on their timing. Two single-threaded
    jobs use two cores better than two threads in one small operation, and do not collapse on a busy machine.

    Args:
        jobs: started in this order.
        advance: called with the cost of each finished step.

    Returns:
        The loss of every step for each job, by name.
    """
    stop, lock = Event(), Lock()

    def finish_step(cost: int) -> None:
        if stop.is_set():
            raise CancelledError
        with lock:
            advance(cost)

    with ThreadPoolExecutor(max_workers=2) as pool:
        futures = {job.name: pool.submit(_train_model, job, finish_step) for job in jobs}
        try:
            return {name: future.result() for name, future in futures.items()}
        except BaseException:
            # Without this an interrupted build would go on to its end before it stops.
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _train_model(job: TrainingJob[Any], finish_step: Callable[[int], None]) -> list[float]:
    torch.set_num_threads(1)  # OpenMP keeps this setting for each thread
    matrices = [parameter for parameter in job.model.parameters() if parameter.ndim >= 2]
    norms = [parameter for parameter in job.model.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": _WEIGHT_DECAY}, {"params": norms, "weight_decay": 0.0}],
        lr=job.learning_rate,
        betas=_BETAS,
    )
    n_steps, n_warmup = len(job.batches), max(1, round(_WARMUP_SHARE * len(job.batches)))

    def rate(step: int) -> float:
        if step < n_warmup:
            return (step + 1) / n_warmup
        return 0.5 * (1 + math.cos(math.pi * (step - n_warmup) / max(1, n_steps - n_warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses = []
    job.model.train()
    for batch in job.batches:
        optimizer.zero_grad(set_to_none=True)
        loss = job.loss_of(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(job.model.parameters(), _MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        finish_step(job.step_cost)
    job.model.eval()
    return losses


def bucket_batches(
    rows: Sequence[_Row], *, batch: int, length_of: Callable[[_Row], int], rng: np.random.Generator
) -> list[list[_Row]]:
    """Split ``rows`` into batches of rows of similar length, in random order: less padding, same rows.

    Rows are sorted only within chunks of 16 batches, so that a batch stays a fair mixture.
    """
    chunk = 16 * batch
    order = rng.permutation(len(rows))
    batches = []
    for start in range(0, len(rows), chunk):
        near = sorted(order[start : start + chunk], key=lambda index: length_of(rows[index]))
        batches += [[rows[index] for index in near[i : i + batch]] for i in range(0, len(near), batch)]
    return [batches[index] for index in rng.permutation(len(batches))]


def pad_right(rows: Sequence[Sequence[int]], *, value: int) -> Tensor:
    """Stack token ids of different lengths into one int64 tensor of shape (rows, longest)."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])
