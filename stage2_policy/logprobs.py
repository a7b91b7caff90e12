"""Log-probabilities of responses under a causal language model, from the token ids that were sampled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from pipeline.contracts.errors import InputError

TokenIds = Sequence[int] | np.ndarray
IGNORED = -100


@dataclass(frozen=True)
class SequenceBatch:
    """Prompts padded on the left and completions on the right, so that the completions share their columns.

    The last token of a completion is predicted but never fed.

    Attributes:
        input_ids: shape (n, prompt + completion - 1).
        attention_mask: 1 where there is a token, same shape.
        position_ids: counted from each row's first token, same shape.
        targets: the completion's token ids, :data:`IGNORED` behind its end, shape (n, completion).
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    targets: torch.Tensor


def build_batch(sequences: Sequence[tuple[TokenIds, TokenIds]]) -> SequenceBatch:
    """Pad pairs of prompt and completion token ids.

    Raises:
        InputError: a prompt or a completion has no tokens.
    """
    for place, (prompt, completion) in enumerate(sequences):
        if len(prompt) == 0 or len(completion) == 0:
            part = "prompt" if len(prompt) == 0 else "completion"
            raise InputError(f"sequence {place} has a {part} without tokens; both need at least one")
    width = max(len(prompt) for prompt, _ in sequences)
    height, tail = len(sequences), max(len(completion) for _, completion in sequences)
    ids = np.zeros((height, width + tail), dtype=np.int64)
    mask = np.zeros((height, width + tail), dtype=np.int64)
    targets = np.full((height, tail), IGNORED, dtype=np.int64)
    for row, (prompt, completion) in enumerate(sequences):
        ids[row, width - len(prompt) : width] = prompt
        ids[row, width : width + len(completion)] = completion
        mask[row, width - len(prompt) : width + len(completion)] = 1
        targets[row, : len(completion)] = completion
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    return SequenceBatch(
        input_ids=torch.from_numpy(ids[:, :-1]),
        attention_mask=torch.from_numpy(mask[:, :-1]),
        position_ids=torch.from_numpy(positions[:, :-1]),
        targets=torch.from_numpy(targets),
    )


def sequence_logp(model: torch.nn.Module, batch: SequenceBatch) -> torch.Tensor:
    """Log pi(completion | prompt) of each row, nats, float32, shape (n,); differentiable.

    The head is applied to the positions that predict a completion token only.
    """
    n_targets = batch.targets.shape[1]
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=n_targets,
    ).logits
    present = batch.targets != IGNORED
    token_nll = functional.cross_entropy(logits[present].float(), batch.targets[present], reduction="none")
    return -torch.zeros_like(batch.targets, dtype=torch.float32).masked_scatter(present, token_nll).sum(dim=1)


def score_sequences(
    model: PreTrainedModel,
    sequences: Sequence[tuple[TokenIds, TokenIds]],
    *,
    token_budget: int,
    show_progress: bool,
    description: str = "log-probabilities",
) -> np.ndarray:
    """Log pi(completion | prompt) of every pair of prompt and completion token ids, nats, float64, shape (n,).

    The model is put in evaluation mode for the time of the call; its dtype is that of the arithmetic.

    Args:
        model: a causal language model.
        sequences: pairs of prompt and completion token ids.
        token_budget: tokens of a batch, padding included; affects speed and memory only.
        show_progress: show a progress bar with an estimate of the time left.
        description: what the bar says.

    Raises:
        InputError: a prompt or a completion has no tokens.
    """
    logp = np.empty(len(sequences), dtype=np.float64)
    was_training = model.training
    model.train(False)
    try:
        with (
            torch.inference_mode(),
            tqdm(total=len(sequences), desc=description, unit="seq", disable=not show_progress, leave=False) as bar,
        ):
            for rows in iterate_budgeted([(len(prompt), len(done)) for prompt, done in sequences], token_budget):
                batch = move_batch(build_batch([sequences[row] for row in rows]), model.device)
                logp[rows] = sequence_logp(model, batch).double().cpu().numpy()
                bar.update(len(rows))
    finally:
        model.train(was_training)
    return logp


def move_batch(batch: SequenceBatch, device: torch.device) -> SequenceBatch:
    """Copy the batch to a device."""
    return SequenceBatch(
        input_ids=batch.input_ids.to(device),
        attention_mask=batch.attention_mask.to(device),
        position_ids=batch.position_ids.to(device),
        targets=batch.targets.to(device),
    )


def iterate_budgeted(lengths: Sequence[tuple[int, int]], token_budget: int) -> Iterator[list[int]]:
    """Rows in batches of similar length whose padded size stays within the budget; a single longer row goes alone."""
    batch: list[int] = []
    widest = tail = 0
    for row in sorted(range(len(lengths)), key=lambda place: lengths[place][::-1]):
        prompt, completion = lengths[row]
        width, height = max(widest, prompt), max(tail, completion)
        if batch and (len(batch) + 1) * (width + height) > token_budget:
            yield batch
            batch, width, height = [], prompt, completion
        batch.append(row)
        widest, tail = width, height
    if batch:
        yield batch
