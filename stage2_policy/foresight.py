"""A forecast before training: how much of the way to the tilted optimum responses teach about unseen prompts.

What training fits is s = (r + <lam*, g - b>) / beta as a function of prompt and response. The simplest regressor with
the reference's own knowledge is linear in its hidden states: a ridge regression on their mean and last value over a
response, halfway up and at the top, within prompts, as log-ratios are compared within prompts alone. Its prediction
is taken for the log-ratio of a policy, and judged like one on the held-out prompts. It has no rate to miss, and takes
one pass of the reference over some of the responses.

A regression is linear in what it fits, so that each score is read apart and s is their sum. A policy does not close
the same part of the way in every score: where a constraint's is harder to foresee than the others, its demand is
missed.

It is a forecast and no bound: a fine-tuned network may find more than is linear in its states, or less where its rate
or its steps do not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.progress import progress_bar
from stage2_policy.data import TrainingData, TrainingResponses, less_means, segment_softmax
from stage2_policy.held_out import ratio_error

MOST_TRAIN_ROWS, MOST_HELD_OUT_ROWS = 1024, 512
"""Responses that are read: a twelfth of what an epoch costs with 10,000 responses."""
_RESPONSES_OF_A_PROMPT = 8
"""Read of each training prompt, where there are prompts enough: more of one prompt say less than another prompt."""
_FEWEST_PROMPTS = 4
_DEPTHS = (0.5, 1.0)
_PENALTIES = tuple(10.0**power for power in range(-2, 5))
"""Beside a kernel whose diagonal is 1 in the mean."""


@dataclass(frozen=True)
class ForeseenGain:
    """What a policy gains in the mean of one column over the reference, on held-out prompts, by their responses.

    Attributes:
        foreseen: of the policy with the predicted log-ratios, units of the column; positive is better.
        tilted: of the tilted weights.
        shortfall_error: standard error of their difference over prompts; None with one of them.
    """

    foreseen: float
    tilted: float
    shortfall_error: float | None


@dataclass(frozen=True)
class Reading:
    """What a linear reading of hidden states, fitted on some training responses, foresees on held-out prompts.

    Attributes:
        closed_fraction: of a policy with the predicted log-ratios, estimated as
            :func:`stage2_policy.held_out.estimate_held_out` does.
        closed_fraction_error: its standard error over held-out prompts; None with one of them.
        explained: share of the variance of s within held-out prompts.
        gains: in the reward and in each constraint's column, 1 + m of them.
        n_prompts: fitted on.
        n_responses: fitted on.
        n_held_out_prompts: judged on.
    """

    closed_fraction: float
    closed_fraction_error: float | None
    explained: float
    gains: tuple[ForeseenGain, ...]
    n_prompts: int
    n_responses: int
    n_held_out_prompts: int


@dataclass(frozen=True)
class Forecast:
    """What is known before training of what it may reach.

    Attributes:
        reading: on as many responses as are read.
        of_half: the same fitted on half of the prompts: what more prompts may bring.
        names: of the reward and of the constraints, shape (1 + m,).
        signs: of their columns, 1 where more is better and -1 where less is, shape (1 + m,).
    """

    reading: Reading
    of_half: Reading
    names: tuple[str, ...]
    signs: tuple[int, ...]

    @property
    def sentence(self) -> str:
        """For people, with its numbers."""
        one, half = self.reading, self.of_half
        error = "" if one.closed_fraction_error is None else f" ± {1.96 * one.closed_fraction_error:.2f}"
        return (
            f"a linear reading of the reference's hidden states, fitted on {one.n_responses} of the responses to "
            f"{one.n_prompts} prompts, closes {one.closed_fraction:.2f}{error} of the way to the tilted optimum on "
            f"{one.n_held_out_prompts} held-out prompts ({half.closed_fraction:.2f} from half of the prompts); there "
            f"it gains {', '.join(map(self._gain, self.names, self.signs, one.gains))}"
        )

    def _gain(self, name: str, sign: int, gain: ForeseenGain) -> str:
        error = "" if gain.shortfall_error is None else f" ± {1.96 * gain.shortfall_error:.2g}"
        return f"{name} {sign * gain.foreseen:+.3g} where the tilted weights gain {sign * gain.tilted:+.3g}{error}"


def forecast(model: Any, data: TrainingData, *, token_budget: int, show_progress: bool) -> Forecast | None:
    """The forecast of a training run; None where there are too few prompts, or nothing to gain on held-out ones.

    Args:
        model: the reference policy, a causal language model of transformers.
        data: what will be trained on, and the responses that will choose the checkpoint.
        token_budget: tokens of a batch; speed and memory only.
        show_progress: show a progress bar.

    Raises:
        CorruptArtifactError: a file of the tilted table is damaged.
    """
    train, held_out, solution = data.train, data.held_out, data.solution
    if len(train.prompt_ids) < _FEWEST_PROMPTS or not np.ptp(less_means(held_out.tilt, held_out.prompt_p)):
        return None
    rows = some_rows(train.prompt_p, most=MOST_TRAIN_ROWS, of_a_prompt=_RESPONSES_OF_A_PROMPT)
    judged = whole_prompts(held_out.prompt_p, most=MOST_HELD_OUT_ROWS)
    states = [
        read_states(model, responses, chosen, token_budget=token_budget, show_progress=show_progress)[0]
        for responses, chosen in ((train, rows), (held_out, judged))
    ]
    fitted = (states[0], data.columns("train", rows), train.prompt_p[rows])
    judging = (states[1], data.columns("held_out", judged), held_out.prompt_p[judged])
    prompts = np.unique(train.prompt_p[rows])
    half = train.prompt_p[rows] < prompts[len(prompts) // 2]
    return Forecast(
        reading=judge_reading(fitted, judging, nats=data.nats),
        of_half=judge_reading((fitted[0][half], fitted[1][half], fitted[2][half]), judging, nats=data.nats),
        names=(solution.reward.name, *solution.names),
        signs=(1, *(int(sign) for sign in solution.signs_m)),
    )


Rows = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Hidden states, shape (n, features); columns, shape (n, c); the prompt of each row, ascending, shape (n,)."""


