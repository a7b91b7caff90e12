from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from pipeline.microworld.training import TrainingJob, bucket_batches, pad_right, reproducible_torch, train_models

pytestmark = pytest.mark.slow


def regression_job(name: str, *, n_steps: int) -> TrainingJob[torch.Tensor]:
    model = torch.nn.Linear(3, 1)
    return TrainingJob(
        name=name,
        model=model,
        batches=[torch.eye(3)] * n_steps,
        loss_of=lambda x: ((model(x) - x.sum(1, keepdim=True)) ** 2).mean(),
        learning_rate=0.1,
        step_cost=2,
    )


def test_models_are_trained_and_every_step_is_counted() -> None:
    costs: list[int] = []
    with reproducible_torch(seed=0):
        losses = train_models([regression_job(name, n_steps=150) for name in ("a", "b", "c")], advance=costs.append)
    assert costs == [2] * 450
    assert list(losses) == ["a", "b", "c"]
    for steps in losses.values():
        assert len(steps) == 150
        assert steps[-1] < 0.01 * steps[0]


def test_a_failing_job_stops_the_others() -> None:
    started = threading.Event()

    def fail(_: torch.Tensor) -> torch.Tensor:
        started.wait(10)
        raise ArithmeticError("no loss")

    bad = regression_job("bad", n_steps=1)
    bad = TrainingJob(bad.name, bad.model, bad.batches, fail, bad.learning_rate, bad.step_cost)
    n_done: list[int] = []

    def advance(cost: int) -> None:
        n_done.append(cost)
        started.set()

    with pytest.raises(ArithmeticError, match="no loss"):
        train_models([bad, regression_job("long", n_steps=1_000_000)], advance=advance)
    assert 0 < len(n_done) < 1_000_000


def test_buckets_hold_every_row_once_and_pad_little() -> None:
    rng = np.random.default_rng(0)
    rows = [[1] * int(length) for length in rng.integers(1, 50, size=1000)]
    batches = bucket_batches(rows, batch=16, length_of=len, rng=rng)
    assert sorted(map(len, (row for batch in batches for row in batch))) == sorted(map(len, rows))
    assert all(len(batch) <= 16 for batch in batches)
    padded = sum(pad_right(batch, value=0).numel() for batch in batches)
    assert padded < 1.25 * sum(map(len, rows))


def test_padding_is_on_the_right() -> None:
    assert pad_right([[5], [6, 7]], value=0).tolist() == [[5, 0], [6, 7]]