def judge_reading(train: Rows, held_out: Rows, *, nats: np.ndarray) -> Reading:
    """Fit a ridge regression of each column within prompts, and judge what their sum foresees on held-out prompts.

    The penalty is the one with the least error in s on the last fifth of the training prompts.

    Args:
        train: rows that are fitted.
        held_out: rows that judge.
        nats: of s a unit of each column, shape (c,).
    """
    states, columns, prompt_n = train
    x, y = less_means(states, prompt_n), less_means(columns, prompt_n)
    prompts = np.unique(prompt_n)
    last = prompt_n >= prompts[-max(1, len(prompts) // 5)]
    score = y @ nats
    errors = [float(np.sum((score[last] - x[last] @ _ridge(x[~last], score[~last], one)) ** 2)) for one in _PENALTIES]
    weights = _ridge(x, y, _PENALTIES[int(np.argmin(errors))])
    held_states, held_columns, held_n = held_out
    held_n = np.unique(held_n, return_inverse=True)[1]
    predicted, held_score = held_states @ (weights @ nats), held_columns @ nats
    own = less_means(held_score, held_n)
    left = own - less_means(predicted, held_n)
    gained_p, attainable_p = (_gain(values, held_score, held_n) for values in (predicted, held_score))
    foreseen, tilted = (_means_of_columns(values, held_columns, held_n) for values in (predicted, held_score))
    even = _means_of_columns(np.zeros(len(held_n)), held_columns, held_n)
    return Reading(
        closed_fraction=float(gained_p.mean() / attainable_p.mean()),
        closed_fraction_error=ratio_error(gained_p, attainable_p),
        explained=1 - float(left @ left) / float(own @ own),
        gains=tuple(_gain_of_column(*means) for means in zip((foreseen - even).T, (tilted - even).T, strict=True)),
        n_prompts=len(prompts),
        n_responses=len(y),
        n_held_out_prompts=len(gained_p),
    )


def read_states(
    model: Any,
    responses: TrainingResponses,
    rows: np.ndarray,
    *,
    shares: Sequence[float] = (1.0,),
    token_budget: int,
    show_progress: bool,
) -> np.ndarray:
    """Mean and last of the hidden states over first parts of some responses, float64, shape (shares, n, features).

    Args:
        model: a causal language model of transformers.
        responses: of which some are read.
        rows: which, shape (n,).
        shares: how much of each response is read.
        token_budget: tokens of a batch.
        show_progress: show a progress bar.
    """
    order = rows[np.argsort(responses.lengths[rows], kind="stable")]
    found: dict[int, np.ndarray] = {}
    device = next(model.parameters()).device
    bar = progress_bar(total=len(order), doing="forecast: hidden states", unit=" responses", shown=show_progress)
    with bar, torch.no_grad():
        for batch in _batches(order, responses.lengths, token_budget):
            sequences = [responses.sequences[int(row)] for row in batch]
            width = max(len(prompt) + len(done) for prompt, done in sequences)
            ids = np.zeros((len(batch), width), dtype=np.int64)
            for place, (prompt, done) in enumerate(sequences):
                ids[place, : len(prompt) + len(done)] = np.concatenate([prompt, done])
            # Padding stands behind what is read: causal attention does not see it.
            layers = model.base_model(
                input_ids=torch.from_numpy(ids).to(device), output_hidden_states=True, use_cache=False
            ).hidden_states
            depths = [round(depth * (len(layers) - 1)) for depth in _DEPTHS]
            for place, (row, (prompt, done)) in enumerate(zip(batch, sequences, strict=True)):
                stops = [len(prompt) + max(1, round(share * len(done))) for share in shares]
                parts = [[layers[depth][place, len(prompt) : stop].float() for depth in depths] for stop in stops]
                both = [torch.cat([value for part in own for value in (part.mean(0), part[-1])]) for own in parts]
                found[int(row)] = torch.stack(both).cpu().numpy()
            bar.update(len(batch))
    return np.stack([found[int(row)] for row in rows], axis=1).astype(np.float64)


def some_rows(prompt_n: np.ndarray, *, most: int, of_a_prompt: int) -> np.ndarray:
    """The first responses of the first prompts, shape (m,).

    Args:
        prompt_n: prompt of each row, ascending from 0 without gaps, shape (n,).
        most: how many rows in all, about.
        of_a_prompt: how many of each prompt, unless there are too few prompts to make up the number.
    """
    counts = np.bincount(prompt_n)
    place = np.arange(len(prompt_n)) - (np.cumsum(counts) - counts)[prompt_n]
    each = max(of_a_prompt, -(-most // len(counts)))
    return np.flatnonzero((place < each) & (prompt_n < -(-most // each)))


def whole_prompts(prompt_n: np.ndarray, *, most: int) -> np.ndarray:
    """All rows of the first prompts, at most so many rows and at least two prompts, shape (m,)."""
    ends = np.cumsum(np.bincount(prompt_n))
    return np.arange(ends[max(min(2, len(ends)), int(np.searchsorted(ends, most, side="right"))) - 1])


def _gain(log_ratio: np.ndarray, score: np.ndarray, prompt_n: np.ndarray) -> np.ndarray:
    """E[s] - KL of each prompt's policy with these log-ratios over that of the reference, nats, shape (p,)."""
    weight = segment_softmax(log_ratio, prompt_n)
    counts = np.bincount(prompt_n)
    nats = weight * np.log(np.maximum(weight, 1e-300) * counts[prompt_n])
    return np.bincount(prompt_n, weights=(weight - 1 / counts[prompt_n]) * score - nats)


def _means_of_columns(log_ratio: np.ndarray, columns: np.ndarray, prompt_n: np.ndarray) -> np.ndarray:
    """Means of columns, shape (n, c), under each prompt's policy with these log-ratios, shape (p, c)."""
    weighted = segment_softmax(log_ratio, prompt_n)[:, None] * columns
    return np.stack([np.bincount(prompt_n, weights=column) for column in weighted.T], axis=1)


def _gain_of_column(foreseen_p: np.ndarray, tilted_p: np.ndarray) -> ForeseenGain:
    return ForeseenGain(
        foreseen=float(foreseen_p.mean()),
        tilted=float(tilted_p.mean()),
        shortfall_error=ratio_error(foreseen_p - tilted_p, np.ones(len(tilted_p))),
    )


def _batches(order: np.ndarray, lengths: np.ndarray, token_budget: int) -> list[np.ndarray]:
    batches, begin = [], 0
    for end in range(1, len(order) + 1):
        if end == len(order) or (end + 1 - begin) * int(lengths[order[end]]) > token_budget:
            batches.append(order[begin:end])
            begin = end
    return batches


def _ridge(x: np.ndarray, y: np.ndarray, penalty: float) -> np.ndarray:
    """Least squares with a penalty on each weight in units of its feature's spread, shape (features, *).

    By the rows, of which there are fewer than features as a rule.
    """
    spread = (x.std(axis=0) + 1e-12) * np.sqrt(x.shape[1])
    scaled = x / spread
    weights = scaled.T @ np.linalg.solve(scaled @ scaled.T + penalty * np.eye(len(y)), y)
    return np.asarray((weights.T / spread).T)
